"""Colours of classes, and of values from low to high."""

from __future__ import annotations

from functools import lru_cache

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
# The matrices of OKLab.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
# The colour map cividis (Nunez, Anderton and Renslow, 2018), made for colour-blind readers.
_HEAT = ((0, 34, 78), (62, 81, 107), (124, 123, 120), (187, 173, 108), (254, 232, 56))


# Later colours are chosen out of this many levels of each channel, ...
_LEVELS = 18
# ... neither dark nor pale nor grey, as a picture in grey is itself (lightness and chroma, OKLab).
_LIGHTNESS = (0.4, 0.93)
_LEAST_CHROMA = 0.05


def palette(count: int) -> np.ndarray:
    """(count,3) uint8 colours, the same for the same index whatever the count.

    The first eight are safe for colour-blind readers; each later one is as far from all before it
    as can be, by the distance that eyes see (OKLab, Ottosson 2020).
    """
    first = np.array(_FIRST_COLOURS, dtype=np.uint8)
    if count <= len(first):
        return first[:count]
    # In steps, so that the colours of a few counts are found once.
    return _spread(-(-count // 64) * 64)[:count].copy()


def colours_of_classes(areas: np.ndarray) -> np.ndarray:
    """Colours (C,3) uint8 of the classes of a picture, by how much of it (C,) each covers.

    Up to eight classes keep the colours of their numbers in every picture. Of more, those that
    cover most get the colours that are easiest to tell apart.
    """
    count = len(areas)
    if count <= len(_FIRST_COLOURS):
        return palette(count)
    colours = np.empty((count, 3), np.uint8)
    colours[np.argsort(-areas, kind="stable")] = palette(count)
    return colours


@lru_cache(maxsize=8)
def _spread(count: int) -> np.ndarray:
    """Colours (count,3) uint8, after the first eight each the farthest from those before it."""
    levels = np.linspace(0, 255, _LEVELS).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(candidates)
    chroma = np.hypot(places[:, 1], places[:, 2])
    usable = (places[:, 0] > _LIGHTNESS[0]) & (places[:, 0] < _LIGHTNESS[1])
    usable &= chroma > _LEAST_CHROMA
    candidates, places = candidates[usable], places[usable]
    chosen = [np.array(colour, np.float64) for colour in _FIRST_COLOURS]
    nearest = np.full(len(places), np.inf)
    for place in _oklab(np.array(chosen)):
        nearest = np.minimum(nearest, np.linalg.norm(places - place, axis=1))
    while len(chosen) < count:
        # Of more classes than there are candidates the last share a colour.
        farthest = int(nearest.argmax())
        chosen.append(candidates[farthest])
        nearest = np.minimum(nearest, np.linalg.norm(places - places[farthest], axis=1))
    return np.array(chosen).astype(np.uint8)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (n,3) from 0 to 255 -> lightness, green to red, blue to yellow (n,3)."""
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ _TO_CONES.T)
    return cones @ _TO_LAB.T


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours (...,3) uint8 of values in [0, 1], from dark blue to yellow."""
    places = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, places, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
