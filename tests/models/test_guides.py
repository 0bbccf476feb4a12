"""Proxy models: grids, statistics, files, and what goes wrong."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer

from fsa import InputError, ModelUnavailableError, hosts
from fsa.models import guides as vfm
from fsa.models.tower import Tower

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
# Small models in the place of the real ones, which take seconds and hundreds of megabytes.
SMALL = {
    "dino": "vit_tiny_patch16_224",
    "dinov2": "vit_little_patch16_reg4_gap_256",
    "dinov3": "vit_small_patch16_dinov3_qkvb",
    "mae": "vit_tiny_patch16_224",
    "pe-spatial": "vit_pe_spatial_tiny_patch16_512",
}


@pytest.fixture(scope="module")
def tower():
    return Tower(VisionTransformer(32, 8, 24, 4, 3, 2.0, output_dim=16).eval())


@pytest.fixture
def small(monkeypatch):
    for name, timm_name in SMALL.items():
        offset = vfm._KNOWN[name].position_offset
        monkeypatch.setitem(vfm._KNOWN, name, vfm._Known(timm_name, position_offset=offset))


def load(name, tower, **options):
    return vfm.load_vfm(name, tower=tower, mean=MEAN, std=STD, **{"pretrained": False, **options})


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 80)])
def test_features_are_the_normed_patch_tokens(name, height, width, tower, small):
    model = load(name, tower)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    features = model(images)
    rows, columns = height // 16, width // 16
    assert features.shape == (2, model.model.num_features, rows, columns)
    pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    cfg = model.model.pretrained_cfg
    own_mean, own_std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    if vfm._KNOWN[name].position_offset is not None:
        # Elsewhere: tests/models/test_positions.py.
        torch.nn.init.zeros_(model.model.pos_embed)
        features = model(images)
    tokens = model.model.forward_features((pixels - own_mean) / own_std)
    patches = tokens[:, model.model.num_prefix_tokens :]
    assert patches.shape[1] == rows * columns
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), patches, rtol=1e-3, atol=1e-4)


def test_dinov3_gives_patches_alone_and_knows_where_they_are(tower, small):
    model = load("dinov3", tower)
    assert model.model.num_prefix_tokens == 5  # A class token and four registers.
    for name, parameter in model.model.named_parameters():
        if "gamma" in name:  # Untrained layer scale all but switches the blocks off.
            parameter.fill_(1)
    images = torch.zeros(1, 3, 48, 80)
    images[..., :16, :16] = 1
    features = model(images)
    assert features.shape == (1, 384, 3, 5)
    # Of two equal patches only the rotary positions tell which is nearer to the other one.
    assert not torch.allclose(features[..., 0, 1], features[..., 2, 4], atol=1e-5)


needs_radio = pytest.mark.skipif(
    not timm.is_model(vfm._KNOWN["c-radio"].timm_name), reason="this timm has no C-RADIO"
)


@needs_radio
def test_radio_gives_patches_alone(tower, monkeypatch):
    assert timm.is_model_pretrained(vfm._KNOWN["c-radio"].timm_name)
    create = functools.partial(timm.create_model, depth=2, embed_dim=48, num_heads=3)
    monkeypatch.setattr(vfm.timm, "create_model", create)
    model = load("c-radio", tower)
    assert model.model.num_prefix_tokens == 8
    with torch.no_grad():
        model.model.embeds.proj.weight.normal_()
    images = torch.zeros(1, 3, 48, 80)
    images[..., 16:32, 64:] = 1
    blank, features = model(torch.zeros(1, 3, 48, 80)), model(images)
    assert features.shape == (1, 48, 3, 5)
    # The patch that differs is where the picture differs.
    difference = (features - blank).norm(dim=1)[0]
    assert divmod(int(difference.argmax()), 5) == (1, 4)


def test_a_timm_without_the_model_is_told(tower, monkeypatch):
    monkeypatch.setitem(vfm._KNOWN, "dino", vfm._Known("vit_of_tomorrow.dino"))
    with pytest.raises(InputError, match=r"has no vit_of_tomorrow.dino; a newer one does"):
        load("dino", tower)


def test_the_names_are_models_of_timm():
    for name, known in vfm._KNOWN.items():
        assert name == "c-radio" or timm.is_model_pretrained(known.timm_name)
    assert vfm._KNOWN["sam"].side == 1024


def test_sam_resizes_and_gives_a_map(tower, monkeypatch):
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.patch_embed = torch.nn.Conv2d(3, 4, 16)
            self.patch_embed.patch_size = (16, 16)
            self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

        def forward_features(self, x):
            assert x.shape[-2:] == (1024, 1024)
            return x.new_ones(len(x), 5, 64, 64)

    monkeypatch.setattr(vfm.timm, "create_model", lambda *_, **__: Encoder())
    model = load("sam", tower)
    assert model.multiple == 1
    assert model(torch.randn(1, 3, 40, 24)).shape == (1, 5, 64, 64)


def test_a_size_that_does_not_fit_is_refused_in_words(tower, small):
    model = load("dino", tower)
    assert model.multiple == 16
    with pytest.raises(InputError, match="dino needs multiples of 16"):
        model(torch.randn(1, 3, 40, 32))


@pytest.mark.parametrize(("name", "layer"), [("layer", 2), ("layer:1", 1), ("layer:0", 0)])
def test_a_layer_of_clip_itself(name, layer, tower):
    model = load(name, tower)
    images = torch.randn(1, 3, 24, 40)
    assert torch.equal(model(images), tower.layer_features(images, layer))
    assert model.name == f"layer:{layer}"


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_layer_and_the_trunk_run_every_block_once(layer, batch_first, count_calls):
    tower = Tower(VisionTransformer(32, 8, 24, 4, 3, 2.0, output_dim=16).eval())
    tower.visual.transformer.batch_first = batch_first
    for block in tower.visual.transformer.resblocks:
        block.attn.batch_first = batch_first
    images = torch.randn(2, 3, 24, 40)
    model = load(f"layer:{layer}", tower)
    calls = count_calls(tower.visual.transformer.resblocks)
    features, tokens = model.with_trunk(images, tower)
    assert calls == [0, 1, 2]
    assert torch.equal(features, model(images))
    assert torch.equal(tokens, tower.trunk(images))


def test_only_a_layer_of_the_same_clip_brings_the_trunk(tower, small):
    images = torch.randn(1, 3, 16, 32)
    other = Tower(VisionTransformer(32, 8, 24, 4, 3, 2.0, output_dim=16).eval())
    for model in (load("dino", tower), load("layer", other)):
        features, tokens = model.with_trunk(images, tower)
        assert torch.equal(features, model(images))
        assert tokens is None
    # Two towers opened on one model are the same.
    assert load("layer", Tower(tower.visual)).with_trunk(images, tower)[1] is not None


def test_tokens_of_other_images_are_refused_in_words(tower):
    host = hosts.build("clearclip", tower)
    images, text = torch.randn(2, 3, 24, 40), torch.randn(5, 16)
    tokens = tower.trunk(images)
    assert torch.equal(host.features(images, text, tokens=tokens), host.features(images, text))
    for wrong in (tokens[:1], tokens[:, 1:], tokens[..., 1:], tokens[0]):
        with pytest.raises(InputError, match="tokens must have shape"):
            host.features(images, text, tokens=wrong)


def test_any_callable_serves(tower):
    def own_guide(images):
        return images[:, :, ::8, ::8]

    model = load(own_guide, tower)
    assert model.name == "own_guide"
    assert model(torch.randn(1, 3, 16, 32)).shape == (1, 3, 2, 4)
    for wrong in (lambda x: x[0], lambda x: None, lambda x: x.repeat(2, 1, 1, 1)):
        with pytest.raises(InputError, match="must return features"):
            load(wrong, tower)(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_local_files_are_read(suffix, tower, small, tmp_path):
    from safetensors.torch import save_file

    state = timm.create_model(SMALL["dino"], num_classes=0).state_dict()
    state["norm.bias"] += 1
    file = tmp_path / f"dino{suffix}"
    if suffix == ".pt":
        torch.save({"model": {**state, "decoder": torch.zeros(1)}}, file)
    else:
        save_file(state, file)
    model = load("dino", tower, pretrained=str(file))
    assert torch.equal(model.model.norm.bias, state["norm.bias"])


def test_wrong_files_are_refused_by_name(tower, small, tmp_path):
    file = tmp_path / "x.pt"
    with pytest.raises(ModelUnavailableError, match=r"x\.pt': no such file"):
        load("dino", tower, pretrained=str(file))
    file.write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"x\.pt: this is not a checkpoint"):
        load("dino", tower, pretrained=str(file))
    torch.save({"norm.bias": torch.zeros(3)}, file)
    with pytest.raises(InputError, match=r"x\.pt: this checkpoint does not fit"):
        load("dino", tower, pretrained=str(file))


@pytest.mark.parametrize("name", ["sift", "layer:4", "layer:x", 3, None])
def test_unknown_models_are_refused_in_words(name, tower):
    with pytest.raises(InputError, match="vfm"):
        load(name, tower)


def test_a_hub_out_of_reach_is_said_in_words(tower, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Max retries exceeded")

    monkeypatch.setattr(vfm.timm, "create_model", unreachable)
    with pytest.raises(ModelUnavailableError, match="vfm_pretrained=PATH"):
        load("dino", tower, pretrained=None)
