"""One picture without and with feedback, and what a patch of it attends to, in one PNG.

After the paper's Figures 5 and S14.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsa.classes import Classes
from fsa.draw.colours import heat_colours, palette
from fsa.draw.figures import Panel, attention_map, fitted, outlined, paint, panel_grid
from fsa.draw.lettering import legible
from fsa.errors import InputError
from fsa.files import make_room_for_png, write_whole
from fsa.segment.inspection import PatchAttentions
from fsa.segment.result import Segmentation
from fsa.segment.segmentor import Segmentor
from fsa.showcase.titles import title

_PANEL_WIDTH = 360
# Distinct for colour-blind readers; what covers less is seldom told apart by anyone.
_LEGEND_CLASSES = 12


def parse_patch(text: str) -> tuple[int, int]:
    """Row and column from "ROW,COL".

    Raises:
        InputError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None:
        raise InputError(f"patch={text!r} must be ROW,COL, such as 4,7, counted from 0")
    return int(found[1]), int(found[2])


def run(
    segmentor: Segmentor,
    picture: Path,
    classes: Classes,
    out: Path,
    *,
    patch: tuple[int, int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    short_side: int | None = None,
) -> str:
    """Segments the picture, writes the PNG and returns a summary.

    Args:
        segmentor: with feedback.
        picture, classes, window, stride, short_side: as in `Segmentor.segment`.
        out: the PNG.
        patch: row and column on the grid of patches of the resized picture; None takes the
            middle one.

    Raises:
        InputError: a picture, class list, patch or size that is not accepted, or a PNG that
            cannot be written.
    """
    make_room_for_png(out)
    sizes: dict[str, Any] = {"window": window, "stride": stride, "short_side": short_side}
    adapted = segmentor.segment(picture, classes, **sizes)
    baseline = segmentor.with_feedback(False).segment(picture, classes, **sizes)
    if patch is None:
        patch = _middle_patch(segmentor, adapted)
    seen = segmentor.attentions_at(picture, classes, patch, **sizes)
    drawn = figure(baseline, adapted, seen, patch)
    write_whole(out, lambda stream: drawn.save(stream, "PNG"))
    changed = float((baseline.labels != adapted.labels).mean())
    return (
        f"patch {patch[0]},{patch[1]}: {int(seen.kept.sum())} of {seen.kept.size} patches kept; "
        f"feedback changes {changed:.1%} of the pixels\nwrote {out}"
    )


def _middle_patch(segmentor: Segmentor, result: Segmentation) -> tuple[int, int]:
    height, width = result.maps.working_size
    rows, columns = segmentor.host.tower.patch_size
    return height // 2 // rows, width // 2 // columns


def figure(
    baseline: Segmentation, adapted: Segmentation, seen: PatchAttentions, patch: tuple[int, int]
) -> Image.Image:
    """The picture and its labels without and with feedback over the patch's attention.

    Args:
        baseline, adapted: of the same picture and classes, without and with feedback.
        seen: what the patch attends to.
        patch: as the user counts it.
    """
    rgb = adapted.picture.rgb.permute(1, 2, 0).numpy()
    # Shown as large as the panels are, so that lines and hatching keep their width.
    shown = Image.fromarray(rgb)
    shown = shown.resize(fitted(shown.size, _PANEL_WIDTH), Image.Resampling.LANCZOS)
    order, names = _largest_first(baseline, adapted)
    painted = [
        Image.fromarray(paint(rgb, order[result.labels], len(names))).resize(
            shown.size, Image.Resampling.LANCZOS
        )
        for result in (baseline, adapted)
    ]
    scale = shown.width / seen.size[1]
    area = seen.area
    cell = (area.height / seen.host.shape[0], area.width / seen.host.shape[1])
    top, left = area.top + seen.patch[0] * cell[0], area.left + seen.patch[1] * cell[1]
    input_panel = outlined(
        outlined(shown, _scaled((left, top, left + cell[1], top + cell[0]), scale)),
        _scaled((area.left, area.top, area.left + area.width, area.top + area.height), scale),
        width=1,
    )
    crop = _crop(Image.fromarray(rgb), seen)
    maps = [
        attention_map(crop, seen.host, seen.patch),
        attention_map(crop, seen.feedback, seen.patch, kept=seen.kept),
        attention_map(crop, seen.adapted, seen.patch),
    ]
    kept = f"feedback A_f: {int(seen.kept.sum())} of {seen.kept.size} patches kept"
    host = title(baseline.settings["host"])
    colours = palette(len(names))
    shades = heat_colours(np.array([0.0, 0.5, 1.0]))
    legend = [(name, _triple(colour)) for name, colour in zip(names, colours, strict=True)]
    scale_legend = [
        (name, _triple(colour))
        for name, colour in zip(
            ("no attention", "half of the largest", "the largest that another patch gets"),
            shades,
            strict=True,
        )
    ]
    return panel_grid(
        [
            [
                Panel(input_panel, f"patch {patch[0]},{patch[1]} and its window"),
                Panel(painted[0], "labels"),
                Panel(painted[1], "labels"),
            ],
            [
                Panel(maps[0], "attention before: A"),
                Panel(maps[1], kept),
                Panel(maps[2], "attention after"),
            ],
        ],
        ["input", host, f"{host} + FSA"],
        panel_width=_PANEL_WIDTH,
        legends=[legend[:_LEGEND_CLASSES], [*scale_legend, ("hatched: pruned", (190, 190, 190))]],
        labels=["picture", f"what patch {patch[0]},{patch[1]} attends to"],
    )


def _largest_first(baseline: Segmentation, adapted: Segmentation) -> tuple[np.ndarray, list[str]]:
    """New numbers (C,) of the classes, the largest first, and names of those that occur.

    So the classes that matter get the colours that are easiest to tell apart.
    """
    count = len(adapted.class_names)
    both = np.concatenate([baseline.labels.ravel(), adapted.labels.ravel()])
    areas = np.bincount(both, minlength=count)
    by_area = np.argsort(-areas, kind="stable")
    order = np.empty(count, dtype=np.int64)
    order[by_area] = np.arange(count)
    return order, [legible(adapted.class_names[i], i) for i in by_area if areas[i] > 0]


def _crop(picture: Image.Image, seen: PatchAttentions) -> np.ndarray:
    """The window of the resized picture on grey, enlarged to a panel: (h,w,3) uint8."""
    resized = picture.resize(seen.size[::-1], Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (seen.area.width, seen.area.height), (128, 128, 128))
    canvas.paste(resized, (-seen.area.left, -seen.area.top))
    size = fitted(canvas.size, _PANEL_WIDTH)
    return np.asarray(canvas.resize(size, Image.Resampling.BICUBIC))


def _scaled(box: tuple[float, ...], scale: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = (side * scale for side in box)
    return left, top, right, bottom


def _triple(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(channel) for channel in colour)
    return red, green, blue
