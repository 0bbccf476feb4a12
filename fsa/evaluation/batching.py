"""Pictures through a segmentor: windows of several in one forward pass, or each in one piece."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fsa.models.text import TextQueries
from fsa.pictures import windows
from fsa.segment.segmentor import Segmentor


def merged_cosines(
    segmentor: Segmentor,
    images: Iterable[tuple[int, Tensor]],
    queries: TextQueries,
    window: int,
    stride: int,
    window_batch: int,
) -> Iterator[tuple[int, Tensor]]:
    """Cosines of each picture, averaged over its windows, in the order of the pictures.

    A batch is filled with the next windows of the same size, whichever picture they are of. So
    one map or two are in memory at a time, however small the pictures are.

    Args:
        segmentor: what computes.
        images: pairs of a key and a picture (3,h,w), normalised, on the model's device.
        queries: what to compare with.
        window, stride: in pixels.
        window_batch: windows per forward pass.

    Yields:
        The key and (Q,h,w) float32.
    """
    waiting: list[tuple[int, Tensor, windows.Window, bool]] = []
    merger: windows.WindowMerger | None = None

    def flush() -> Iterator[tuple[int, Tensor]]:
        nonlocal merger
        crops = torch.stack([part.of(image) for _, image, part, _ in waiting])
        maps = segmentor.window_cosines(crops, queries)
        for (key, image, part, last), cosines in zip(waiting, maps, strict=True):
            if merger is None:
                height, width = image.shape[-2:]
                merger = windows.WindowMerger(len(queries.features), height, width, image.device)
            merger.add(part, cosines)
            if last:
                merged, merger = merger.mean(), None
                yield key, merged
        waiting.clear()

    for key, image in images:
        parts = windows.plan(image.shape[-2], image.shape[-1], window, stride)
        for part in parts:
            if waiting and (waiting[0][2].height, waiting[0][2].width) != (part.height, part.width):
                yield from flush()
            waiting.append((key, image, part, part is parts[-1]))
            if len(waiting) == window_batch:
                yield from flush()
    if waiting:
        yield from flush()


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
