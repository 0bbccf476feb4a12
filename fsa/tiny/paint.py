"""Paints drawings anew for training, so that an object is seen as if by many more hands.

    python -m fsa.tiny.paint --pictographs DIR

writes DIR/painted/CODEPOINT-NUMBER.png. A drawing in one colour is filled in like a colouring book:
every region that its lines enclose gets a colour. A drawing in colour is reduced to a few, which
change places with those of another drawing of the same object, the darkest with the darkest. Most
of the colours are the object's own, others are any. Outlines and shading are added by chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fsa.tiny.pictographs import DRAWN, GLYPHS, PAINTED, TRAIN_STYLES
from fsa.tiny.vocabulary import OBJECTS

COLOURS = 6
"""Of a palette."""

GLYPH_TIMES, COLOUR_TIMES = 3, 2
"""How often a drawing in one colour, and one in several, is painted."""

_SIDE = 64
# Of the picture around a drawing, for the outline.
_MARGIN = 8
_REGIONS = 12


def palette(picture: Image.Image) -> np.ndarray:
    """The main colours of what is drawn, the most frequent first: (COLOURS,3) uint8."""
    pixels = np.asarray(picture)
    pixels = pixels[pixels[..., 3] > 128][:, :3]
    flat = Image.fromarray(pixels[None]).quantize(COLOURS, kmeans=1)
    counts = np.bincount(np.asarray(flat).ravel(), minlength=COLOURS)
    colours = np.zeros((COLOURS, 3), np.uint8)
    found = np.array(flat.getpalette(), np.uint8).reshape(-1, 3)[:COLOURS]
    colours[: len(found)] = found
    order = np.argsort(-counts, kind="stable")
    # A drawing of fewer colours repeats its first.
    return colours[np.where(counts[order] > 0, order, order[0])]


def regions(opacity: np.ndarray) -> tuple[np.ndarray, int]:
    """The regions that a drawing's lines enclose.

    Args:
        opacity: (H,W) uint8.

    Returns:
        (H,W) uint8, 0 outside and on lines, 1, 2, ... the regions, the largest first; how many.
    """
    height, width = opacity.shape
    small = Image.fromarray(opacity).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    open_ = np.zeros((_SIDE + 2, _SIDE + 2), np.uint8)
    open_[1:-1, 1:-1] = np.asarray(small) >= 96
    # A picture of its own: one that shares an array cannot be drawn into.
    canvas = Image.fromarray(open_ * 255).copy()
    ImageDraw.floodfill(canvas, (0, 0), 255)
    areas = []
    value = 1
    while value < 250:
        left = np.argwhere(np.asarray(canvas) == 0)
        if len(left) == 0:
            break
        row, column = left[0]
        ImageDraw.floodfill(canvas, (int(column), int(row)), value)
        areas.append(int((np.asarray(canvas) == value).sum()))
        value += 1
    labels = np.asarray(canvas)[1:-1, 1:-1]
    chosen = [index for index in np.argsort(areas)[::-1] if areas[index] >= 4][:_REGIONS]
    numbers = np.zeros(256, np.uint8)
    for number, index in enumerate(chosen, 1):
        numbers[index + 1] = number
    found = Image.fromarray(numbers[labels])
    # Regions grow under the lines, so that no gap is left between the two.
    found = found.filter(ImageFilter.MaxFilter(3))
    return np.asarray(found.resize((width, height), Image.Resampling.NEAREST)), len(chosen)


def paint_glyph(
    picture: Image.Image, own: Sequence[np.ndarray], rng: np.random.Generator
) -> Image.Image:
    """A drawing in one colour, filled in.

    Args:
        picture: RGBA, of which only the opacity is looked at.
        own: palettes of the object.
    """
    opacity = np.asarray(picture.getchannel("A"))
    enclosed, count = regions(opacity)
    colours = own[int(rng.integers(len(own)))]
    fills = np.stack([_colour(colours, rng) for _ in range(count + 1)])
    if rng.random() < 0.4:
        fills[1:] = fills[:1]
    lines = opacity.astype(np.float32)[..., None] / 255
    covered = (opacity > 128).sum()
    # A silhouette has the object's colour, and lines are mostly dark.
    silhouette = covered > 0.5 * (covered + (enclosed[opacity <= 128] > 0).sum())
    if rng.random() < (0.85 if silhouette else 0.2):
        ink = fills[0]
    elif rng.random() < 0.75:
        ink = rng.uniform(0, 50, 3)
    else:
        ink = rng.uniform(0.3, 0.6) * fills[0]
    # Now and then a region is left open.
    filled = enclosed > 0
    if rng.random() < 0.15:
        filled &= enclosed != rng.integers(1, _REGIONS)
    elif rng.random() < 0.1:
        filled[:] = False
    if filled.any() and np.abs(ink - fills[1]).sum() < 90:
        if silhouette:
            fills[1:] = 255 if ink.mean() < 150 else 0.2 * ink
        else:
            ink = 0.45 * ink
    below = filled[..., None].astype(np.float32)
    alpha = np.maximum(lines, below)
    colour = lines * ink + (1 - lines) * fills[np.minimum(enclosed, count)]
    return _rgba(colour, alpha)


def _colour(own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the object's own colours, white, or any colour."""
    drawn = rng.random()
    if drawn < 0.68:
        # The first, which are the most frequent, more often.
        colour = own[int(len(own) * rng.random() ** 1.7)].astype(np.float32)
    elif drawn < 0.8:
        return np.full(3, rng.uniform(215, 255))
    else:
        colour = rng.uniform(20, 255, 3)
    return np.clip(colour + rng.normal(0, 14, 3), 0, 255)


