"""Pictures through a segmentor: windows of several in one forward pass, or each in one piece."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from fsa.errors import FSAError, named_out_of_memory
from fsa.models.text import TextQueries
from fsa.pictures import windows
from fsa.pictures.windows import GridMap, Window

if TYPE_CHECKING:
    from fsa.segment.segmentor import Segmentor

Key = TypeVar("Key", bound=Hashable)


class Croppable(Protocol):
    """A picture at its working size, of which windows can be asked for."""

    @property
    def size(self) -> tuple[int, int]:
        """(h,w)."""

    def crop(self, window: Window) -> Tensor:
        """A window of it (3,h,w), normalised, on the model's device."""


@dataclass(frozen=True)
class InMemory:
    """A picture (3,h,w) that is normalised and on the model's device as a whole."""

    image: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]

    def crop(self, window: Window) -> Tensor:
        return window.of(self.image)


@dataclass(frozen=True)
class WindowMap(Generic[Key]):
    """What was computed of a window.

    Attributes:
        key: of its picture.
        window: where it lies.
        last: whether it is the last one of its picture.
        maps: its cosines.
    """

    key: Key
    window: Window
    last: bool
    maps: GridMap


def window_maps(
    segmentor: Segmentor,
    pictures: Iterable[tuple[Key, Croppable]],
    queries: TextQueries,
    window: int,
    stride: int,
    window_batch: int,
    failed: dict[Key, FSAError] | None = None,
) -> Iterator[WindowMap[Key]]:
    """Cosines of the windows of pictures, window by window, in the order of the pictures.

    A batch is filled with the next windows of the same size, whichever picture they are of.

    Args:
        segmentor: what computes.
        pictures: pairs of a key and a picture.
        queries: what to compare with.
        window, stride: in pixels.
        window_batch: windows per forward pass.
        failed: where errors are put by the key of the picture; the rest of that picture is left
            out. Without it they are raised.

    Raises:
        OutOfMemoryError, NotFiniteError: of a batch, where `failed` is None.
    """
    what = f"windows of {window} pixels, {window_batch} at once, on {segmentor.loaded.device}"
    waiting: list[tuple[Key, Croppable, Window, bool]] = []

    def computed(entries: list[tuple[Key, Croppable, Window, bool]]) -> list[WindowMap[Key]]:
        # Not around what yields: the caller's code must not run in inference mode.
        memory = named_out_of_memory(what, "lower window_batch, window or short_side")
        with torch.inference_mode(), memory:
            crops = torch.stack([picture.crop(part) for _, picture, part, _ in entries])
            maps = segmentor.window_cosines(crops, queries)
        return [
            WindowMap(key, part, last, found)
            for (key, _, part, last), found in zip(entries, maps, strict=True)
        ]

    def flush() -> Iterator[WindowMap[Key]]:
        entries = waiting.copy()
        waiting.clear()
        if failed is None:
            yield from computed(entries)
            return
        try:
            found = computed(entries)
        except FSAError as error:
            if len({key for key, *_ in entries}) == 1:
                failed[entries[0][0]] = error
                return
        else:
            yield from found
            return
        # Which of them it was shows by itself.
        for _, own in groupby(entries, key=lambda entry: entry[0]):
            waiting.extend(own)
            yield from flush()

    for key, picture in pictures:
        parts = windows.plan(*picture.size, window, stride)
        for part in parts:
            if failed and key in failed:
                break
            if waiting and (waiting[0][2].height, waiting[0][2].width) != (part.height, part.width):
                yield from flush()
            waiting.append((key, picture, part, part is parts[-1]))
            if len(waiting) == window_batch:
                yield from flush()
    if waiting:
        yield from flush()


def merged_cosines(
    segmentor: Segmentor,
    images: Iterable[tuple[int, Tensor]],
    queries: TextQueries,
    window: int,
    stride: int,
    window_batch: int,
) -> Iterator[tuple[int, Tensor]]:
    """Cosines of each picture, averaged over its windows, in the order of the pictures.

    One map or two are in memory at a time, however small the pictures are.

    Args:
        segmentor, queries, window, stride, window_batch: as `window_maps` takes them.
        images: pairs of a key and a picture (3,h,w), normalised, on the model's device.

    Yields:
        The key and (Q,h,w) float32.
    """
    sizes: dict[int, tuple[int, int]] = {}

    def opened() -> Iterator[tuple[int, InMemory]]:
        for key, image in images:
            picture = InMemory(image)
            sizes[key] = picture.size
            yield key, picture

    merger: windows.WindowMerger | None = None
    for found in window_maps(segmentor, opened(), queries, window, stride, window_batch):
        if merger is None:
            merger = windows.WindowMerger(
                len(queries.features), *sizes.pop(found.key), queries.features.device
            )
        merger.add(found.window, found.maps.whole())
        if found.last:
            merged, merger = merger.mean(), None
            yield found.key, merged


def whole_cosines(
    segmentor: Segmentor, images: Iterable[tuple[int, Tensor]], queries: TextQueries
) -> Iterator[tuple[int, Tensor]]:
    """Cosines of each picture in one piece, one picture a forward pass.

    What lies beyond the last whole patch on the right and below is left out, and the map of the
    rest is stretched over the picture, as NACLIP's published code has it.

    Args:
        segmentor, images, queries: as in `merged_cosines`.

    Yields:
        The key and (Q,h,w) float32.
    """
    of_vfm = segmentor.vfm.multiple if segmentor.vfm else 1
    multiples = [math.lcm(side, of_vfm) for side in segmentor.host.tower.patch_size]
    for key, image in images:
        rows, columns = (
            max(side - side % multiple, multiple)
            for side, multiple in zip(image.shape[-2:], multiples, strict=True)
        )
        # A picture that is smaller than a patch gets zeros where it has nothing.
        missing = (max(columns - image.shape[-1], 0), max(rows - image.shape[-2], 0))
        patches = functional.pad(image[:, :rows, :columns], (0, missing[0], 0, missing[1]))
        maps = segmentor.forward(patches[None].to(segmentor.loaded.dtype), queries.features)
        size = tuple(image.shape[-2:])
        yield key, functional.interpolate(maps, size=size, mode="bilinear")[0]
