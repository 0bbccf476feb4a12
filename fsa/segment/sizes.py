"""Working sizes: how pictures are resized and cut, and what is taken where nothing is said."""

from __future__ import annotations

from dataclasses import dataclass

from fsa.arguments import integer_within

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
