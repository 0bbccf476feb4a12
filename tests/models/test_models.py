"""Models by name, tag and file; every way to fail is a readable message."""

from __future__ import annotations

import io

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import fsa
from fsa import InputError, ModelUnavailableError, tiny
from fsa.models import hub
from fsa.models import loading as models
from tests.support.towers import SMALL_CLIP

# The smallest plain ViT among open_clip's names would still take seconds; this takes none.
NAME = "fsa-test-vit"


@pytest.fixture(scope="module", autouse=True)
def small_model():
    open_clip.factory._MODEL_CONFIGS[NAME] = SMALL_CLIP
    yield
    del open_clip.factory._MODEL_CONFIGS[NAME]


@pytest.fixture(scope="module")
def state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.model.CLIP(**SMALL_CLIP).state_dict()


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("a.pt", lambda state: state),
        ("b.bin", lambda state: {"state_dict": state, "epoch": 3}),
        ("c.pth", lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
    ],
)
def test_local_checkpoints_are_read(name, wrap, state, tmp_path):
    file = tmp_path / name
    torch.save(wrap(state), file)
    loaded = models.load_model(NAME, str(file), device="cpu")
    assert torch.equal(loaded.model.visual.proj, state["visual.proj"])
    assert (loaded.pretrained, loaded.image_size) == (str(file), 32)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_safetensors_are_read_and_types_are_cast(state, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    loaded = models.load_model(NAME, str(file), device="cpu", dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    segmentor_scores = fsa.Segmentor(
        "sclip",
        fsa.hosts.build("sclip", loaded.model.visual),
        loaded,
        fsa.models.text.TextEncoder(loaded),
        None,
        fsa.FSAConfig(),
    ).segment(torch.rand(3, 40, 50), ["a", "b"], short_side=40, window=32, stride=16)
    assert segmentor_scores.labels.shape == (40, 50)


@pytest.mark.parametrize(
    ("units", "dtype", "reason"),
    [
        (("AMX", "AVX512-BF16"), torch.bfloat16, "multiplies it by AMX and AVX512-BF16"),
        (("AVX512-BF16",), torch.bfloat16, "multiplies it by AVX512-BF16"),
        ((), torch.float32, "neither AMX nor AVX512-BF16"),
    ],
)
def test_the_fastest_type_follows_from_the_processor(monkeypatch, units, dtype, reason):
    monkeypatch.setattr(models, "bfloat16_units", lambda: units)
    fastest, why = models.fastest_dtype(torch.device("cpu"))
    assert fastest == dtype
    assert reason in why
    loaded = models.load_model("tiny", device="cpu", dtype="auto")
    assert loaded.dtype == dtype
    # Nobody gets another type than float32 on the CPU without asking for it.
    assert models.resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert models.resolve_dtype("auto", torch.device("cuda")) == torch.float16


def test_a_checkpoint_of_another_model_is_refused_in_words(state, tmp_path):
    file = tmp_path / "other.pt"
    torch.save({**state, "visual.proj": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match=r"other\.pt: this checkpoint does not fit .*visual\.proj"):
        models.load_model(NAME, str(file))
    torch.save({"weights": torch.zeros(3)}, file)
    with pytest.raises(InputError, match="does not fit"):
        models.load_model(NAME, str(file))


def test_torchscript_archives_are_refused_in_words(tmp_path):
    file = tmp_path / "jit.pt"
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"jit\.pt: this is a TorchScript archive"):
        models.load_model(NAME, str(file))


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_broken_files_are_refused_by_name(content, suffix, tmp_path):
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match="broken"):
        models.load_model(NAME, str(file))


@pytest.mark.parametrize(
    ("name", "pretrained", "error", "message"),
    [
        ("ViT-B-61", None, InputError, "close to it: ViT-B-16"),
        ("ViT-B-16", "gone.pt", ModelUnavailableError, r"'gone\.pt': no such file"),
        ("ViT-B-16", "some/where", ModelUnavailableError, "no such file"),
        ("ViT-B-16", "opnai", InputError, "its tags are openai, laion400m_e31"),
        ("ViT-B-32-256", None, InputError, "no default weights; pass pretrained= one of"),
    ],
)
def test_names_and_tags_that_are_not_known(name, pretrained, error, message):
    with pytest.raises(error, match=message):
        models.load_model(name, pretrained)


def test_a_hub_out_of_reach_is_said_in_words(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("HTTPSConnectionPool(host=...): Max retries exceeded")

    monkeypatch.setattr(models, "download_pretrained", unreachable)
    with pytest.raises(ModelUnavailableError) as caught:
        models.load_model("ViT-B-16")
    assert "ViT-B-16 (openai)" in str(caught.value)
    assert "pretrained=PATH" in str(caught.value)
    assert "HTTPS" not in str(caught.value)
    assert caught.value.__suppress_context__


class _Silent:
    """A hub that cannot be reached, and counts how often that was tried."""

    tried = 0

    def head(self, *_, **__):
        self.tried += 1
        raise OSError("no route to host")

    request = get = stream = send = head


def test_a_hub_out_of_reach_is_asked_once(monkeypatch, tmp_path):
    silent = _Silent()
    monkeypatch.setattr(hub, "get_session", lambda: silent)
    monkeypatch.setattr(hub.hub, "HF_HUB_OFFLINE", False)
    sleeps = []
    monkeypatch.setattr("time.sleep", sleeps.append)
    modes = []

    def download(settings, cache_dir):
        modes.append(hub.hub.HF_HUB_OFFLINE)
        return open_clip.pretrained.download_pretrained(settings, cache_dir=cache_dir)

    monkeypatch.setattr(models, "download_pretrained", download)
    with pytest.raises(ModelUnavailableError, match="cannot be reached"):
        models.load_model("ViT-B-16", cache_dir=str(tmp_path))
    assert (silent.tried, modes, sleeps) == (1, [True], [])
    assert hub.hub.HF_HUB_OFFLINE is False


def test_a_hub_that_answers_at_all_is_used(monkeypatch, tmp_path):
    class Answering:
        def head(self, *_, **__):
            return "an error 401, say"

    modes = []

    def download(*_, **__):
        modes.append(hub.hub.HF_HUB_OFFLINE)

    monkeypatch.setattr(hub, "get_session", Answering)
    monkeypatch.setattr(hub.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "download_pretrained", download)
    with pytest.raises(ModelUnavailableError):
        models.load_model("ViT-B-16", cache_dir=str(tmp_path))
    assert modes == [False]


def test_local_files_never_ask_the_hub(monkeypatch, state, tmp_path):
    silent = _Silent()
    monkeypatch.setattr(hub, "get_session", lambda: silent)
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    models.load_model(NAME, str(file), device="cpu")
    assert silent.tried == 0


def test_openai_weights_get_quick_gelu(monkeypatch, state, tmp_path):
    # The tag says so even where the plain name does not.
    assert models.get_pretrained_cfg("ViT-B-16", "openai")["quick_gelu"]
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["openai"])
    monkeypatch.setattr(models, "get_pretrained_cfg", lambda *_: {"quick_gelu": True})
    monkeypatch.setattr(models, "download_pretrained", lambda *_, **__: str(file))
    loaded = models.load_model(NAME, "openai")
    block = loaded.model.visual.transformer.resblocks[0]
    assert type(block.mlp.gelu).__name__ == "QuickGELU"


def test_the_embedded_model_is_what_was_shipped(monkeypatch, tmp_path):
    assert tiny.checksum_holds()
    assert tiny.weights_path().stat().st_size < 32 * 2**20
    damaged = tmp_path / "tiny.safetensors"
    damaged.write_bytes(tiny.weights_path().read_bytes()[:-1] + b"\x00")
    damaged.with_suffix(".sha256").write_text(
        tiny.weights_path().with_suffix(".sha256").read_text()
    )
    monkeypatch.setattr(tiny, "_WEIGHTS", damaged)
    with pytest.raises(ModelUnavailableError, match="are damaged"):
        tiny.load()
    monkeypatch.setattr(tiny, "_WEIGHTS", tmp_path / "gone.safetensors")
    with pytest.raises(ModelUnavailableError, match="are missing"):
        tiny.load()
