from __future__ import annotations

import pytest
import torch

from fsa.pictures.windows import WindowMerger, pad_to_multiple, plan


@pytest.mark.parametrize(
    ("size", "window", "stride", "count"),
    [
        ((336, 448), 336, 112, 2),
        ((448, 896), 224, 80, 40),
        ((224, 224), 224, 112, 1),
        ((100, 50), 224, 112, 1),
        ((225, 224), 224, 112, 2),
        ((1, 1), 16, 16, 1),
    ],
)
def test_windows_cover_the_picture_with_one_size(size, window, stride, count):
    parts = plan(*size, window, stride)
    assert len(parts) == count
    covered = torch.zeros(size)
    for part in parts:
        assert (part.height, part.width) == (min(window, size[0]), min(window, size[1]))
        assert covered[part.slices].shape == (part.height, part.width)
        covered[part.slices] += 1
    assert (covered > 0).all()


def test_the_last_windows_are_shifted_back_inside():
    lefts = [part.left for part in plan(224, 300, 224, 60)]
    assert lefts == [0, 60, 76]


def test_padding_is_zero_half_on_each_side_and_only_where_needed():
    images = torch.ones(1, 3, 30, 33)
    padded, (top, left) = pad_to_multiple(images, (16, 14))
    assert padded.shape == (1, 3, 32, 42)
    assert (top, left) == (1, 4)
    assert padded.sum() == images.sum()
    assert (padded[..., top : top + 30, left : left + 33] == 1).all()
    same, offset = pad_to_multiple(torch.ones(1, 3, 32, 28), (16, 14))
    assert same.shape == (1, 3, 32, 28)
    assert offset == (0, 0)


def test_overlaps_are_averaged():
    merger = WindowMerger(1, 4, 6, torch.device("cpu"))
    for value, part in zip((1.0, 3.0), plan(4, 6, 4, 2), strict=True):
        merger.add(part, torch.full((1, part.height, part.width), value))
    assert merger.mean()[0, 0].tolist() == [1, 1, 2, 2, 3, 3]
