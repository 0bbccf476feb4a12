"""Label maps as pictures: tinted, with a legend beside them, and panels side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fsa.arguments import number_within
from fsa.draw.colours import colours_of_classes, heat_colours, palette
from fsa.draw.lettering import Font, fonts, percent, written

_HATCH = 6
_INK = (25, 25, 25)
_PAPER = (255, 255, 255)
_GAP = 10
# Pixels painted at once: the working arrays stay near 50 MB whatever the picture's size.
_STRIP_PIXELS = 1 << 21
_BORDER_LIGHT = 0.35
# Lines and letters grow with the picture: a line of a pixel for each of these, and the letters.
_PIXELS_OF_LINE = 640
_LINES_OF_TEXT = 22
_SMALLEST_TEXT = 12
# Lower pictures get a canvas of this height, or the legend would run far to their right.
_LEGEND_HEIGHT = 360
_TALLEST_PANEL = 4


def paint(
    rgb: np.ndarray,
    labels: np.ndarray,
    count: int,
    alpha: float = 0.6,
    *,
    colours: np.ndarray | None = None,
) -> np.ndarray:
    """A picture in grey tinted by its labels, with lines between regions that grow with it.

    Args:
        rgb: (H,W,3) uint8.
        labels: (H,W) integers; those outside of 0 to count - 1 are left untinted.
        count: number of classes.
        alpha: how much of the colour, in [0, 1].
        colours: of the classes, (count,3) uint8; default `palette(count)`.

    Returns:
        (H,W,3) uint8.

    Raises:
        InputError: alpha is no number from 0 to 1.
    """
    alpha = number_within("alpha", alpha, 0, 1)
    colours = palette(count) if colours is None else colours
    # The last row is black and weighs nothing: the label of what is left untinted.
    tints = np.vstack([colours, np.zeros((1, 3), np.uint8)]).astype(np.float32) * alpha
    remaining = np.full((count + 1, 1), 1 - alpha, np.float32)
    remaining[count] = 1
    painted = np.empty_like(rgb)
    height, width = labels.shape
    line = max(1, round(min(height, width) / _PIXELS_OF_LINE))
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height))
        inside = labels[strip]
        index = np.where((inside >= 0) & (inside < count), inside, count)
        # In grey: colours of the picture would make others of those of the classes.
        grey = rgb[strip].mean(axis=-1, keepdims=True, dtype=np.float32)
        base = np.where((index < count)[..., None], grey, rgb[strip])
        tinted = base * remaining[index] + tints[index]
        border = np.zeros(inside.shape, dtype=bool)
        for step in range(1, line + 1):
            border[:, step:] |= inside[:, step:] != inside[:, :-step]
            above = labels[max(top - step, 0) : max(strip.stop - step, 0)]
            border[len(inside) - len(above) :] |= inside[len(inside) - len(above) :] != above
        tinted[border] *= _BORDER_LIGHT
        painted[strip] = tinted.round()
    return painted


def class_counts(labels: np.ndarray, count: int) -> np.ndarray:
    """How many pixels (H,W) have each of the labels 0 to count - 1, (count,) int64."""
    counts = np.zeros(count, np.int64)
    rows = max(1, _STRIP_PIXELS // max(1, labels.shape[1]))
    # In strips: NumPy counts a copy in 64 bits.
    for top in range(0, len(labels), rows):
        strip = labels[top : top + rows]
        counts += np.bincount(strip[strip >= 0], minlength=count)[:count]
    return counts


def overlay(
    rgb: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    alpha: float = 0.6,
    legend: bool = True,
) -> Image.Image:
    """A picture tinted by its labels, with the present classes and their shares beside it.

    Args:
        rgb, labels, alpha: as `paint` takes them.
        names: of the classes.
        legend: False returns the tinted picture without it.

    Raises:
        InputError: as `paint`.
    """
    colours = colours_of_classes(class_counts(labels, len(names)))
    painted = Image.fromarray(paint(rgb, labels, len(names), alpha, colours=colours))
    return beside_legend(painted, labels, names) if legend else painted


def beside_legend(picture: Image.Image, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """A picture with a legend to its right: the classes in `labels` and their shares of it.

    The largest comes first. A name that no font at hand can write stands as "class 3", its number
    in the labels, followed by what can be written of it.
    """
    counts = class_counts(labels, len(names))
    size = max(_SMALLEST_TEXT, round(min(picture.size) / _LINES_OF_TEXT))
    row, gap = round(size * 1.5), max(_GAP, size // 4)
    colours = colours_of_classes(counts).tolist()
    lines = [
        _Line(*written(names[i], f"class {i}", size), percent(counts[i] / labels.size), colours[i])
        for i in np.argsort(-counts, kind="stable")
        if counts[i] > 0
    ]
    per_column = max(1, (max(picture.height, _LEGEND_HEIGHT) - 2 * gap) // row)
    columns = [lines[start : start + per_column] for start in range(0, len(lines), per_column)]
    height = max(picture.height, min(len(lines), per_column) * row + 2 * gap)
    share_font = fonts(size)[0]
    share_width = max((share_font.getlength(line.share) for line in lines), default=0)
    # From a square's left to its share's right: square, widest name, gap, widest share.
    widths = [
        round(row + max(line.font.getlength(line.name) for line in column) + size + share_width)
        for column in columns
    ]

    width = picture.width + (sum(widths) + len(widths) * row + gap if columns else 0)
    canvas = Image.new("RGB", (width, height), _PAPER)
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    left = picture.width + gap
    for column, column_width in zip(columns, widths, strict=True):
        for position, line in enumerate(column):
            top = gap + position * row
            middle = top + size // 2
            box = (left, top, left + size, top + size)
            draw.rectangle(box, fill=tuple(line.colour), outline=_INK, width=max(1, size // 20))
            # Two texts: in one, a name that is written from right to left swaps places with it.
            draw.text((left + row, middle), line.name, font=line.font, fill=_INK, anchor="lm")
            right = (left + column_width, middle)
            draw.text(right, line.share, font=share_font, fill=_INK, anchor="rm")
        left += column_width + row
    return canvas


@dataclass(frozen=True)
class _Line:
    """A class in the legend of an overlay."""

    name: str
    font: Font
    share: str
    colour: Sequence[int]


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
        # The inner lines of a box that is smaller than they are wide have no room.
        if lines[0] <= lines[2] and lines[1] <= lines[3]:
            draw.rectangle(lines, outline=colour, width=width)
    return copy


def fitted(size: tuple[int, int], width: int) -> tuple[int, int]:
    """The size in pixels, (width, height), at which a picture of any shape is shown in a panel.

    As wide as the panel, but at most four times as high, and at least one pixel.
    """
    scale = min(width / size[0], _TALLEST_PANEL * width / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@dataclass(frozen=True)
class Panel:
    """A picture in a grid of panels, with a line of text under it."""

    picture: Image.Image
    caption: str = ""


def panel_grid(
    rows: Sequence[Sequence[Panel]],
    titles: Sequence[str] = (),
    *,
    heading: str = "",
    panel_width: int = 260,
    text_size: int | None = None,
    legends: Sequence[Sequence[tuple[str, tuple[int, int, int]]]] = (),
    labels: Sequence[str] = (),
) -> Image.Image:
    """Panels in rows and columns on white.

    Args:
        rows: panels; their pictures are scaled to the same width, very high ones to a smaller one.
        titles: over the columns.
        heading: over all.
        panel_width: of every picture, in pixels.
        text_size: of the captions, in pixels; default a seventeenth of `panel_width`.
        legends: for each row, names and colours written under it; of classes, `legible` names.
        labels: for each row, what it is, written upwards to its left.
    """
    size = max(13, panel_width // 17) if text_size is None else text_size
    font = ImageFont.load_default(size)
    bold_size = round(size * 1.2)
    bold = ImageFont.load_default(bold_size)
    line = round(size * 1.5)
    scaled = [
        [
            panel.picture.convert("RGB").resize(
                fitted(panel.picture.size, panel_width), Image.Resampling.LANCZOS
            )
            for panel in row
        ]
        for row in rows
    ]
    columns = max(len(row) for row in rows)
    margin = _GAP + (line if labels else 0)
    width = columns * (panel_width + _GAP) + margin
    legend_rows = [_wrapped(legend, size, width - margin - _GAP) for legend in legends]
    heights = [max(picture.height for picture in row) for row in scaled]
    header = (round(bold_size * 1.9) if heading else 0) + (line + 4 if titles else 0) + _GAP
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
        top += round(bold_size * 1.9)
    for column, title in enumerate(titles):
        middle = margin + column * (panel_width + _GAP) + panel_width // 2
        draw.text((middle, top), title, font=font, fill=_INK, anchor="ma")
    top = header
    for number, row in enumerate(rows):
        if number < len(labels):
            upright = Image.new("RGB", (heights[number], line), _PAPER)
            centre = (heights[number] // 2, line // 2)
            ImageDraw.Draw(upright).text(centre, labels[number], font=font, fill=_INK, anchor="mm")
            canvas.paste(upright.rotate(90, expand=True), (_GAP // 2, top))
        for column, panel in enumerate(row):
            left = margin + column * (panel_width + _GAP)
            middle = left + panel_width // 2
            canvas.paste(scaled[number][column], (middle - scaled[number][column].width // 2, top))
            below = (middle, top + heights[number] + line // 2)
            draw.text(below, panel.caption, font=font, fill=_INK, anchor="mm")
        top += heights[number] + line + _GAP
        if number < len(legend_rows):
            for entries in legend_rows[number]:
                x: float = margin
                for name, name_font, colour, length in entries:
                    box = (x, top, x + size, top + size)
                    draw.rectangle(box, fill=colour, outline=_INK)
                    beside = (x + size * 1.4, top + size // 2)
                    draw.text(beside, name, font=name_font, fill=_INK, anchor="lm")
                    x += length
                top += line
            top += _GAP
    return canvas


def _wrapped(
    legend: Sequence[tuple[str, tuple[int, int, int]]], size: int, width: float
) -> list[list[tuple[str, Font, tuple[int, int, int], float]]]:
    """Entries of a legend with their fonts and lengths, broken into lines."""
    lines: list[list[tuple[str, Font, tuple[int, int, int], float]]] = [[]]
    used = 0.0
    for text, colour in legend:
        name, font = written(text, text, size)
        length = font.getlength(name) + size * 2.6
        if lines[-1] and used + length > width:
            lines.append([])
            used = 0.0
        lines[-1].append((name, font, colour, length))
        used += length
    return lines
