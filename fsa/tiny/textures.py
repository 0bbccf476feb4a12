"""The grounds of scenes, drawn from noise: grass, water, sky and others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from fsa.tiny.vocabulary import TEXTURES

BANK_SIDE = 512
BANK_TILES = 6


@lru_cache(maxsize=4)
def texture_bank(seed: int) -> np.ndarray:
    """Large tiles of every texture, (textures, tiles, 3, side, side) uint8; not to be changed."""
    bank = []
    for index, entry in enumerate(TEXTURES):
        rng = np.random.default_rng((seed, 7919, index))
        draw = _TEXTURE_FUNCTIONS[entry.name]
        tiles = [draw(rng, BANK_SIDE) for _ in range(BANK_TILES)]
        bank.append([np.clip(tile, 0, 255).astype(np.uint8) for tile in tiles])
    return np.ascontiguousarray(np.asarray(bank).transpose(0, 1, 4, 2, 3))


def _noise(
    rng: np.random.Generator, side: int, cells: tuple[int, int], octaves: int = 4
) -> np.ndarray:
    """Smooth noise about 0, (side, side), of `cells` (rows, columns) and finer octaves."""
    total = np.zeros((side, side), dtype=np.float32)
    for octave in range(octaves):
        rows, columns = (min(side, count << octave) for count in cells)
        coarse = rng.standard_normal((rows, columns)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        total += np.asarray(smooth) / (1 << octave)
    return total / 1.6


def _shaded(colour: Sequence[float] | np.ndarray, noise: np.ndarray, depth: float) -> np.ndarray:
    base = np.asarray(colour, dtype=np.float32)
    return base * (1 + depth * noise[..., None])


def _grass(rng: np.random.Generator, side: int) -> np.ndarray:
    blades = _noise(rng, side, (24, 96), 3)
    patches = _noise(rng, side, (4, 4), 3)
    colour = (70 + rng.uniform(-15, 25), 140 + rng.uniform(-25, 25), 45 + rng.uniform(-15, 15))
    return _shaded(colour, blades, 0.28) * (1 + 0.12 * patches[..., None])


def _water(rng: np.random.Generator, side: int) -> np.ndarray:
    ripples = np.sin(_noise(rng, side, (40, 5), 2) * 3)
    colour = (35 + rng.uniform(-15, 20), 105 + rng.uniform(-20, 25), 170 + rng.uniform(-25, 30))
    tile = _shaded(colour, ripples, 0.16)
    return tile + 60 * (ripples > 0.93)[..., None]


def _sky(rng: np.random.Generator, side: int) -> np.ndarray:
    clouds = np.clip(_noise(rng, side, (3, 5), 5) * 0.8, 0, 1)[..., None]
    blue = np.array((110, 170, 235), dtype=np.float32) * rng.uniform(0.85, 1.05)
    fade = np.linspace(0.9, 1.1, side, dtype=np.float32)[:, None, None]
    return blue * fade * (1 - clouds) + 245 * clouds


def _sand(rng: np.random.Generator, side: int) -> np.ndarray:
    dunes = np.sin(_noise(rng, side, (14, 4), 2) * 2.5)
    grain = rng.standard_normal((side, side)).astype(np.float32)
    colour = (220 + rng.uniform(-20, 15), 190 + rng.uniform(-20, 15), 130 + rng.uniform(-25, 20))
    return _shaded(colour, dunes, 0.07) * (1 + 0.05 * grain[..., None])


def _brick(rng: np.random.Generator, side: int) -> np.ndarray:
    height = int(rng.integers(14, 24))
    width = int(height * rng.uniform(2.0, 2.6))
    rows, columns = np.indices((side, side))
    course = rows // height
    shifted = columns + (course % 2) * (width // 2)
    mortar = (rows % height < 2) | (shifted % width < 2)
    tones = rng.uniform(0.8, 1.15, size=(side // height + 2, side // width + 3))
    colour = np.array((165, 75, 55), dtype=np.float32) * rng.uniform(0.85, 1.15, size=3)
    tile = colour * tones[course, shifted // width][..., None]
    tile *= 1 + 0.08 * _noise(rng, side, (64, 64), 2)[..., None]
    return np.where(mortar[..., None], 195.0, tile)


def _wood(rng: np.random.Generator, side: int) -> np.ndarray:
    plank = int(rng.integers(36, 64))
    columns = np.indices((side, side))[1]
    grain = np.sin(_noise(rng, side, (3, 40), 3) * 4)
    tones = rng.uniform(0.85, 1.12, size=side // plank + 1)[columns // plank]
    colour = np.array((150, 100, 55), dtype=np.float32) * rng.uniform(0.85, 1.2)
    tile = _shaded(colour, grain, 0.12) * tones[..., None]
    return np.where((columns % plank < 2)[..., None], tile * 0.5, tile)


def _snow(rng: np.random.Generator, side: int) -> np.ndarray:
    drifts = _noise(rng, side, (5, 3), 4)
    sparkle = rng.random((side, side)) > 0.995
    tile = _shaded((232, 238, 247), drifts, 0.05)
    return tile + 25 * sparkle[..., None]


def _stone(rng: np.random.Generator, side: int) -> np.ndarray:
    """Cobbles: cells around jittered points, dark at the joints."""
    step = int(rng.integers(22, 34))
    count = side // step + 3
    grid = np.stack(np.meshgrid(np.arange(count), np.arange(count), indexing="ij"), axis=-1) - 1
    points = (grid + rng.uniform(0.15, 0.85, size=grid.shape)) * step
    tones = rng.uniform(0.7, 1.15, size=(count, count))
    rows, columns = np.indices((side, side))
    nearest = np.full((side, side), np.inf)
    second = nearest.copy()
    tone = np.zeros((side, side))
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            i, j = rows // step + 1 + down, columns // step + 1 + right
            distance = np.hypot(rows - points[i, j, 0], columns - points[i, j, 1])
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            tone = np.where(closer, tones[i, j], tone)
            nearest = np.where(closer, distance, nearest)
    joint = np.clip((second - nearest) / 5, 0.35, 1)
    colour = np.array((140, 138, 132), dtype=np.float32) * rng.uniform(0.85, 1.1)
    speckle = 1 + 0.06 * rng.standard_normal((side, side))
    return colour * (tone * joint * speckle)[..., None]


_TEXTURE_FUNCTIONS = {
    "grass": _grass,
    "water": _water,
    "sky": _sky,
    "sand": _sand,
    "brick": _brick,
    "wood": _wood,
    "snow": _snow,
    "stone": _stone,
}
