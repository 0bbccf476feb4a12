"""From a stream of pictures to their segmentations, windows of several pictures in one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fsa.errors import FSAError, NotFiniteError, named_out_of_memory
from fsa.models.text import TextQueries
from fsa.pictures import windows
from fsa.pictures.reading import Picture
from fsa.segment.batching import WindowMap, window_maps
from fsa.segment.growing import GrowingLabels
from fsa.segment.labels import Choice
from fsa.segment.probabilities import ClassMaps
from fsa.segment.result import Segmentation
from fsa.segment.sizes import Sizes, WorkingPicture

if TYPE_CHECKING:
    from fsa.segment.segmentor import Segmentor

WindowProgress = Callable[[int, int, int], None]
"""Called with (number of the picture from 0, its windows done, its windows in all)."""


@dataclass(frozen=True)
class Checked:
    """What the arguments of `Segmentor.segment` mean, once they are checked.

    Attributes:
        names: of the classes, with a background that was added.
        background_index: what uncertain pixels become, or None to leave them.
        sizes, window_batch: as in `Job`.
        settings: as `Segmentor.settings` returns them.
    """

    names: tuple[str, ...]
    background_index: int | None
    sizes: Sizes
    window_batch: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is done with every picture.

    Attributes:
        segmentor: what computes.
        queries: of the classes.
        names: of the classes, with a background that was added.
        sizes: in which pictures are resized and cut.
        choice: how a pixel gets its label.
        window_batch: windows per forward pass.
        settings: that are written down with a result.
        on_device: whether results stay on the device.
    """

    segmentor: Segmentor
    queries: TextQueries
    names: tuple[str, ...]
    sizes: Sizes
    choice: Choice
    window_batch: int
    settings: dict[str, Any]
    on_device: bool = False


class _Opened:
    """A picture whose windows are being computed."""

    def __init__(self, job: Job, picture: Picture) -> None:
        self._job, self._picture = job, picture
        loaded, sizes = job.segmentor.loaded, job.sizes
        self._size = (picture.rgb.shape[-2], picture.rgb.shape[-1])
        with self._named():
            self.working = WorkingPicture(
                picture, sizes.short_side, job.segmentor.normalise, loaded.device
            )
            self.windows = len(windows.plan(*self.working.size, sizes.window, sizes.stride))
            self._labels = GrowingLabels(
                job.choice, self.working.size, self._size, self.windows, loaded.device
            )
        self.done = 0

    def add(self, found: WindowMap[int]) -> None:
        with self._named():
            self._labels.add(found.window, found.maps)
        self.done += 1

    def finish(self, seconds: Callable[[], float]) -> Segmentation:
        job = self._job
        with self._named():
            labels, cosines = self._labels.finish()
            maps = ClassMaps(cosines, job.queries, job.choice.scale, self._size)
            if not job.on_device:
                # Waits for the device, so that the time is the whole one.
                labels, maps = labels.cpu(), maps.to("cpu")
        settings = {**job.settings, "seconds": round(seconds(), 3)}
        return Segmentation(labels, maps, list(job.names), settings, self._picture)

    def named(self, error: FSAError) -> FSAError:
        """An error of a batch, with the picture's name."""
        if isinstance(error, NotFiniteError):
            return self._job.segmentor.loaded.not_finite(self._picture.label)
        return error

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Around what computes: inference mode, and errors in words."""
        rows, columns = self._size
        what = f"a picture of {columns} x {rows} pixels resized to a short side of "
        what += f"{self._job.sizes.short_side}"
        memory = named_out_of_memory(what, "lower short_side")
        with torch.inference_mode(), memory, self._job.segmentor.loaded.naming(self._picture.label):
            yield


def _opened(job: Job, picture: Picture) -> _Opened | FSAError:
    try:
        return _Opened(job, picture)
    except FSAError as error:
        return error


def segmentations(
    job: Job,
    pictures: Iterable[Picture | FSAError],
    *,
    progress: WindowProgress | None = None,
    started: float | None = None,
) -> Iterator[Segmentation | FSAError]:
    """The segmentation of each picture, in their order, or the error that it failed with.

    Args:
        job: what is done with each.
        pictures: errors among them go to their place in what is yielded.
        progress: as `WindowProgress`.
        started: from when on the seconds of the first picture are counted, by `perf_counter`;
            default from now on. Those of others are counted from the result before.
    """
    opened: dict[int, _Opened] = {}
    finished: dict[int, Segmentation | FSAError] = {}
    failed: dict[int, FSAError] = {}
    before = time.perf_counter() if started is None else started
    following = 0

    def working() -> Iterator[tuple[int, WorkingPicture]]:
        for number, picture in enumerate(pictures):
            begun = picture if isinstance(picture, FSAError) else _opened(job, picture)
            if isinstance(begun, FSAError):
                finished[number] = begun
            else:
                opened[number] = begun
                yield number, begun.working

    def seconds() -> float:
        nonlocal before
        past, before = before, time.perf_counter()
        return before - past

    def settled() -> Iterator[Segmentation | FSAError]:
        """The results that no picture before them is missing for."""
        nonlocal following
        for number in failed.keys() & opened.keys():
            finished[number] = opened.pop(number).named(failed[number])
        while following in finished:
            yield finished.pop(following)
            following += 1

    sizes = job.sizes
    for found in window_maps(
        job.segmentor,
        working(),
        job.queries,
        sizes.window,
        sizes.stride,
        job.window_batch,
        failed,
    ):
        picture = opened.get(found.key)
        # Of a picture that failed in the meantime.
        if picture is None:
            continue
        try:
            picture.add(found)
            if progress is not None:
                progress(found.key, picture.done, picture.windows)
            if found.last:
                finished[found.key] = picture.finish(seconds)
                del opened[found.key]
        except FSAError as error:
            failed[found.key] = error
        yield from settled()
    yield from settled()
