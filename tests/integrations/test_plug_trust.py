"""A plugged tower under autocast, in a pickle, asked for gradients or without its guide; NaN."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fsa
from fsa.errors import FSAWarning, InputError
from tests.integrations.test_published import (
    EMBED,
    ClearTower,
    ProxyTower,
    SclipTower,
    pictures,
)

TOWERS = {"proxy": ProxyTower, "clear": ClearTower, "sclip": SclipTower}


def plugged(kind, **options):
    images, text, features = pictures(1, torch.float32)
    tower = TOWERS[kind]()
    arguments = {"ex_feats": features} if kind == "proxy" else {}
    if kind == "sclip":
        arguments = {"return_all": True}
    fsa.plug_in(tower, text, **options)
    return tower, images, arguments


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FSAWarning)
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TOWERS)
def test_under_autocast_the_last_block_runs_in_the_type_of_the_weights(kind, dtype):
    tower, images, arguments = plugged(kind)
    expected = tower(images, **arguments)
    handed_over = []
    adapted = tower.custom_attn._adapted

    def remember(attn_layer, x, bound):
        result = adapted(attn_layer, x, bound)
        handed_over.append((x.dtype, result.dtype))
        return result

    tower.custom_attn._adapted = remember
    with torch.autocast("cpu", dtype=dtype):
        result = tower(images, **arguments)
    assert handed_over == [(torch.float32, torch.float32)]
    # The tower's own blocks before it ran in half precision.
    error = (result.float() - expected).norm() / expected.norm()
    assert error < (5e-2 if dtype == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_plugged_tower_is_copied_with_its_plug(kind, copied):
    tower, images, arguments = plugged(kind, config=fsa.FSAConfig(beta=1.5))
    expected = tower(images, **arguments)
    again = copied(tower)
    assert again.custom_attn.visual is again
    assert torch.equal(again(images, **arguments), expected)
    # Of its own: what one is told, the other does not hear.
    fsa.unplug(again)
    assert torch.equal(tower(images, **arguments), expected)
    plain = again(images, **arguments)
    assert not torch.equal(plain, expected)
    fsa.unplug(tower)
    assert torch.equal(tower(images, **arguments), plain)


@pytest.mark.parametrize("kind", TOWERS)
def test_gradients_that_are_lost_are_warned_of(kind):
    tower, images, arguments = plugged(kind)
    tower.requires_grad_(True)
    with pytest.warns(FSAWarning, match="asked for gradients"):
        tower(images, **arguments)
    with torch.no_grad():
        tower(images, **arguments)


def test_gradients_flow_through_calls_that_go_to_the_original():
    tower, images, _ = plugged("sclip")
    x, block = tower.trunk(images)
    x = x.detach().requires_grad_(True)
    tower.custom_attn(block.attn, x, return_attn=True).sum().backward()
    assert x.grad is not None


class PublishedProxyTower(ProxyTower):
    """As the published one does, it runs its last block as trained where no guide is given."""

    def forward(self, x, ex_feats=None):
        if ex_feats is not None:
            return super().forward(x, ex_feats)
        x, block = self.trunk(x)
        return self.embed(block(x)[1:])


def test_a_proxyclip_tower_without_its_guide_is_warned_of():
    images, text, features = pictures(1, torch.float32)
    tower = PublishedProxyTower()
    fsa.plug_in(tower, text)
    tower(images, features)
    with pytest.warns(FSAWarning, match="no feedback: .* needs the features of another model"):
        tower(images)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_text_features_of_another_type_are_refused(dtype):
    with pytest.raises(InputError, match=f"floating point; they have shape .* and type {dtype}"):
        fsa.plug_in(ProxyTower(), torch.ones(3, EMBED).to(dtype))


def published_inputs(B=2, N=9, C=4, heads=2, width=8):
    generator = torch.Generator().manual_seed(3)
    layer = nn.MultiheadAttention(width, heads).double().requires_grad_(False)
    return {
        "patch_probs": torch.randn(B, N, C, generator=generator, dtype=torch.float64),
        "uni_probs": torch.randn(B, N, C, generator=generator, dtype=torch.float64),
        "attn_layer": layer,
        "v": torch.randn(B * heads, N, width // heads, generator=generator, dtype=torch.float64),
        "attn_weights_orig": torch.rand(
            B * heads, N, N, generator=generator, dtype=torch.float64
        ).softmax(dim=-1),
        "lamda": 3.0,
    }


@pytest.mark.parametrize("shared_uniform", [False, True])
def test_a_patch_that_is_similar_to_none_does_not_stop_the_published_run(shared_uniform):
    inputs = published_inputs()
    if shared_uniform:
        inputs["uni_probs"] = inputs["uni_probs"][:, :1]
    whole = fsa.published_feedback(**inputs)
    lost, kept = [2, 7], [0, 1, 3, 4, 5, 6, 8]
    # As the published code has it: such a row of the attention is NaN, and so are its logits.
    broken = {
        key: value.clone() if key != "attn_layer" and key != "lamda" else value
        for key, value in inputs.items()
    }
    broken["patch_probs"][1, lost] = float("nan")
    broken["attn_weights_orig"][2:, lost] = float("nan")
    with pytest.warns(FSAWarning, match="2 of 18 patches have logits of NaN or inf"):
        result = fsa.published_feedback(**broken)
    assert result.isfinite().all()
    # The other image is what it was; the patches attend to themselves.
    assert torch.allclose(result[:, 0], whole[:, 0], atol=1e-12)
    layer = inputs["attn_layer"]
    own = layer.out_proj(inputs["v"].unflatten(0, (2, 2))[1].transpose(0, 1).flatten(1))
    assert torch.allclose(result[lost, 1], own[lost], atol=1e-12)
    # The others are as if those were not there to be attended to by feedback.
    uniform = inputs["uni_probs"][1:]
    uniform = uniform if shared_uniform else uniform[:, kept]
    feedback = torch.zeros(9, 9, dtype=torch.float64)
    part = fsa.feedback_attention(inputs["patch_probs"][1:, kept], uniform)[0]
    feedback[torch.tensor(kept)[:, None], kept] = part
    feedback[lost, lost] = 1
    attention = inputs["attn_weights_orig"][2:].clone()
    attention[:, lost] = 0
    attention[:, lost, lost] = 1
    value = inputs["v"][2:]
    adapted = (feedback @ attention + attention @ feedback + feedback) @ value / 3
    expected = layer.out_proj(adapted.transpose(0, 1).flatten(1))
    assert torch.allclose(result[kept, 1], expected[kept], atol=1e-12)


def test_an_image_of_lost_patches_alone_is_itself():
    inputs = published_inputs(B=1)
    inputs["patch_probs"][:] = float("nan")
    inputs["attn_weights_orig"][:] = float("nan")
    with pytest.warns(FSAWarning, match="9 of 9"):
        assert fsa.published_feedback(**inputs).isfinite().all()
