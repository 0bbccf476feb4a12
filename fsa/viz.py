"""Label maps as pictures: palette, overlay with legend, and panels side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the black.
_FIRST_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_GOLDEN_TURN = 0.618033988749895
# The colour map cividis (Nunez, Anderton and Renslow, 2018), made for colour-blind readers.
_HEAT = ((0, 34, 78), (62, 81, 107), (124, 123, 120), (187, 173, 108), (254, 232, 56))
_HATCH = 6
_INK = (25, 25, 25)
_PAPER = (255, 255, 255)
_GAP = 10


def palette(count: int) -> np.ndarray:
    """(count,3) uint8 colours, the same for the same index whatever the count.

    The first seven are safe for colour-blind readers; later ones turn around the colour wheel in
    three depths.
    """
    colours = list(_FIRST_COLOURS[:count])
    for i in range(count - len(colours)):
        hue = (0.08 + i * _GOLDEN_TURN) % 1.0
        saturation, value = ((0.75, 0.85), (0.45, 0.95), (0.85, 0.55))[i % 3]
        colours.append(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value)))
    return np.array(colours, dtype=np.uint8).reshape(count, 3)


def paint(rgb: np.ndarray, labels: np.ndarray, count: int, alpha: float = 0.6) -> np.ndarray:
    """A picture in grey tinted by its labels, with thin lines between regions.

    Args:
        rgb: (H,W,3) uint8.
        labels: (H,W) integers; those outside of 0 to count - 1 are left untinted.
        count: number of classes.
        alpha: how much of the colour, in [0, 1].
    """
    known = (labels >= 0) & (labels < count)
    colours = palette(count)[np.where(known, labels, 0)]
    # In grey: colours of the picture would make others of those of the classes.
    grey = rgb.mean(axis=-1, keepdims=True)
    painted = np.where(known[..., None], grey * (1 - alpha) + colours * alpha, rgb)
    border = np.zeros(labels.shape, dtype=bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    painted[border] = painted[border] * 0.35
    return painted.round().astype(np.uint8)


def overlay(
    rgb: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    alpha: float = 0.6,
    legend: bool = True,
) -> Image.Image:
    """A picture tinted by its labels, with the present classes and their shares beside it."""
    painted = Image.fromarray(paint(rgb, labels, len(names), alpha))
    return beside_legend(painted, labels, names) if legend else painted


def beside_legend(picture: Image.Image, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """A picture with a legend to its right: the classes in `labels`, largest first."""
    counts = np.bincount(labels[labels >= 0].ravel(), minlength=len(names))[: len(names)]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i] > 0]
    size = int(np.clip(min(picture.size) / 22, 12, 40))
    font = ImageFont.load_default(size)
    lines = [f"{names[i]}  {_percent(counts[i] / labels.size)}" for i in order]
    row = round(size * 1.5)
    height = max(picture.height, row + 2 * _GAP)
    per_column = max(1, (height - 2 * _GAP) // row)
    columns = [lines[start : start + per_column] for start in range(0, len(lines), per_column)]
    widths = [max(font.getlength(line) for line in column) + 2.2 * row for column in columns]

    width = picture.width + (round(sum(widths)) + _GAP if columns else 0)
    canvas = Image.new("RGB", (width, height), _PAPER)
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    colours = palette(len(names))
    left = picture.width + _GAP
    for number, column in enumerate(columns):
        for position, line in enumerate(column):
            top = _GAP + position * row
            colour = tuple(int(c) for c in colours[order[number * per_column + position]])
            draw.rectangle((left, top, left + size, top + size), fill=colour, outline=_INK)
            anchor = (left + size + size // 2, top + size // 2)
            draw.text(anchor, line, font=font, fill=_INK, anchor="lm")
        left += round(widths[number])
    return canvas


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours (...,3) uint8 of values in [0, 1], from dark blue to yellow."""
    places = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, places, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def attention_map(
    rgb: np.ndarray,
    row: np.ndarray,
    patch: tuple[int, int],
    *,
    kept: np.ndarray | None = None,
    alpha: float = 0.7,
) -> Image.Image:
    """A picture with what one of its patches attends to.

    Args:
        rgb: (H,W,3) uint8, covered by the grid of patches.
        row: (gh,gw), the patch's attention; the colour is the share of the largest that another
            patch gets.
        patch: its row and column, outlined.
        kept: (gh,gw) bool; the others are hatched.
        alpha: how much of the colour, in [0, 1].
    """
    height, width = rgb.shape[:2]
    others = row.copy()
    others[patch] = 0
    colours = heat_colours(np.clip(row / max(others.max(), 1e-12), 0, 1))
    rows = np.arange(height) * row.shape[0] // height
    columns = np.arange(width) * row.shape[1] // width
    grey = rgb.mean(axis=-1, keepdims=True)
    painted = grey * (1 - alpha) + colours[rows][:, columns] * alpha
    if kept is not None:
        down, across = np.indices((height, width))
        stripes = (down + across) // _HATCH % 2 == 0
        pruned = ~kept[rows][:, columns]
        painted[pruned] = 0.5 * grey[pruned] + 127
        painted[pruned & stripes] *= 0.75
    image = Image.fromarray(painted.round().clip(0, 255).astype(np.uint8))
    box = (
        patch[1] * width / row.shape[1],
        patch[0] * height / row.shape[0],
        (patch[1] + 1) * width / row.shape[1] - 1,
        (patch[0] + 1) * height / row.shape[0] - 1,
    )
    return outlined(image, box)


