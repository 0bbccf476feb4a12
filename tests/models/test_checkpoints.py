"""Checkpoints that would compute nonsense or something else than was meant, and models refused."""

from __future__ import annotations

import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fsa.errors import FSAWarning, InputError, ModelUnavailableError
from fsa.models import guides, loading
from fsa.models.tower import Tower
from tests.support.towers import SMALL_CLIP

NAME = "fsa-test-vit"
BLOCK_OF_OPENAI = ("attn", "ln_1", "mlp", "ln_2")


@pytest.fixture(scope="module", autouse=True)
def small_models():
    added = {NAME: SMALL_CLIP, f"{NAME}-quickgelu": {**SMALL_CLIP, "quick_gelu": True}}
    open_clip.factory._MODEL_CONFIGS.update(added)
    yield
    for name in added:
        del open_clip.factory._MODEL_CONFIGS[name]


@pytest.fixture(scope="module")
def state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.model.CLIP(**SMALL_CLIP).state_dict()


def saved(state, file):
    if file.suffix == ".safetensors":
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, file)
    else:
        torch.save(state, file)
    return str(file)


def in_openai_order(state):
    """The keys as OpenAI's code has them: in a block attention, norm, network, norm."""

    def place(key):
        head, found, rest = key.partition("resblocks.")
        if not found:
            return (0,)
        number, part = rest.split(".")[:2]
        return (1, head, int(number), BLOCK_OF_OPENAI.index(part))

    return dict(sorted(state.items(), key=lambda item: place(item[0])))


def activation(loaded):
    return type(loaded.model.visual.transformer.resblocks[0].mlp.gelu).__name__


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "inf")])
def test_a_weight_that_is_no_number_is_refused_by_file_and_tensor(
    suffix, value, word, state, tmp_path
):
    tensor = "visual.transformer.resblocks.1.ln_1.bias"
    broken = {**state, tensor: state[tensor].clone().index_fill(0, torch.tensor([3]), value)}
    file = saved(broken, tmp_path / f"broken{suffix}")
    with pytest.raises(InputError, match=rf"broken\{suffix}: the tensor {tensor} holds {word}"):
        loading.load_model(NAME, file, device="cpu")


def test_a_weight_beyond_half_precision_is_refused_there_only(state, tmp_path):
    file = saved({**state, "visual.proj": state["visual.proj"] + 1e5}, tmp_path / "large.pt")
    assert loading.load_model(NAME, file, device="cpu").dtype == torch.float32
    with pytest.raises(InputError, match=r"large\.pt: the tensor visual\.proj holds inf in"):
        loading.load_model(NAME, file, device="cpu", dtype="float16")


def test_a_guide_with_nan_is_refused(tmp_path, state, monkeypatch):
    class Model(torch.nn.Linear):
        pass

    monkeypatch.setattr(guides.timm, "create_model", lambda *_, **__: Model(2, 2))
    weights = {"weight": torch.full((2, 2), float("nan")), "bias": torch.zeros(2)}
    file = saved(weights, tmp_path / "g.pt")
    tower = Tower(open_clip.model.CLIP(**SMALL_CLIP).visual)
    with pytest.raises(InputError, match=r"g\.pt: the tensor weight holds NaN"):
        guides.load_vfm("mae", tower=tower, mean=(0,) * 3, std=(1,) * 3, pretrained=file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_from_openais_torchscript_runs_quick_gelu(suffix, state, tmp_path):
    extras = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(8),
        "vocab_size": torch.tensor(49408),
    }
    file = saved({**state, **extras}, tmp_path / f"openai{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FSAWarning)
        loaded = loading.load_model(NAME, file, device="cpu")
    assert activation(loaded) == "QuickGELU"
    assert torch.equal(loaded.model.visual.proj, state["visual.proj"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 2}])
def test_a_state_dict_that_openais_code_wrote_runs_quick_gelu(legacy, wrap, state, tmp_path):
    file = tmp_path / "openai.pt"
    torch.save(wrap(in_openai_order(state)), file, _use_new_zipfile_serialization=not legacy)
    assert activation(loading.load_model(NAME, str(file), device="cpu")) == "QuickGELU"
    # Another code's order, or a sorted one, does not tell.
    for other in (state, dict(sorted(state.items()))):
        torch.save(wrap(other), file, _use_new_zipfile_serialization=not legacy)
        assert activation(loading.load_model(NAME, str(file), device="cpu")) == "GELU"


def test_plain_gelu_for_a_file_that_may_want_quick_gelu_is_said(state, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: ["openai", "laion"])
    monkeypatch.setattr(
        loading, "get_pretrained_cfg", lambda _, tag: {"quick_gelu": tag == "openai"}
    )
    file = saved(state, tmp_path / "unknown.safetensors")
    with pytest.warns(FSAWarning, match=rf"\(openai\) pass the name {NAME}-quickgelu") as caught:
        assert activation(loading.load_model(NAME, file, device="cpu")) == "GELU"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", FSAWarning)
        loaded = loading.load_model(f"{NAME}-quickgelu", file, device="cpu")
    assert activation(loaded) == "QuickGELU"


def test_offline_openais_weights_are_asked_for_with_the_name_that_runs_them(monkeypatch):
    monkeypatch.setattr(loading, "download_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("fsa.models.hub._hub_answers", lambda: True)
    with pytest.raises(ModelUnavailableError, match="--model ViT-B-16-quickgelu --pretrained PATH"):
        loading.load_model("ViT-B-16")
    with pytest.raises(ModelUnavailableError, match="pass the file: pretrained=PATH"):
        loading.load_model("ViT-H-14")


@pytest.mark.parametrize("keys", [{"visual.proj": None}, {"new.weight": torch.zeros(2)}])
def test_what_is_missing_or_too_much_is_named(keys, state, tmp_path):
    changed = {**state, **keys}
    changed = {key: tensor for key, tensor in changed.items() if tensor is not None}
    file = saved(changed, tmp_path / "other.pt")
    with pytest.raises(InputError, match=rf"does not fit {NAME}\. It .*{next(iter(keys))}\.$"):
        loading.load_model(NAME, file, device="cpu")


@pytest.mark.parametrize("name", ["RN50", "convnext_base"])
def test_a_tower_that_no_host_takes_is_refused_before_weights_are_asked_for(name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(loading, "download_pretrained", never)
    with pytest.raises(InputError, match=f"'{name}' is not accepted: .* is not a plain") as caught:
        loading.load_model(name)
    assert "pretrained" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "first"), [("vit-b-16", "ViT-B-16"), ("VIT-l-14", "ViT-L-14"), ("Tiny", "tiny")]
)
def test_a_name_in_other_letters_is_suggested_first(name, first):
    with pytest.raises(InputError, match=rf"close to it: {first}(,|$)"):
        loading.load_model(name)


@pytest.mark.parametrize("device", ["mps", "meta", "xpu:0"])
def test_devices_that_nothing_runs_on_are_refused(device):
    with pytest.raises(InputError, match=f"device='{device}' is not accepted"):
        loading.resolve_device(device)
