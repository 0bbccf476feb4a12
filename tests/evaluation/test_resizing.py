"""Pictures are resized as OpenCV resizes them, value for value."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fsa.evaluation.resizing import resize
from tests.support.accuracy import VECTORS


def picture(height: int, width: int) -> np.ndarray:
    """(H,W,3) uint8 without a smooth place, the same on every machine."""
    numbers = np.arange(height * width * 3, dtype=np.uint64) * np.uint64(2654435761)
    return ((numbers >> np.uint64(13)) & np.uint64(255)).astype(np.uint8).reshape(height, width, 3)


def resized(before: str, after: str) -> np.ndarray:
    """(h,w,3), of sizes such as "36x48"."""
    sizes = [tuple(map(int, size.split("x"))) for size in (before, after)]
    image = torch.from_numpy(picture(*sizes[0])).permute(2, 0, 1).contiguous()
    return resize(image, sizes[1]).permute(1, 2, 0).numpy()


# "36x48_34x45" holds what cv2.resize of OpenCV 4.10 and 5.0 makes of `picture(36, 48)`, and
# "sha256_375x500_336x448" the hash of its bytes for sizes of real pictures.
with np.load(VECTORS / "resized_by_opencv.npz") as stored:
    OPENCV = dict(stored)


@pytest.mark.parametrize("case", OPENCV)
def test_every_value_is_opencvs(case):
    *_, before, after = case.split("_")
    values = resized(before, after)
    if case.startswith("sha256"):
        values = np.frombuffer(hashlib.sha256(values.tobytes()).digest(), dtype=np.uint8)
    assert np.array_equal(values, OPENCV[case])


def test_a_picture_of_the_size_asked_for_stays():
    image = torch.from_numpy(picture(8, 8)).permute(2, 0, 1)
    assert torch.equal(resize(image, (8, 8)), image)


def test_only_antialiasing_smooths():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, ::4] = 255
    assert resize(image, (2, 2)).unique().tolist() == [0]
    smooth = resize(image, (2, 2), antialias=True)
    assert smooth.dtype == torch.uint8
    assert 32 < smooth.float().mean() < 96
