"""Cosines of a picture at its working size: whole, or made row by row from those of its windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fsa.pictures.resizing import source_rows, upsampled_rows
from fsa.pictures.windows import GridMap, Window, WindowMerger

# Entries of the rows that are merged at once: 64 MiB in float32.
_BLOCK_ENTRIES = 1 << 24


class Cosines(Protocol):
    """Cosines (Q,h,w) of which rows can be asked for."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Q,h,w)."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1, (Q,last - first,w) float32."""

    def rows_at_once(self) -> int:
        """How many rows may be asked for at once without taking much memory."""

    def to(self, device: torch.device | str) -> Cosines:
        """The same on a device."""


@dataclass(frozen=True)
class WholeCosines:
    """Cosines (Q,h,w) in memory."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        queries, height, width = self.values.shape
        return queries, height, width

    def rows(self, first: int, last: int) -> Tensor:
        return self.values[:, first:last]

    def rows_at_once(self) -> int:
        return self.values.shape[1]

    def to(self, device: torch.device | str) -> WholeCosines:
        return WholeCosines(self.values.to(device))


@dataclass(frozen=True)
class WindowedCosines:
    """Cosines as the coarse maps of a picture's windows, which take little memory.

    Attributes:
        size: (h,w) of the picture at its working size.
        parts: windows and what was computed of each, from top to bottom; every pixel of the rows
            that are asked for must be covered.
    """

    size: tuple[int, int]
    parts: list[tuple[Window, GridMap]]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.parts[0][1].values), *self.size

    def rows(self, first: int, last: int) -> Tensor:
        merger = WindowMerger(
            self.shape[0], last - first, self.size[1], self.parts[0][1].values.device
        )
        for window, maps in self.parts:
            top, bottom = max(window.top, first), min(window.top + window.height, last)
            if top < bottom:
                seen = Window(top - first, window.left, bottom - top, window.width)
                merger.add(seen, maps.rows(top - window.top, bottom - window.top))
        return merger.mean()

    def rows_at_once(self) -> int:
        # Never all: the windows may not be all.
        rows = _BLOCK_ENTRIES // (self.shape[0] * self.size[1])
        return max(1, min(rows, self.size[0] - 1))

    def to(self, device: torch.device | str) -> WindowedCosines:
        return WindowedCosines(
            self.size, [(window, maps.to(device)) for window, maps in self.parts]
        )


def full_size_strips(
    cosines: Cosines, size: tuple[int, int], rows: slice, entries: int
) -> Iterator[tuple[slice, Tensor]]:
    """Cosines resized bilinearly to a picture's own size, a strip of rows at a time.

    Args:
        cosines: (Q,h,w).
        size: (H,W).
        rows: which of the H rows.
        entries: of a strip, Q times rows times the larger width.

    Yields:
        The rows of a strip, and their cosines (Q,rows,W).
    """
    queries, length, width = cosines.shape
    strip_rows = max(1, entries // (queries * max(width, size[1])))
    upper, lower = (x.numpy() for x in source_rows(length, size[0], rows)[:2])
    at_once = cosines.rows_at_once()
    first, last, block = 0, -1, None
    for top in range(rows.start, rows.stop, strip_rows):
        strip = slice(top, min(top + strip_rows, rows.stop))
        needed = int(lower[strip.stop - 1 - rows.start]) + 1
        if block is None or needed > last:
            if at_once >= length:
                first, last = 0, length
            else:
                first = int(upper[top - rows.start])
                # No further than what was asked for: windows below may not have come yet.
                last = max(needed, min(first + at_once, int(lower[-1]) + 1))
            block = cosines.rows(first, last)
        yield strip, upsampled_rows(block, size, strip, first=first, length=length)
