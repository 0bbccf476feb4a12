"""Pictures read in the background, while those before them are computed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fsa.errors import FSAError, OutOfMemoryError
from fsa.pictures.reading import Picture, read_image

_THREADS = 2
_PICTURES_AHEAD = 4
# Pixels of pictures that were read and not yet taken; above it no other is begun.
_PIXELS_AHEAD = 32_000_000


def read_ahead(sources: Iterable[Any]) -> Iterator[Picture | FSAError]:
    """Reads pictures in the background, a few ahead of the one that is taken.

    Args:
        sources: as `read_image` takes them. Files are read in the background, at most four ahead,
            and none ahead of 32 megapixels that wait; what is in memory is copied at once, so that
            an array may be filled anew.

    Yields:
        Pictures in the order of the sources, or why one cannot be read.
    """
    remaining = iter(sources)
    waiting: deque[Future[Picture | FSAError]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fsa-read") as pool:
        try:
            exhausted = False
            while True:
                while not exhausted and (not waiting or _room_behind(waiting)):
                    try:
                        source = next(remaining)
                    except StopIteration:
                        exhausted = True
                        break
                    waiting.append(_begun(pool, source))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _room_behind(waiting: deque[Future[Picture | FSAError]]) -> bool:
    if len(waiting) > _PICTURES_AHEAD:
        return False
    read = (future.result() for future in waiting if future.done())
    pixels = sum(x.rgb[0].numel() for x in read if isinstance(x, Picture))
    return pixels < _PIXELS_AHEAD


def _begun(pool: ThreadPoolExecutor, source: Any) -> Future[Picture | FSAError]:
    if isinstance(source, (str, os.PathLike)):
        return pool.submit(_read, source)
    ready: Future[Picture | FSAError] = Future()
    ready.set_result(_read(source))
    return ready


def _read(source: Any) -> Picture | FSAError:
    try:
        return read_image(source)
    except FSAError as error:
        return error
    except MemoryError:
        return OutOfMemoryError(f"out of memory: {source} cannot be read")
