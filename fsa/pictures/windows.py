"""Sliding windows over a picture, and how their logits become one map again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fsa.pictures.resizing import upsampled_rows


@dataclass(frozen=True)
class Window:
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )

    def of(self, image: Tensor) -> Tensor:
        """This part (...,height,width) of a picture (...,H,W)."""
        rows, columns = self.slices
        return image[..., rows, columns]


def plan(height: int, width: int, window: int, stride: int) -> list[Window]:
    """The windows that cover a picture, row by row.

    All have the same size: `window` on a side, or the picture's where that is smaller. The last
    ones of a row and of a column are shifted back inside, as the published protocols do.

    Args:
        height, width: of the picture.
        window: side of a window.
        stride: from one window to the next, at most `window`.
    """
    window_height, window_width = min(window, height), min(window, width)
    return [
        Window(top, left, window_height, window_width)
        for top in _starts(height, window_height, stride)
        for left in _starts(width, window_width, stride)
    ]


def _starts(length: int, window: int, stride: int) -> list[int]:
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(count)]


def pad_to_multiple(images: Tensor, multiple: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Zeros around pictures (B,3,H,W), half on each side, up to a multiple of (rows, columns).

    Returns:
        The padded pictures, and (top, left) of the picture in them.
    """
    rows = -images.shape[-2] % multiple[0]
    columns = -images.shape[-1] % multiple[1]
    top, left = rows // 2, columns // 2
    if rows or columns:
        images = functional.pad(images, (left, columns - left, top, rows - top))
    return images, (top, left)


@dataclass(frozen=True)
class GridMap:
    """What was computed of a window, on the model's coarse grid of patches.

    Attributes:
        values: (C,rows,columns), of the window padded to whole patches.
        padded: height and width of the padded window in pixels.
        corner: where the window begins in it, (top, left).
        size: height and width of the window in pixels.
    """

    values: Tensor
    padded: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    def whole(self) -> Tensor:
        """The map (C,h,w) at the window's size."""
        return self._inside(slice(0, self.padded[0]))[:, self.corner[0] :][:, : self.size[0]]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1 of it, (C,last - first,w), without the others."""
        return self._inside(slice(self.corner[0] + first, self.corner[0] + last))

    def to(self, device: torch.device | str) -> GridMap:
        """The same on a device."""
        return replace(self, values=self.values.to(device))

    def _inside(self, rows: slice) -> Tensor:
        left = self.corner[1]
        return upsampled_rows(self.values, self.padded, rows)[..., left : left + self.size[1]]


class WindowMerger:
    """The average of overlapping windows' logits.

    Args:
        channels, height, width: of the whole map.
        device: where it is kept, in float32.
    """

    def __init__(self, channels: int, height: int, width: int, device: torch.device) -> None:
        self._sum = torch.zeros((channels, height, width), device=device)
        self._count = torch.zeros((height, width), device=device)

    def add(self, window: Window, logits: Tensor) -> None:
        """Adds the logits (C,h,w) of a window of that size."""
        rows, columns = window.slices
        self._sum[:, rows, columns] += logits
        self._count[rows, columns] += 1

    def mean(self) -> Tensor:
        """The merged map (C,H,W); every pixel must be covered, and nothing is added afterwards."""
        # In place: of large pictures and many classes there is no memory for a second map.
        return self._sum.div_(self._count)
