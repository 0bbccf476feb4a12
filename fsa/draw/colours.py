"""Colours of classes, and of values from low to high."""

from __future__ import annotations

import colorsys

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart, with a dark grey for their
# black, which is lost on a picture's shadows.
_FIRST_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (90, 90, 90),
)
_GOLDEN_TURN = 0.618033988749895
# The colour map cividis (Nunez, Anderton and Renslow, 2018), made for colour-blind readers.
_HEAT = ((0, 34, 78), (62, 81, 107), (124, 123, 120), (187, 173, 108), (254, 232, 56))


def palette(count: int) -> np.ndarray:
    """(count,3) uint8 colours, the same for the same index whatever the count.

    The first eight are safe for colour-blind readers; later ones turn around the colour wheel in
    three depths.
    """
    colours = list(_FIRST_COLOURS[:count])
    for i in range(count - len(colours)):
        hue = (0.08 + i * _GOLDEN_TURN) % 1.0
        saturation, value = ((0.75, 0.85), (0.45, 0.95), (0.85, 0.55))[i % 3]
        colours.append(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value)))
    return np.array(colours, dtype=np.uint8).reshape(count, 3)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours (...,3) uint8 of values in [0, 1], from dark blue to yellow."""
    places = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, places, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
