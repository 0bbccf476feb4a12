"""PAMR, against the published module of NACLIP (and SCLIP, the same)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fsa.evaluation.refinement import DILATIONS, pixel_adaptive_refinement
from tests.support.accuracy import VECTORS

with np.load(VECTORS / "pamr.npz") as stored:
    PUBLISHED = dict(stored)


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
