"""Seeded scenes: pictographs on textured grounds, with exact masks and captions.

A scene is made from (seed, index) alone, so a split is a seed and a range of indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from fsa.tiny.vocabulary import CLASSES, OBJECTS, TEXTURES, Entry

Sprites = dict[str, list[Image.Image]]

_BANK_SIDE = 512
_BANK_TILES = 6
_MASK_ALPHA = 128


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        picture: (H,W,3) uint8.
        mask: (H,W) uint8, index into `fsa.tiny.vocabulary.CLASSES`.
        objects: indices of the objects, in the order they were put down.
        textures: indices of the textures.
    """

    picture: np.ndarray
    mask: np.ndarray
    objects: tuple[int, ...]
    textures: tuple[int, ...]


def load_sprites(folder: Path, styles: Sequence[str]) -> Sprites:
    """Reads FOLDER/style/codepoint.png, as `fsa.tiny.pictographs` writes them.

    Returns:
        code point -> one RGBA picture per style.
    """
    return {
        entry.codepoint: [
            Image.open(folder / style / f"{entry.codepoint}.png").convert("RGBA")
            for style in styles
        ]
        for entry in OBJECTS
    }


class Composer:
    """Composes scenes.

    Args:
        sprites: code point -> RGBA pictures, one drawn at random each time.
        size: height and width of the scenes in pixels.
        seed: of everything random, textures included.
        object_sizes: shortest and longest side of an object in pixels.
        fewest_objects, most_objects: how many objects a scene has.
    """

    def __init__(
        self,
        sprites: Sprites,
        size: tuple[int, int],
        *,
        seed: int,
        object_sizes: tuple[int, int] = (36, 100),
        fewest_objects: int = 1,
        most_objects: int = 4,
    ) -> None:
        self.sprites = sprites
        self.size = size
        self.seed = seed
        self.object_sizes = object_sizes
        self.fewest_objects = fewest_objects
        self.most_objects = most_objects
        self._bank = _texture_bank(seed)

    def scene(self, index: int, *, objects: int | None = None) -> Scene:
        """The scene of this index.

        Args:
            index: 0, 1, 2, ...
            objects: how many objects; None draws from `fewest_objects` to `most_objects`.
        """
        rng = np.random.default_rng((self.seed, index))
        picture, mask, textures = self._ground(rng)
        if objects is None:
            objects = int(rng.integers(self.fewest_objects, self.most_objects + 1))
        chosen = rng.choice(len(OBJECTS), size=objects, replace=False)
        for object_index in chosen:
            self._put(picture, mask, int(object_index), rng)
        # Light over the whole picture: a gradient, and a gain.
        light = rng.uniform(0.8, 1.15) + rng.uniform(-0.12, 0.12) * np.linspace(
            -1, 1, self.size[1], dtype=np.float32
        )
        picture = np.clip(picture * light[None, :, None], 0, 255).astype(np.uint8)
        visible = tuple(int(i) for i in chosen if (mask == i).sum() >= 64)
        return Scene(picture, mask, visible, textures)

    def _ground(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        height, width = self.size
        names = rng.choice(len(TEXTURES), size=2, replace=False)
        first = len(OBJECTS) + int(names[0])
        picture = self._texture(int(names[0]), rng)
        mask = np.full(self.size, first, dtype=np.uint8)
        if rng.random() < 0.5:
            return picture, mask, (first,)
        second = len(OBJECTS) + int(names[1])
        base = rng.uniform(0.3, 0.7) * height
        waves = rng.uniform(0.0, 0.05) * height
        x = np.arange(width)
        line = base + waves * np.sin(x / width * rng.uniform(3, 12) + rng.uniform(0, 6))
        below = np.arange(height)[:, None] > line[None]
        picture[below] = self._texture(int(names[1]), rng)[below]
        mask[below] = second
        return picture, mask, (first, second)

    def _texture(self, texture: int, rng: np.random.Generator) -> np.ndarray:
        """A random crop of the bank, (H,W,3) float32, with some change of colour and scale."""
        height, width = self.size
        tile = self._bank[texture][rng.integers(_BANK_TILES)]
        top = int(rng.integers(0, _BANK_SIDE - height + 1))
        left = int(rng.integers(0, _BANK_SIDE - width + 1))
        crop = tile[top : top + height, left : left + width].astype(np.float32)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop * rng.uniform(0.85, 1.15, size=3).astype(np.float32)

    def _put(
        self, picture: np.ndarray, mask: np.ndarray, index: int, rng: np.random.Generator
    ) -> None:
        """Draws an object somewhere, over what is there."""
        styles = self.sprites[OBJECTS[index].codepoint]
        sprite = styles[rng.integers(len(styles))]
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        low, high = self.object_sizes
        scale = np.exp(rng.uniform(np.log(low), np.log(high))) / max(sprite.size)
        size = tuple(max(4, round(side * scale)) for side in sprite.size)
        sprite = sprite.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        sprite = sprite.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
        alpha = sprite.getchannel("A")
        colours = sprite.convert("RGB")
        for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            colours = enhance(colours).enhance(rng.uniform(0.7, 1.3))

        height, width = self.size
        sprite_width, sprite_height = sprite.size
        # At least three quarters of each side stay inside.
        top = int(rng.integers(-sprite_height // 4, max(1, height - 3 * sprite_height // 4)))
        left = int(rng.integers(-sprite_width // 4, max(1, width - 3 * sprite_width // 4)))
        rows = slice(max(0, top), min(height, top + sprite_height))
        columns = slice(max(0, left), min(width, left + sprite_width))
        inside = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        opacity = np.asarray(alpha)[inside]
        weight = opacity[..., None].astype(np.float32) / 255
        drawn = np.asarray(colours)[inside]
        picture[rows, columns] += weight * (drawn - picture[rows, columns])
        mask[rows, columns][opacity >= _MASK_ALPHA] = index


# --------------------------------------------------------------------------------------------------
# Captions

_TEMPLATES = (
    "a photo of {}.",
    "a picture of {}.",
    "{}.",
    "an image of {}.",
    "there is {} in the scene.",
    "a photo of the {}.",
    "a drawing of {}.",
    "a rendering of {}.",
    "a good photo of {}.",
    "a cropped photo of {}.",
    "a close-up photo of {}.",
    "{} in a video game.",
)
_GROUNDS = ("on {}", "with {}", "in front of {}", "and {}")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence that names the scene's objects, though not always all, and often its ground."""
    objects = [i for i in scene.objects if rng.random() < 0.9] or list(scene.objects[:1])
    names = [_with_article(_name(CLASSES[i], rng), rng) for i in rng.permutation(objects)]
    words = _joined(names)
    if not names or rng.random() < 0.7:
        grounds = [_name(CLASSES[i], rng) for i in scene.textures]
        ground = _joined(grounds if rng.random() < 0.7 else grounds[:1])
        words = f"{words} {rng.choice(_GROUNDS).format(ground)}" if names else ground
    return str(rng.choice(_TEMPLATES)).format(words)


def _name(entry: Entry, rng: np.random.Generator) -> str:
    return entry.name if rng.random() < 0.6 else str(rng.choice(entry.names))


def _with_article(name: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _joined(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)


# --------------------------------------------------------------------------------------------------
# Textures


def _texture_bank(seed: int) -> list[list[np.ndarray]]:
    """Large tiles of every texture, (side, side, 3) uint8, made once."""
    bank = []
    for index, entry in enumerate(TEXTURES):
        rng = np.random.default_rng((seed, 7919, index))
        draw = _TEXTURE_FUNCTIONS[entry.name]
        tiles = [draw(rng, _BANK_SIDE) for _ in range(_BANK_TILES)]
        bank.append([np.clip(tile, 0, 255).astype(np.uint8) for tile in tiles])
    return bank


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


def _shaded(colour: Sequence[float], noise: np.ndarray, depth: float) -> np.ndarray:
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
