"""Working sizes: how pictures are resized and cut, and what is taken where nothing is said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fsa.arguments import integer_within
from fsa.pictures.reading import Picture

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


def resized(picture: Picture, short_side: int, device: torch.device) -> Tensor:
    """The picture with this short side, (3,h,w) float32 in [0, 1] on the device."""
    height, width = picture.rgb.shape[-2:]
    scale = short_side / min(height, width)
    size = tuple(min(LARGEST_SIDE, max(1, round(side * scale))) for side in (height, width))
    image = picture.rgb.to(device).float()[None] / 255
    if size != (height, width):
        image = functional.interpolate(image, size=size, mode="bilinear", antialias=True)
    return image[0]
