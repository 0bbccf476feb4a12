"""Working sizes: how pictures are resized and cut, and what is taken where nothing is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fsa.arguments import integer_within
from fsa.pictures.reading import Picture
from fsa.pictures.resizing import resized_rows
from fsa.pictures.windows import Window

LARGEST_SIDE = 16384
"""Of a resized picture, in pixels."""


@dataclass(frozen=True)
class Sizes:
    """In pixels.

    Attributes:
        short_side: to which pictures are resized.
        window: side of the sliding window.
        stride: from one window to the next.
    """

    short_side: int
    window: int
    stride: int

    def override(
        self, window: int | None, stride: int | None, short_side: int | None, patch: int
    ) -> Sizes:
        """These sizes with those that are not None in their place.

        Args:
            window, stride, short_side: a smaller window takes a smaller default stride with it.
            patch: the larger side of a patch; nothing may be smaller.

        Raises:
            InputError: a size that is not accepted.
        """
        window = self.window if window is None else window
        window = integer_within("window", window, patch, LARGEST_SIDE)
        stride = min(self.stride, window) if stride is None else stride
        short_side = self.short_side if short_side is None else short_side
        return Sizes(
            short_side=integer_within("short_side", short_side, patch, LARGEST_SIDE),
            window=window,
            stride=integer_within("stride", stride, 1, window),
        )


# The papers' window of 336 with a stride of 112 for CLIP. The embedded model was trained on crops
# and small scenes, and sees best through small windows (measured on `fsa.tiny.compose.VALIDATION`).
PAPER_SIZES = Sizes(short_side=336, window=336, stride=112)
TINY_SIZES = Sizes(short_side=224, window=112, stride=56)


# Above this many entries of a picture or of what it is resized to, it is never whole in float32.
_WHOLE_ENTRIES = 1 << 26


def working_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(h,w) of a picture of `size` (H,W) with this short side."""
    scale = short_side / min(size)
    rows, columns = (min(LARGEST_SIDE, max(1, round(side * scale))) for side in size)
    return rows, columns


def resized(picture: Picture, short_side: int, device: torch.device) -> Tensor:
    """The picture with this short side, (3,h,w) float32 in [0, 1] on the device."""
    own = (picture.rgb.shape[-2], picture.rgb.shape[-1])
    size = working_size(own, short_side)
    image = picture.rgb.to(device).float()[None].div_(255)
    if size != own:
        image = functional.interpolate(image, size=size, mode="bilinear", antialias=True)
    return image[0]


class WorkingPicture:
    """A picture resized and normalised: as a whole, or of a large one the rows of a window.

    Args:
        picture: what was read.
        short_side: to which it is resized.
        normalise: (3,h,w) in [0, 1] -> (3,h,w).
        device: where it is computed.
    """

    def __init__(
        self,
        picture: Picture,
        short_side: int,
        normalise: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.size = working_size((picture.rgb.shape[-2], picture.rgb.shape[-1]), short_side)
        self._picture, self._normalise, self._device = picture, normalise, device
        entries = max(picture.rgb.numel(), 3 * self.size[0] * self.size[1])
        # The rows that were made last, and the number of the first: windows come row by row.
        self._first, self._rows = 0, torch.empty((3, 0, 0))
        if entries <= _WHOLE_ENTRIES:
            self._rows = normalise(resized(picture, short_side, device))

    def crop(self, window: Window) -> Tensor:
        """A window of it, (3,h,w)."""
        top, bottom = window.top, window.top + window.height
        if top < self._first or bottom > self._first + self._rows.shape[1]:
            rows = resized_rows(self._picture.rgb, self.size, slice(top, bottom), self._device)
            self._first, self._rows = top, self._normalise(rows)
        return self._rows[
            :, top - self._first : bottom - self._first, window.left : window.left + window.width
        ]
