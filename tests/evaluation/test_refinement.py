"""PAMR, against the published module of NACLIP (and SCLIP, the same), and PEARL's propagation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fsa.evaluation.refinement import (
    DILATIONS,
    pixel_adaptive_refinement,
    text_aware_propagation,
)
from tests.support.accuracy import VECTORS

with np.load(VECTORS / "pamr.npz") as stored:
    PUBLISHED = dict(stored)
with np.load(VECTORS / "propagation.npz") as stored:
    PROPAGATED = dict(stored)


@pytest.mark.parametrize("case", [0, 1])
def test_the_published_vectors_come_out(case):
    image, maps, expected = (
        torch.from_numpy(PUBLISHED[f"{name}_{case}"]) for name in ("image", "maps", "refined")
    )
    dilations = tuple(PUBLISHED[f"dilations_{case}"].tolist())
    refined = pixel_adaptive_refinement(maps, image, int(PUBLISHED[f"steps_{case}"]), dilations)
    torch.testing.assert_close(refined, expected, rtol=0, atol=2e-6)
    assert (expected - maps).abs().max() > 0.1


def test_the_published_distances_are_the_default():
    assert tuple(PUBLISHED["dilations_0"].tolist()) == DILATIONS


def test_no_step_changes_nothing():
    maps = torch.rand(2, 5, 6)
    assert torch.equal(pixel_adaptive_refinement(maps, torch.rand(3, 5, 6), 0), maps)


def test_values_stay_on_their_side_of_an_edge():
    image = torch.zeros(3, 20, 40)
    image[:, :, 20:] = 1
    maps = torch.rand(1, 20, 40, generator=torch.Generator().manual_seed(0))
    maps[:, :, 20:] += 10
    refined = pixel_adaptive_refinement(maps, image, 5, (1, 2))
    assert refined[:, :, :20].max() < 1.1
    assert refined[:, :, 20:].min() > 9.9
    assert refined[:, :, :20].std() < maps[:, :, :20].std() / 2


# Maps, pictures and texts of random numbers, and what PEARL's own module made of them in float32:
# once on cells of 3 x 4 pixels, which leave out a row and a column, and once on every pixel.
@pytest.mark.parametrize("case", [0, 1])
def test_pearls_published_propagation_comes_out(case):
    image, maps, text, expected = (
        torch.from_numpy(PROPAGATED[f"{name}_{case}"]).float()
        for name in ("image", "maps", "text", "propagated")
    )
    propagated = text_aware_propagation(maps, image, text, int(PROPAGATED[f"grid_{case}"]))
    torch.testing.assert_close(propagated, expected, rtol=0, atol=1e-5 * float(maps.abs().max()))
    assert (expected - maps).abs().max() > 0.3 * maps.abs().max()


def test_classes_spread_up_to_an_edge():
    image = torch.zeros(3, 12, 24)
    image[:, :, 12:] = 1
    maps = torch.rand(2, 12, 24, generator=torch.Generator().manual_seed(0))
    maps[0, :, :12] += 3
    maps[1, :, 12:] += 3
    spread = text_aware_propagation(maps, image, torch.eye(2), 80)
    for own, side in ((0, slice(0, 12)), (1, slice(12, 24))):
        assert spread[own, :, side].std() < maps[own, :, side].std() / 2
        assert (spread[own, :, side] - spread[1 - own, :, side]).min() > 2


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 300)])
def test_pictures_of_any_shape_are_propagated(size):
    generator = torch.Generator().manual_seed(0)
    maps, image = (torch.rand(count, *size, generator=generator) for count in (4, 3))
    spread = text_aware_propagation(maps, image, torch.eye(4), 80)
    assert spread.shape == maps.shape
    assert spread.isfinite().all()
