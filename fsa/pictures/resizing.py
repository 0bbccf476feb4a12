"""Bilinear resizing of which only some rows are computed, so that nothing large is ever whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Entries of a picture that are read at once: 64 MiB in float32.
_READ_ENTRIES = 1 << 24


def source_rows(
    length: int, into: int, rows: slice, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows fall between those of a map that is resized bilinearly.

    Args:
        length: rows of the map.
        into: rows that it is resized to.
        rows: which of those.
        device: of the result.

    Returns:
        For each row: the row of the map above it, the one below it, both int64, and the weight of
        the one below, float32.
    """
    centre = (torch.arange(rows.start, rows.stop, device=device) + 0.5) * (length / into) - 0.5
    centre = centre.clamp(0, length - 1)
    upper = centre.floor().long()
    lower = (upper + 1).clamp(max=length - 1)
    return upper, lower, (centre - upper).float()


def upsampled_rows(
    maps: Tensor, size: tuple[int, int], rows: slice, *, first: int = 0, length: int | None = None
) -> Tensor:
    """Rows of maps resized bilinearly to `size`, as `torch.nn.functional.interpolate` does it.

    Args:
        maps: (...,h,w), or of its rows those that are needed.
        size: (H,W).
        rows: which of the H rows.
        first: the number of the first row in `maps`.
        length: h where `maps` does not hold all rows.

    Returns:
        (...,rows,W).
    """
    length = maps.shape[-2] if length is None else length
    if size == (length, maps.shape[-1]):
        return maps[..., rows.start - first : rows.stop - first, :]
    leading = maps.shape[:-2]
    maps = maps.reshape(1, -1, *maps.shape[-2:])
    if rows == slice(0, size[0]) and maps.shape[-2] == length:
        resized = functional.interpolate(maps, size=size, mode="bilinear")
    else:
        upper, lower, weight = source_rows(length, size[0], rows, maps.device)
        weight = weight.to(maps.dtype)[:, None]
        mixed = maps[:, :, upper - first] * (1 - weight) + maps[:, :, lower - first] * weight
        resized = functional.interpolate(mixed, size=(len(upper), size[1]), mode="bilinear")
    return resized.reshape(*leading, *resized.shape[-2:])


def resized_rows(rgb: Tensor, size: tuple[int, int], rows: slice, device: torch.device) -> Tensor:
    """Rows of a picture resized bilinearly, smoothed where it becomes smaller.

    What `torch.nn.functional.interpolate` does with antialias=True, without the whole picture in
    floating point.

    Args:
        rgb: (3,H,W) uint8.
        size: (h,w).
        rows: which of the h rows.
        device: where they are computed.

    Returns:
        (3,rows,w) float32 in [0, 1].
    """
    if size == tuple(rgb.shape[-2:]):
        return rgb[:, rows].to(device).float().div_(255)
    height, width = rgb.shape[-2:]
    # In single precision as there, where a row of a large picture falls is rounded alike.
    scale = float(torch.tensor(height, dtype=torch.float32) / size[0])
    # A triangle as wide as two rows of the larger picture reaches this far.
    support = max(scale, 1.0)
    at_once = max(1, int((_READ_ENTRIES / (3 * width) - 2 * support) / scale))
    parts = []
    for top in range(rows.start, rows.stop, at_once):
        centre = scale * (torch.arange(top, min(top + at_once, rows.stop)) + 0.5)
        lowest = max(int(centre[0] - support + 0.5), 0)
        highest = min(int(centre[-1] + support + 0.5), height)
        inside = torch.arange(lowest, highest) + 0.5
        weights = (1 - (inside - centre[:, None]).abs() / support).clamp(min=0)
        weights /= weights.sum(dim=1, keepdim=True)
        read = rgb[:, lowest:highest].to(device).float().div_(255)
        narrow = functional.interpolate(
            read[None], size=(highest - lowest, size[1]), mode="bilinear", antialias=True
        )[0]
        parts.append(weights.to(device) @ narrow)
    return torch.cat(parts, dim=1)
