"""Large pictures: merged and labelled strip by strip, as if they had been whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import fsa
from fsa.errors import InputError, NotFiniteError
from fsa.pictures import resizing
from fsa.segment import cosines, growing, sizes

CLASSES = ["cat", ["dog", "hound"], "grass"]
SMALL = {"short_side": 96, "window": 48, "stride": 24}


@pytest.fixture(scope="module")
def segmentor():
    return fsa.load_segmentor(device="cpu")


@pytest.fixture
def strips(monkeypatch):
    """Takes every picture for a large one, with few rows in a block and in a strip."""
    monkeypatch.setattr(growing, "_WHOLE_ENTRIES", 0)
    monkeypatch.setattr(sizes, "_WHOLE_ENTRIES", 0)
    monkeypatch.setattr(cosines, "_BLOCK_ENTRIES", 4 * 160 * 11)
    monkeypatch.setattr("fsa.segment.labels._STRIP_ENTRIES", 4 * 160 * 3)
    monkeypatch.setattr(resizing, "_READ_ENTRIES", 3 * 160 * 17)


def noise(height, width):
    small = np.random.default_rng(height).integers(0, 255, (3, 6, 9)).astype(np.float32)
    drawn = functional.interpolate(torch.from_numpy(small)[None], size=(height, width))[0]
    return drawn.byte()


# Upsampled to the picture's size, at its own size, and made smaller.
@pytest.mark.parametrize("size", [(60, 95), (150, 96), (96, 96), (140, 333), (300, 220)])
@pytest.mark.parametrize(
    "options",
    [{}, {"prob_thd": 0.4}, {"window": 43}],
    ids=["plain", "background", "padded windows"],
)
def test_strips_give_what_the_whole_picture_gives(size, options, segmentor, request):
    picture = noise(*size)
    whole = segmentor.segment(picture, CLASSES, **{**SMALL, **options})
    request.getfixturevalue("strips")
    strips = segmentor.segment(picture, CLASSES, **{**SMALL, **options})
    assert isinstance(strips.maps.cosines, cosines.WindowedCosines)
    assert isinstance(whole.maps.cosines, cosines.WholeCosines)
    np.testing.assert_allclose(strips.scores, whole.scores, rtol=0, atol=2e-5)
    for name in ("cat", "dog"):
        of_whole, of_strips = (x.probabilities(name) for x in (whole, strips))
        assert of_whole.shape == size
        np.testing.assert_allclose(of_strips, of_whole, rtol=0, atol=2e-5)
    best, second = np.sort([whole.probabilities(i) for i in range(3)], axis=0)[[-1, -2]]
    clear = best - second > 1e-4
    if "prob_thd" in options:
        clear &= abs(best - 0.4) > 1e-4
    assert clear.mean() > 0.99
    assert np.array_equal(strips.labels[clear], whole.labels[clear])


@pytest.mark.parametrize("size", [(50, 40), (20, 30), (33, 47), (101, 40), (480, 64)])
@pytest.mark.parametrize("to", [(20, 16), (50, 75), (33, 47), (7, 300)])
def test_rows_resized_by_themselves_are_those_of_the_whole(size, to, monkeypatch):
    rgb = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    expected = functional.interpolate(
        rgb.float()[None] / 255, size=to, mode="bilinear", antialias=True
    )[0]
    for entries in (1 << 24, 3 * size[1] * 9):
        monkeypatch.setattr(resizing, "_READ_ENTRIES", entries)
        rows = [
            resizing.resized_rows(rgb, to, slice(top, min(top + 5, to[0])), torch.device("cpu"))
            for top in range(0, to[0], 5)
        ]
        torch.testing.assert_close(torch.cat(rows, dim=1), expected, rtol=0, atol=2e-6)


class LargestMap(torch.overrides.TorchFunctionMode):
    """Remembers the most entries that any function's floating-point result had."""

    entries = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.entries = max(self.entries, result.numel())
        return result


def test_no_map_of_all_pixels_is_made(segmentor, strips):
    picture = noise(400, 160)
    classes = [f"class {i}" for i in range(40)]
    segmentor.encode(classes)
    with LargestMap() as largest:
        segmentor.segment(picture, classes, short_side=160, window=48, stride=24)
    # A window's tokens, and two strips of rows; the cosines would have 40 * 400 * 160.
    assert 0 < largest.entries < 40 * 400 * 160 // 4


def test_nan_in_a_strip_is_an_error(segmentor, strips, monkeypatch):
    original = segmentor.window_cosines
    count = 0

    def damaged(crops, queries):
        nonlocal count
        count += 1
        maps = original(crops, queries)
        if count == 2:
            maps[-1].values[0, 0, 0] = torch.nan
        return maps

    monkeypatch.setattr(segmentor, "window_cosines", damaged)
    with pytest.raises(NotFiniteError, match="the picture: tiny"):
        segmentor.segment(noise(120, 200), CLASSES, **SMALL)


def test_cosines_too_large_to_keep_are_missed_in_words(segmentor, strips, monkeypatch):
    expected = segmentor.segment(noise(120, 200), CLASSES, **SMALL)
    monkeypatch.setattr(growing, "_KEPT_ENTRIES", 10)
    result = segmentor.segment(noise(120, 200), CLASSES, **SMALL)
    assert np.array_equal(result.labels, expected.labels)
    with pytest.raises(InputError, match="were not kept: choose a smaller short_side"):
        result.probabilities("cat")
    with pytest.raises(InputError, match="were not kept"):
        _ = result.scores
