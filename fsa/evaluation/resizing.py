"""Pictures resized exactly as the published pipelines resize them, which do it with OpenCV."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# OpenCV's weights are whole multiples of 1 / 2048.
_WEIGHT_BITS = 11


def resize(image: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """A picture (3,H,W) uint8 resized bilinearly to (3,h,w) uint8.

    Without `antialias` every value equals that of `cv2.resize` with INTER_LINEAR, with which mmcv
    resizes: whole-number arithmetic with weights of 11 bits, which cuts off where rounding would
    give one level more in about a tenth of the values.

    Args:
        image: the picture, on the CPU.
        size: (h,w).
        antialias: smooth where the picture shrinks, in floating point; no published pipeline does.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    if antialias:
        resized = functional.interpolate(
            image[None].float(), size=size, mode="bilinear", antialias=True
        )
        return resized[0].round().clamp(0, 255).to(torch.uint8)
    return torch.from_numpy(_as_opencv(image.numpy(), size))


def _as_opencv(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)` of (3,H,W) uint8."""
    height, width = image.shape[-2:]
    values = image.astype(np.int32)
    if (height, width) == (2 * size[0], 2 * size[1]):
        # For exactly half the size OpenCV takes the mean of four pixels instead.
        rows = values[:, ::2] + values[:, 1::2]
        return ((rows[:, :, ::2] + rows[:, :, 1::2] + 2) >> 2).astype(np.uint8)
    left, right, of_left, of_right = _neighbours(width, size[1], keep_edges=True)
    upper, lower, of_upper, of_lower = _neighbours(height, size[0], keep_edges=False)
    rows = (values[:, :, left] * of_left + values[:, :, right] * of_right) >> 4
    resized = (rows[:, upper] * of_upper[:, None]) >> 16
    resized += (rows[:, lower] * of_lower[:, None]) >> 16
    return ((resized + 2) >> 2).astype(np.uint8)


def _neighbours(
    length: int, new_length: int, keep_edges: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Along one axis, the two pixels that each new one lies between, and their weights in 1 / 2048.

    Args:
        length, new_length: of the axis.
        keep_edges: a pixel beyond the edge takes the last one with the whole weight, as along
            rows; otherwise it takes it twice, with both weights, as along columns.
    """
    # In the precision of each of OpenCV's steps: double for the place, float for the weight.
    scale = 1.0 / (new_length / length)
    place = ((np.arange(new_length) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    weight = place - first.astype(np.float32)
    if keep_edges:
        weight[(first < 0) | (first >= length - 1)] = 0
        first = first.clip(0, length - 1)
    one = np.float32(1 << _WEIGHT_BITS)
    of_first = np.rint((np.float32(1) - weight) * one).astype(np.int32)
    of_second = np.rint(weight * one).astype(np.int32)
    return first.clip(0, length - 1), (first + 1).clip(0, length - 1), of_first, of_second
