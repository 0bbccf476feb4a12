"""Maps of classes refined by the colours of the picture: PAMR."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

DILATIONS = (8, 16)
"""Distances in pixels at which a pixel has its neighbours; SCLIP's and NACLIP's."""

# Against a division by zero, and how sharply unlike colours part (Araslanov & Roth's values).
_FLOOR, _SHARPNESS = 1e-8, 0.1
_DIRECTIONS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


def pixel_adaptive_refinement(
    maps: Tensor, image: Tensor, steps: int, dilations: tuple[int, ...] = DILATIONS
) -> Tensor:
    """Each pixel's values become those of its neighbours, weighted by how like their colours are.

    Pixel-adaptive mask refinement, PAMR (Araslanov & Roth, CVPR 2020, section 3.3): at every
    distance a pixel has eight neighbours, of which a neighbour counts by softmax of
    -|x_i - x_j| / (0.1 sigma_i), averaged over the channels, where sigma_i is the deviation of the
    channel over the pixel and its neighbours. The edge of the picture goes on beyond it.

    Args:
        maps: (Q,H,W) float32, one of each class.
        image: (3,H,W) float32, normalised.
        steps: how many times; each carries values one neighbourhood further.
        dilations: distances in pixels.

    Returns:
        (Q,H,W) float32.
    """
    weights = _weights(image, dilations)
    for _ in range(steps):
        refined = torch.zeros_like(maps)
        for weight, values in zip(weights, _neighbours(maps, dilations), strict=True):
            refined.addcmul_(values, weight)
        maps = refined
    return maps


def _weights(image: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """(neighbours,H,W), which sum to 1 over the neighbours."""
    around = torch.stack(list(_neighbours(image, dilations)))
    # The pixel itself belongs to the square of every distance.
    squares = torch.cat([around, image.expand(len(dilations), *image.shape)])
    spread = squares.std(dim=0)
    distances = (around - image).abs() / (_FLOOR + _SHARPNESS * spread)
    return (-distances.mean(dim=1)).softmax(dim=0)


def _neighbours(maps: Tensor, dilations: tuple[int, ...]) -> Iterator[Tensor]:
    """Maps (Q,H,W) as seen from each pixel in one direction after the other, views (Q,H,W)."""
    height, width = maps.shape[-2:]
    for distance in dilations:
        padded = functional.pad(maps[None], [distance] * 4, mode="replicate")[0]
        for y, x in _DIRECTIONS:
            top, left = distance * (1 + y), distance * (1 + x)
            yield padded[:, top : top + height, left : left + width]
