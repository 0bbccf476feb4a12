"""Loading without random weights first: the same model, to the bit, and still all of it."""

from __future__ import annotations

import itertools

import open_clip
import pytest
import torch
from torch import nn

from fsa import InputError
from fsa.models.initialisation import without_random_weights
from fsa.models.loading import load_model
from tests.support.towers import SMALL_CLIP

NAME = "small-clip"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, SMALL_CLIP)
    torch.manual_seed(0)
    model = open_clip.create_model(NAME).eval()
    file = tmp_path / "small.pt"
    torch.save(model.state_dict(), file)
    return model, file


def test_every_parameter_and_buffer_is_that_of_a_model_made_as_always(checkpoint, monkeypatch):
    expected, file = checkpoint
    # Memory that nobody wrote to holds NaN here, so that what is missed shows.
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *size, **options: (
            made.fill_(torch.nan) if (made := empty(*size, **options)).is_floating_point() else made
        ),
    )
    loaded = load_model(NAME, str(file), device="cpu").model
    everything = [
        dict(itertools.chain(model.named_parameters(), model.named_buffers()))
        for model in (expected, loaded)
    ]
    assert everything[0].keys() == everything[1].keys()
    # A buffer that is no part of the checkpoint is made, not loaded.
    assert "attn_mask" in everything[0].keys() - expected.state_dict().keys()
    for name, tensor in everything[0].items():
        assert torch.equal(tensor, everything[1][name]), name


def test_a_checkpoint_that_lacks_a_weight_is_still_refused(checkpoint):
    model, file = checkpoint
    weights = model.state_dict()
    del weights["visual.proj"]
    torch.save(weights, file)
    with pytest.raises(InputError, match=r"does not fit small-clip. It lacks visual\.proj"):
        load_model(NAME, str(file), device="cpu")


def test_weights_are_not_drawn_and_constants_are_set():
    tensor = torch.full((3, 4), 7.0)
    with without_random_weights():
        for fill in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            assert fill(tensor) is tensor
        assert nn.init.kaiming_uniform_(tensor=tensor) is tensor
        assert (tensor == 7).all()
        assert nn.LayerNorm(4).weight.tolist() == [1, 1, 1, 1]
        assert nn.init.zeros_(tensor).sum() == 0
    assert nn.init.normal_(tensor).std() > 0


# The second is drawn again and again until all lie in the bounds.
@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-1.0, 1.0), (2.0, 4.0)])
@pytest.mark.parametrize("shape", [(300, 301), (1 << 14,), (1 << 15,), (7,)])
def test_what_others_draw_is_random_still_and_ends(shape, bounds):
    tensor = torch.full(shape, torch.nan)
    with without_random_weights():
        nn.init.trunc_normal_(tensor, a=bounds[0], b=bounds[1])
    assert (tensor >= bounds[0]).all()
    assert (tensor <= bounds[1]).all()
    assert tensor.unique().numel() > min(tensor.numel(), 1000) // 2


@pytest.mark.parametrize("draw", [torch.Tensor.uniform_, torch.Tensor.normal_])
def test_every_entry_is_drawn(draw):
    for tensor in (torch.full((40000,), torch.nan), torch.full((300, 200), torch.nan).T):
        with without_random_weights():
            assert draw(tensor, 3.0, 4.0) is tensor
        assert tensor.isfinite().all()
        assert abs(float(tensor.mean()) - 3.25) < 0.5
