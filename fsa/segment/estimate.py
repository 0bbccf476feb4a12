"""How much work pictures are, and how long it will take here."""

from __future__ import annotations

import time
from typing import Any

import torch

from fsa.classes import Classes
from fsa.pictures.windows import plan
from fsa.segment.segmentor import Segmentor
from fsa.segment.sizes import working_size

_WINDOWS_TIMED = 64


def window_count(
    segmentor: Segmentor,
    size: tuple[int, int],
    *,
    window: int | None = None,
    stride: int | None = None,
    short_side: int | None = None,
) -> int:
    """How many windows a picture of `size` (H,W) has.

    Args:
        segmentor: whose default sizes are taken.
        size: in pixels.
        window, stride, short_side: as in `Segmentor.segment`.

    Raises:
        InputError: a size that is not accepted.
    """
    sizes = segmentor.sizes(window, stride, short_side)
    return len(plan(*working_size(size, sizes.short_side), sizes.window, sizes.stride))


def seconds_per_window(
    segmentor: Segmentor,
    classes: Classes,
    *,
    window: int | None = None,
    stride: int | None = None,
    window_batch: int = 8,
    **options: Any,
) -> float:
    """How long a window takes here, labels included, measured on one batch of them.

    Args:
        segmentor: what is measured.
        classes, window, stride, window_batch, options: as in `Segmentor.segment`.

    Raises:
        InputError, OutOfMemoryError: as `Segmentor.segment`.
    """
    sizes, count = segmentor.sizes(window, stride, None), min(window_batch, _WINDOWS_TIMED)
    # As high as one window, and as wide as a batch of them.
    noise = torch.randint(0, 256, (3, sizes.window, sizes.window + (count - 1) * sizes.stride))
    picture = noise.to(torch.uint8)
    asked = {**options, "window": window, "stride": stride, "window_batch": window_batch}
    asked["short_side"] = sizes.window
    seconds = 0.0
    # The first batch sets up memory and kernels.
    for _ in range(2):
        started = time.perf_counter()
        segmentor.segment(picture, classes, **asked)
        seconds = time.perf_counter() - started
    return seconds / count
