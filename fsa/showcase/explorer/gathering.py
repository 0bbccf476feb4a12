"""What the page shows of a picture, as plain values ready for JSON."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import fsa
from fsa.classes import Classes, parse_classes
from fsa.config import PROBABILITY_FLOOR, SEGMENTATION_SCALE
from fsa.draw.colours import heat_colours, palette
from fsa.errors import InputError
from fsa.pictures.reading import read_image
from fsa.segment.inspection import WindowAttentions
from fsa.segment.result import Segmentation
from fsa.segment.segmentor import Segmentor
from fsa.showcase.explorer.packing import packed_cosines, packed_rows, run_lengths
from fsa.showcase.titles import title

MAX_PATCHES = 1764
"""A window of more patches is refused: the page would grow with their square."""

_MAX_PREDICTIONS = 1764 * 1000
# Twice as wide as the page shows the picture, for screens of two pixels a point.
_PICTURE_SIDE = 840
_JPEG_QUALITY = 85
# Up to here two bytes an entry of A keep the page below 4 MB.
_EXACT_PATCHES = 800
# Up to here the page holds the cosines of patches and texts as they were computed.
_EXACT_PREDICTIONS = 120_000
_HEAT_STEPS = 9


def gathered(
    segmentor: Segmentor,
    image: Any,
    classes: Classes,
    patch: tuple[int, int] | None,
    sizes: dict[str, Any],
) -> dict[str, Any]:
    """Everything the page is given.

    Args:
        segmentor: with feedback.
        image, classes, patch: as in `fsa.showcase.explorer.explore`.
        sizes: "window", "stride" and "short_side", as in `Segmentor.segment`.

    Raises:
        InputError: as `fsa.showcase.explorer.explore`.
    """
    picture = read_image(image)
    seen = segmentor.window_attentions(picture, classes, patch, max_patches=MAX_PATCHES, **sizes)
    config = segmentor.config
    assert config is not None  # Or there had been no attentions after feedback.
    queries = segmentor.encode(classes)
    patches = seen.grid[0] * seen.grid[1]
    _check_predictions(patches, len(queries.features))
    first = seen
    if not config.isolation:
        # What the page subtracts when isolation is switched on there.
        isolated = segmentor.with_feedback(config.replace(isolation=True))
        first = isolated.window_attentions(picture, classes, patch, **sizes)
    assert first.attentions.uniform_features is not None
    texts = queries.features
    before, uniform, after = (
        _cosines(features, texts)
        for features in (
            seen.attentions.host_features,
            first.attentions.uniform_features,
            seen.attentions.features,
        )
    )
    with_feedback = segmentor.segment(picture, classes, **sizes)
    without = segmentor.with_feedback(False).segment(picture, classes, **sizes)

    exact = before.size <= _EXACT_PREDICTIONS
    exact_attention = patches <= _EXACT_PATCHES
    names = [name for synonyms in parse_classes(classes) for name in synonyms]
    return {
        "about": {
            "picture": picture.name,
            "host": title(segmentor.host_name),
            "model": segmentor.loaded.name,
            "pretrained": segmentor.loaded.pretrained,
            "vfm": segmentor.vfm.name if segmentor.vfm else None,
            "windows": with_feedback.settings["window"],
            "version": fsa.__version__,
        },
        **_pictures(without, with_feedback),
        "queries": [
            {"name": name, "class": index}
            for name, index in zip(names, queries.class_index.tolist(), strict=True)
        ],
        "heat": heat_colours(np.linspace(0, 1, _HEAT_STEPS)).tolist(),
        **_window(seen),
        "cosines": packed_cosines(before, exact),
        "uniformCosines": packed_cosines(uniform, exact),
        "adaptedPredictions": packed_rows(_softmax(after * SEGMENTATION_SCALE), exact),
        "attention": packed_rows(_without_rounding(seen.attentions.host), exact_attention),
        "exact": exact,
        "exactAttention": exact_attention,
        "segmentationScale": SEGMENTATION_SCALE,
        "probabilityFloor": PROBABILITY_FLOOR,
        "config": asdict(config),
    }


def _check_predictions(patches: int, queries: int) -> None:
    if patches * queries > _MAX_PREDICTIONS:
        raise InputError(
            f"{queries} class names in a window of {patches} patches are too many for the page, "
            f"which takes at most {_MAX_PREDICTIONS // patches}: name fewer classes or choose a "
            "smaller window"
        )


def _cosines(features: Tensor, texts: Tensor) -> np.ndarray:
    """Cosines (rows,C) of the features (1,rows,E) of a window with the texts (C,E), float32."""
    return (functional.normalize(features[0].float(), dim=-1) @ texts.T).cpu().numpy()


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(dim=-1).numpy()


def _without_rounding(matrix: Tensor) -> np.ndarray:
    """A (N,N) in float32, without the traces of rounding that its columns have around 0."""
    rows = matrix[0].float().cpu().numpy()
    smallest = np.abs(rows).max(axis=1, keepdims=True) * 1e-6
    return np.where(np.abs(rows) < smallest, 0, rows)


def _window(seen: WindowAttentions) -> dict[str, Any]:
    return {
        "size": seen.size,
        "window": asdict(seen.area),
        "grid": seen.grid,
        "patch": seen.patch[0] * seen.grid[1] + seen.patch[1],
    }


def _pictures(without: Segmentation, with_feedback: Segmentation) -> dict[str, Any]:
    """The picture, both label maps at the size at which they are shown, and the classes."""
    rgb = with_feedback.picture.rgb.permute(1, 2, 0).numpy()
    height, width = rgb.shape[:2]
    scale = min(1.0, _PICTURE_SIDE / max(height, width))
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    stream = io.BytesIO()
    picture = Image.fromarray(rgb).resize(shown, Image.Resampling.LANCZOS)
    picture.save(stream, "JPEG", quality=_JPEG_QUALITY)

    count = len(with_feedback.class_names)
    areas = np.stack(
        [np.bincount(r.labels.ravel(), minlength=count) for r in (without, with_feedback)]
    ) / (height * width)
    # The largest classes get the colours that are easiest to tell apart.
    order = np.argsort(-areas.sum(axis=0), kind="stable")
    colours = np.empty((count, 3), np.uint8)
    colours[order] = palette(count)
    return {
        "picture": {
            "width": shown[0],
            "height": shown[1],
            "source": "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode(),
        },
        "labels": {
            "without": run_lengths(_shrunk(without.labels, shown)),
            "with": run_lengths(_shrunk(with_feedback.labels, shown)),
        },
        "changed": float((without.labels != with_feedback.labels).mean()),
        "classes": [
            {"name": name, "colour": colour, "without": before, "with": after}
            for name, colour, before, after in zip(
                with_feedback.class_names, colours.tolist(), *areas.tolist(), strict=True
            )
        ],
    }


def _shrunk(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The labels (H,W) nearest to the middles of the pixels of a picture (width, height)."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for old, new in zip(labels.shape, size[::-1], strict=True)
    )
    return labels[rows][:, columns]
