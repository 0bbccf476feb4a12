"""Maps of classes refined by the colours of the picture: PAMR, and PEARL's propagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

DILATIONS = (8, 16)
"""Distances in pixels at which a pixel has its neighbours; SCLIP's and NACLIP's."""

# Against a division by zero, and how sharply unlike colours part (Araslanov & Roth's values).
_FLOOR, _SHARPNESS = 1e-8, 0.1
# PEARL's values: the temperature of the similarities between texts, how much more a text is like
# itself, how sharply edges of the picture part, and the confidence that every cell has at least.
_TEXT_TEMPERATURE, _SELF_SIMILARITY = 0.5, 10.0
_EDGE_SHARPNESS, _LEAST_CONFIDENCE = 5.0, 0.05
_SOLVER_STEPS = 25
_SMALL, _SMALLEST = 1e-6, 1e-12
_LUMINANCE = (0.299, 0.587, 0.114)

_DIRECTIONS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


def pixel_adaptive_refinement(
    maps: Tensor, image: Tensor, steps: int, dilations: tuple[int, ...] = DILATIONS
) -> Tensor:
    """Each pixel's values become those of its neighbours, weighted by how like their colours are.

    Pixel-adaptive mask refinement, PAMR (Araslanov & Roth, CVPR 2020, section 3.3): at every
    distance a pixel has eight neighbours, of which a neighbour counts by softmax of
    -abs(x_i - x_j) / (0.1 sigma_i), averaged over the channels, where sigma_i is the deviation of
    the channel over the pixel and its neighbours. The edge of the picture goes on beyond it.

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


def text_aware_propagation(maps: Tensor, image: Tensor, text_features: Tensor, grid: int) -> Tensor:
    """Spreads the maps of classes over the picture, up to its edges: PEARL's second step.

    "Text-aware Laplacian propagation" (Pei et al., CVPR 2026), as the published code has it. The
    picture is divided into cells, about `grid` rows and columns of them. Of the maps' means over
    cells Z_0, the probabilities of a cell are p_i = softmax(Z_0i) over the maps. Z solves

        (T + L) Z = T Z_0

    by 25 steps of conjugate gradients from Z_0, with one step length for all maps. T is diagonal
    and says how far a cell is trusted, T_ii = max(p_i, 0.05)^2 (1 + sum_q s_q p_iq^2) with the
    largest of p_i. L is the Laplacian of the graph that joins each cell to its four neighbours,
    with weights min(1, exp(-5 abs(g_i - g_j) / m) (1 + sum_q s_q p_iq p_jq)), where g is luminance
    and m the mean of abs(g_i - g_j) in that direction. s_q is the share that a text has of its own
    row in the similarities of texts, (softmax_r(t_q . t_r / 0.5)_q + 10) / 11; of these
    similarities the published code uses nothing else.

    Args:
        maps: (Q,H,W) float32, one of each text, such as cosines.
        image: (3,H,W) float32, normalised.
        text_features: (Q,E), of any length.
        grid: how many rows and columns of cells are aimed at; a cell has round(H / grid) by
            round(W / grid) pixels, at least one. Pixels beyond the last whole cell are left out of
            the means, and the solution is stretched over them.

    Returns:
        (Q,H,W) float32.
    """
    size = maps.shape[-2:]
    cell = [max(1, round(side / grid)) for side in size]
    start, picture = (functional.avg_pool2d(x[None], cell)[0] for x in (maps, image))
    probabilities = start.softmax(dim=0)
    similarity = _self_similarity(text_features)[:, None, None]
    luminance = sum(share * channel for share, channel in zip(_LUMINANCE, picture, strict=True))
    assert isinstance(luminance, Tensor)
    weights = [
        _edge_weights(luminance, probabilities, similarity, dimension) for dimension in (-2, -1)
    ]
    agreement = (similarity * probabilities.square()).sum(dim=0).clamp(0, 1)
    confidence = probabilities.amax(dim=0).clamp_min(_LEAST_CONFIDENCE)
    trust = confidence.square() * (1 + agreement)

    def apply(z: Tensor) -> Tensor:
        result = trust * z
        for dimension, weight in zip((-2, -1), weights, strict=True):
            flow = weight * z.diff(dim=dimension)
            before, after = (
                result.narrow(dimension, first, flow.shape[dimension]) for first in (0, 1)
            )
            before -= flow
            after += flow
        return result

    solution = _conjugate_gradients(apply, trust * start, start)
    if cell == [1, 1]:
        return solution
    return functional.interpolate(solution[None], size=size, mode="bilinear")[0]


def _self_similarity(text_features: Tensor) -> Tensor:
    """s (Q,) of texts (Q,E)."""
    unit = functional.normalize(text_features.float(), dim=-1)
    own = (unit @ unit.T / _TEXT_TEMPERATURE).softmax(dim=-1).diagonal()
    return (own + _SELF_SIMILARITY) / (1 + _SELF_SIMILARITY + _SMALL)


def _edge_weights(
    luminance: Tensor, probabilities: Tensor, similarity: Tensor, dimension: int
) -> Tensor:
    """Weights between neighbours along a dimension, which has one entry less."""
    difference = luminance.diff(dim=dimension).abs()
    alike = (-_EDGE_SHARPNESS * difference / (difference.mean() + _SMALL)).exp()
    count = difference.shape[dimension]
    before, after = (probabilities.narrow(dimension, first, count) for first in (0, 1))
    agreement = (similarity * before * after).sum(dim=0).clamp(0, 1)
    return (alike * (1 + agreement)).clamp_max(1)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], target: Tensor, start: Tensor
) -> Tensor:
    """z after the published number of steps towards apply(z) = target."""
    z = start
    residual = target - apply(z)
    direction = residual
    squares = residual.square().sum()
    for _ in range(_SOLVER_STEPS):
        applied = apply(direction)
        length = squares / ((direction * applied).sum() + _SMALLEST)
        z = z + length * direction
        residual = residual - length * applied
        before, squares = squares, residual.square().sum()
        direction = residual + squares / (before + _SMALLEST) * direction
    return z
