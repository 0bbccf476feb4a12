"""Labels of one picture, made while the cosines of its windows come."""

from __future__ import annotations

import torch
from torch import Tensor

from fsa.errors import NotFiniteError
from fsa.pictures.resizing import source_rows
from fsa.pictures.windows import GridMap, Window, WindowMerger
from fsa.segment.cosines import Cosines, WholeCosines, WindowedCosines, full_size_strips
from fsa.segment.labels import Choice, require_finite, strip_entries

# Cosines of more entries at the working size are merged strip by strip, on the CPU from 256 MiB on
# in float32, on a GPU from 1 GiB on.
_WHOLE_ENTRIES = 1 << 26
_WHOLE_ENTRIES_GPU = 1 << 28
# Of the coarse maps that are kept so that probabilities can be asked for: 1 GiB.
_KEPT_ENTRIES = 1 << 28


class GrowingLabels:
    """Merges windows as they come, whole or strip by strip, and labels the picture.

    Strip by strip, only the coarse maps of the windows that reach below the last labelled row are
    needed, and the rows that are being labelled.

    Args:
        choice: how a pixel gets its label.
        working: (h,w), which the windows cover.
        size: (H,W) of the picture.
        windows: how many will come.
        device: where their cosines are.
    """

    def __init__(
        self,
        choice: Choice,
        working: tuple[int, int],
        size: tuple[int, int],
        windows: int,
        device: torch.device,
    ) -> None:
        self._choice, self._working, self._size = choice, working, size
        self._windows, self._device = windows, device
        queries, on_gpu = len(choice.queries.features), device.type == "cuda"
        entries = queries * working[0] * working[1]
        self._merger: WindowMerger | None = None
        if entries <= (_WHOLE_ENTRIES_GPU if on_gpu else _WHOLE_ENTRIES):
            self._merger = WindowMerger(queries, *working, device)
        else:
            self._labels = torch.empty(size, dtype=torch.int32, device=device)
            self._labelled = 0
            self._finite = torch.ones((), dtype=torch.bool, device=device)
            self._upper, self._lower, _ = source_rows(working[0], size[0], slice(0, size[0]))
            self._parts: list[tuple[Window, GridMap]] = []
            self._kept: list[tuple[Window, GridMap]] | None = None

    def add(self, window: Window, maps: GridMap) -> None:
        """Adds a window; they come in the order of `fsa.pictures.windows.plan`."""
        if self._merger is not None:
            self._merger.add(window, maps.whole())
            return
        if not self._parts and maps.values.numel() * self._windows <= _KEPT_ENTRIES:
            self._kept = []
        if self._parts and window.top > self._parts[-1][0].top:
            self._label_above(window.top)
        self._parts.append((window, maps))
        if self._kept is not None:
            self._kept.append((window, maps))

    def finish(self) -> tuple[Tensor, Cosines | None]:
        """The labels (H,W) int32, and the cosines where they could be kept.

        Raises:
            NotFiniteError: cosines with NaN or inf, whose labels mean nothing.
        """
        if self._merger is not None:
            cosines = self._merger.mean()
            labels = self._choice.label_map(cosines, self._size)
            require_finite(cosines)
            return labels, WholeCosines(cosines)
        self._label_above(self._working[0])
        if not bool(self._finite):
            raise NotFiniteError("the cosines hold NaN or inf")
        if self._kept is None:
            return self._labels, None
        return self._labels, WindowedCosines(self._working, self._kept)

    def _label_above(self, row: int) -> None:
        """Labels the rows whose cosines no window from a row of the working size on changes."""
        stop = int(torch.searchsorted(self._lower, row))
        if stop > self._labelled:
            merged = WindowedCosines(self._working, self._parts)
            rows = slice(self._labelled, stop)
            entries = strip_entries(self._device.type == "cuda")
            for strip, maps in full_size_strips(merged, self._size, rows, entries):
                self._labels[strip] = self._choice.labels(maps)
                self._finite &= torch.stack(maps.aminmax()).isfinite().all()
            self._labelled = stop
        if stop < self._size[0]:
            needed = int(self._upper[stop])
            self._parts = [
                (window, maps)
                for window, maps in self._parts
                if window.top + window.height > needed
            ]
