"""Positional embeddings off the trained grid: as the published code of the hosts resizes them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional

from fsa.models import guides
from fsa.models.tower import PUBLISHED_OFFSET, Tower, _traced_resize, resized_positions
from tests.support.towers import random_tower

GRIDS = [(21, 21), (14, 14), (3, 5), (28, 20), (1, 2)]


def embeddings(rows, columns, prefix=1):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(prefix + rows * columns, 6, generator=generator)


def published(positions, trained, grid):
    """As DINO's, SCLIP's, ClearCLIP's, ProxyCLIP's, NACLIP's and FSA's towers do it."""
    if grid == trained:
        return positions
    maps = positions[1:].reshape(1, *trained, -1).permute(0, 3, 1, 2)
    factors = [(new + 0.1) / old for new, old in zip(grid, trained, strict=True)]
    resized = functional.interpolate(maps, scale_factor=tuple(factors), mode="bicubic")
    assert tuple(resized.shape[-2:]) == grid
    return torch.cat([positions[:1], resized[0].flatten(1).T])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("trained", [(14, 14), (3, 4)])
def test_the_published_offset_is_the_default(trained, grid):
    positions = embeddings(*trained)
    assert torch.equal(
        resized_positions(positions, trained, grid, 1), published(positions, trained, grid)
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_a_compiler_traces_the_same_numbers(grid):
    trained = (14, 14)
    positions = embeddings(*trained, prefix=0)
    traced = _traced_resize(positions, trained, grid, PUBLISHED_OFFSET)
    expected = resized_positions(positions, trained, grid, 0)
    if grid == trained:
        assert torch.equal(traced, expected)
    # A weight is a cubic of a place that is rounded in another order.
    torch.testing.assert_close(traced, expected, rtol=0, atol=2e-5)


def test_the_tower_does_it():
    visual = random_tower()
    images = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    expected = published(visual.positional_embedding, (4, 4), (5, 7))
    assert torch.equal(Tower(visual)._positions((5, 7)), expected)
    assert Tower(visual).trunk(images).shape == (1, 36, 24)


# Small models with a class token, as DINO and MAE have it.
@pytest.mark.parametrize(
    ("name", "sizes"), [("dino", {"scale_factor": (3.1 / 14, 5.1 / 14)}), ("mae", {"size": (3, 5)})]
)
def test_dino_and_mae_do_not_smooth_as_timm_does(name, sizes, monkeypatch):
    known = guides._Known(
        "vit_tiny_patch16_224", position_offset=guides._KNOWN[name].position_offset
    )
    monkeypatch.setitem(guides._KNOWN, name, known)
    one = (1.0, 1.0, 1.0)
    guide = guides.load_vfm(name, tower=Tower(random_tower()), mean=one, std=one, pretrained=False)
    torch.nn.init.normal_(guide.model.pos_embed, generator=torch.Generator().manual_seed(0))
    images = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(1))

    def resample(positions, *, new_size, old_size, num_prefix_tokens):
        assert (tuple(new_size), num_prefix_tokens) == ((3, 5), 1)
        maps = positions[:, 1:].unflatten(1, tuple(old_size)).permute(0, 3, 1, 2)
        maps = functional.interpolate(maps, mode="bicubic", **sizes)
        return torch.cat([positions[:, :1], maps.flatten(2).mT], dim=1)

    cfg = guide.model.pretrained_cfg
    own_mean, own_std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    own = (images + 1 - own_mean) / own_std
    smoothed = guide.model.forward_features(own)[:, 1:]
    monkeypatch.setattr(timm.models.vision_transformer, "resample_abs_pos_embed", resample)
    expected = guide.model.forward_features(own)[:, 1:]
    features = guide(images).flatten(2).mT
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert (features - smoothed).abs().max() > 0.1