def outlined(
    picture: Image.Image, box: tuple[float, float, float, float], width: int = 2
) -> Image.Image:
    """A copy with a box (left, top, right, bottom) drawn in white between lines of black."""
    copy = picture.copy()
    draw = ImageDraw.Draw(copy)
    left, top, right, bottom = (round(side) for side in box)
    for inset, colour in ((-width, _INK), (0, _PAPER), (width, _INK)):
        lines = (left + inset, top + inset, right - inset, bottom - inset)
        draw.rectangle(lines, outline=colour, width=width)
    return copy


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


@dataclass(frozen=True)
class Panel:
    """A picture in a grid of panels, with a line of text under it."""

    picture: Image.Image
    caption: str = ""


def grid(
    rows: Sequence[Sequence[Panel]],
    titles: Sequence[str] = (),
    *,
    heading: str = "",
    panel_width: int = 260,
    legends: Sequence[Sequence[tuple[str, tuple[int, int, int]]]] = (),
    labels: Sequence[str] = (),
) -> Image.Image:
    """Panels in rows and columns on white.

    Args:
        rows: panels; the pictures of a row are scaled to the same width.
        titles: over the columns.
        heading: over all.
        panel_width: of every picture, in pixels.
        legends: for each row, names and colours written under it.
        labels: for each row, what it is, written upwards to its left.
    """
    font = ImageFont.load_default(max(13, panel_width // 17))
    bold = ImageFont.load_default(max(15, panel_width // 14))
    line = round(font.size * 1.5)
    scaled = [
        [
            panel.picture.convert("RGB").resize(
                (panel_width, round(panel.picture.height * panel_width / panel.picture.width)),
                Image.Resampling.LANCZOS,
            )
            for panel in row
        ]
        for row in rows
    ]
    columns = max(len(row) for row in rows)
    margin = _GAP + (line if labels else 0)
    width = columns * (panel_width + _GAP) + margin
    legend_rows = [_wrapped(legend, font, width - margin - _GAP) for legend in legends]
    heights = [max(picture.height for picture in row) for row in scaled]
    header = (round(bold.size * 1.9) if heading else 0) + (line + 4 if titles else 0) + _GAP
    total = header
    for number, height in enumerate(heights):
        total += height + line + _GAP
        if number < len(legend_rows):
            total += len(legend_rows[number]) * line + _GAP

    canvas = Image.new("RGB", (width, total), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = _GAP
    if heading:
        draw.text((margin, top), heading, font=bold, fill=_INK)
        top += round(bold.size * 1.9)
    for column, title in enumerate(titles):
        middle = margin + column * (panel_width + _GAP) + panel_width // 2
        draw.text((middle, top), title, font=font, fill=_INK, anchor="ma")
    top = header
    for number, row in enumerate(rows):
        if number < len(labels):
            upright = Image.new("RGB", (heights[number], line), _PAPER)
            middle = (heights[number] // 2, line // 2)
            ImageDraw.Draw(upright).text(middle, labels[number], font=font, fill=_INK, anchor="mm")
            canvas.paste(upright.rotate(90, expand=True), (_GAP // 2, top))
        for column, panel in enumerate(row):
            left = margin + column * (panel_width + _GAP)
            canvas.paste(scaled[number][column], (left, top))
            middle = left + panel_width // 2
            anchor = (middle, top + heights[number] + line // 2)
            draw.text(anchor, panel.caption, font=font, fill=_INK, anchor="mm")
        top += heights[number] + line + _GAP
        if number < len(legend_rows):
            for entries in legend_rows[number]:
                left = margin
                for name, colour, length in entries:
                    box = (left, top, left + font.size, top + font.size)
                    draw.rectangle(box, fill=colour, outline=_INK)
                    anchor = (left + font.size * 1.4, top + font.size // 2)
                    draw.text(anchor, name, font=font, fill=_INK, anchor="lm")
                    left += length
                top += line
            top += _GAP
    return canvas


def _wrapped(
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    font: ImageFont.FreeTypeFont,
    width: float,
) -> list[list[tuple[str, tuple[int, int, int], float]]]:
    """Entries of a legend with their lengths, broken into lines."""
    lines: list[list[tuple[str, tuple[int, int, int], float]]] = [[]]
    used = 0.0
    for name, colour in legend:
        length = font.getlength(name) + font.size * 2.6
        if lines[-1] and used + length > width:
            lines.append([])
            used = 0.0
        lines[-1].append((name, colour, length))
        used += length
    return lines