def repaint(
    picture: Image.Image, own: Sequence[np.ndarray], rng: np.random.Generator
) -> Image.Image:
    """A drawing in colour with the palette of another: RGBA -> RGBA.

    Args:
        own: palettes of the object.
    """
    array = np.asarray(picture)
    mine = palette(picture).astype(np.float32)
    other = own[int(rng.integers(len(own)))].astype(np.float32)
    if rng.random() < 0.25:
        other = rng.uniform(0, 255, other.shape).astype(np.float32)
    light = np.array([0.3, 0.6, 0.1])
    target = np.empty_like(mine)
    target[np.argsort(mine @ light)] = other[np.argsort(other @ light)]
    target += rng.normal(0, 12, target.shape)
    pixels = array[..., :3].astype(np.float32)
    distance = ((pixels[:, :, None] - mine) ** 2).sum(axis=-1)
    nearest = distance.argmin(axis=-1)
    # What a pixel differs from its own palette's colour is kept, flattened or not.
    kept = rng.choice([0.0, 0.5, 1.0])
    colour = target[nearest] + kept * (pixels - mine[nearest])
    return _rgba(colour, array[..., 3:].astype(np.float32) / 255)


def finish(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Adds an outline or shading, or neither; RGBA, of the same size."""
    if rng.random() < 0.35:
        picture = _outlined(picture, rng)
    if rng.random() < 0.45:
        picture = _shaded(picture, rng)
    return picture


def _outlined(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = picture.size
    wide = Image.new("RGBA", (width + 2 * _MARGIN, height + 2 * _MARGIN))
    wide.paste(picture, (_MARGIN, _MARGIN))
    reach = 2 * int(rng.integers(2, 5)) + 1
    rim = wide.getchannel("A").filter(ImageFilter.MaxFilter(reach))
    rim = rim.filter(ImageFilter.BoxBlur(1))
    colour = rng.uniform(0, 60, 3) if rng.random() < 0.75 else rng.uniform(200, 255, 3)
    under = Image.new("RGBA", wide.size, (*(int(c) for c in colour), 255))
    under.putalpha(rim)
    under.alpha_composite(wide)
    return under.resize((width, height), Image.Resampling.BILINEAR)


def _shaded(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    array = np.asarray(picture).astype(np.float32)
    height, width = array.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(15, 60) * (np.cos(angle) * x + np.sin(angle) * y)
    return _rgba(array[..., :3] + light[..., None], array[..., 3:] / 255)


def _rgba(colour: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """From (H,W,3) in [0, 255] and (H,W,1) in [0, 1]."""
    both = np.concatenate([colour, 255 * alpha], axis=-1)
    return Image.fromarray(np.clip(both, 0, 255).astype(np.uint8))


def paint(folder: Path, styles: Sequence[str], seed: int = 0) -> int:
    """Writes FOLDER/painted and returns how many drawings it holds.

    Args:
        folder: what `python -m fsa.tiny.pictographs` wrote.
        styles: those whose drawings and colours may be used.
    """
    out = folder / PAINTED
    out.mkdir(exist_ok=True)
    total = 0
    for number, entry in enumerate(OBJECTS):
        rng = np.random.default_rng((seed, number, 4))
        of_styles = [folder / style / f"{entry.codepoint}.png" for style in styles]
        coloured = [_open(file) for file in of_styles if file.exists()]
        own = [palette(picture) for picture in coloured]
        coloured += [_open(file) for file in _files(folder / DRAWN, entry.codepoint)]
        painted = [
            finish(repaint(picture, own, rng), rng)
            for picture in coloured
            for _ in range(COLOUR_TIMES)
        ]
        painted += [
            finish(paint_glyph(_open(file), own, rng), rng)
            for file in _files(folder / GLYPHS, entry.codepoint)
            for _ in range(GLYPH_TIMES)
        ]
        for index, picture in enumerate(painted):
            picture.save(out / f"{entry.codepoint}-{index}.png")
        total += len(painted)
    return total


def _files(folder: Path, codepoint: str) -> list[Path]:
    return sorted(folder.glob(f"{codepoint}-*.png"))


def _open(file: Path) -> Image.Image:
    return Image.open(file).convert("RGBA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictographs", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", default=TRAIN_STYLES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count = paint(arguments.pictographs, arguments.styles, arguments.seed)
    print(f"{count} drawings in {arguments.pictographs / PAINTED}")


if __name__ == "__main__":
    main()
