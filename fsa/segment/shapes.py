"""The masks of a result as other tools take them: COCO's run lengths, polygons, detections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fsa.errors import InputError

if TYPE_CHECKING:
    from fsa.segment.result import Segmentation

KINDS = {"rle": "pycocotools", "polygons": "contourpy"}
"""What `Segmentation.save` can put into its JSON, and the package that makes it."""


def check_installed(kinds: Iterable[str]) -> None:
    """Raises InputError for a kind that is not known or whose package is not installed."""
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(
                f"shapes={kind!r} is not accepted: it must be one of {', '.join(KINDS)}"
            )
        if find_spec(KINDS[kind]) is None:
            raise InputError(
                f"shapes={kind!r} needs {KINDS[kind]}, which is not installed: "
                "pip install 'fsa-kernels[shapes]'"
            )


def masks_of(result: Segmentation, kinds: Iterable[str]) -> list[dict[str, Any]]:
    """A record of each class that is present, largest first, as plain values for JSON.

    "class" and "number"; "area" in pixels; "bbox", COCO's [left, top, width, height]; and as asked

    - "rle": {"size": [H, W], "counts": str}, COCO's compressed run lengths;
    - "polygons": as the coordinates of a MultiPolygon of GeoJSON: a list of polygons, each a list
      of rings of which the first is the outline and the others are holes, each a list of [x, y]
      that ends where it begins. In pixels; a pixel reaches from its number to the next, and corners
      are cut at half a pixel, so that each pixel's middle lies on its own side.

    Raises:
        InputError: as `check_installed`.
    """
    kinds = tuple(kinds)
    check_installed(kinds)
    found = []
    for number, pixels in _present(result):
        mask = result.labels == number
        left, top, right, bottom = _box(mask)
        record: dict[str, Any] = {
            "class": result.class_names[number],
            "number": number,
            "area": pixels,
            "bbox": [left, top, right - left, bottom - top],
        }
        if "rle" in kinds:
            record["rle"] = _run_lengths(mask)
        if "polygons" in kinds:
            record["polygons"] = _polygons(mask[top:bottom, left:right], left, top)
        found.append(record)
    return found


def detections_of(result: Segmentation) -> Any:
    """As `supervision.Detections`; see `Segmentation.to_detections`."""
    supervision = _supervision()
    present = [number for number, _ in _present(result)]
    masks = np.stack([result.labels == number for number in present])
    known = len(result.maps.queries.names)
    means = result.maps.mean_by_label(result.label_tensor).numpy()
    # A background that was added has no probability of its own.
    confidence = [means[number] if number < known else np.nan for number in present]
    return supervision.Detections(
        xyxy=np.array([_box(mask) for mask in masks], dtype=np.float32),
        mask=masks,
        confidence=np.array(confidence, dtype=np.float32),
        class_id=np.array(present),
        data={"class_name": np.array([result.class_names[number] for number in present])},
    )


def _supervision() -> ModuleType:
    try:
        import supervision
    except ImportError:
        raise InputError(
            "to_detections needs supervision, which is not installed: pip install supervision"
        ) from None
    return supervision


def _present(result: Segmentation) -> Iterator[tuple[int, int]]:
    """(number, pixels) of the classes that label something, the largest first."""
    counts = result.pixel_counts
    for number in np.argsort(-counts, kind="stable"):
        if counts[number]:
            yield int(number), int(counts[number])


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what is True in a mask (H,W), the last two exclusive."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def _polygons(mask: np.ndarray, left: int, top: int) -> list[list[list[list[float]]]]:
    """Outlines of a mask whose corner lies at (left, top)."""
    from contourpy import FillType, contour_generator

    # A frame of zeros, so that what touches the edge is closed there.
    field = np.pad(mask, 1).astype(np.float32)
    generator = contour_generator(z=field, fill_type=FillType.OuterOffset)
    outlines, offsets = cast(Any, generator.filled(0.5, 2.0))
    # Of the frame, and from the middles of pixels to their corners.
    shift = np.array([left - 0.5, top - 0.5])
    return [
        [(_corners(points[first:last]) + shift).tolist() for first, last in pairwise(starts)]
        for points, starts in zip(outlines, offsets, strict=True)
    ]


def _corners(ring: np.ndarray) -> np.ndarray:
    """A closed ring (n,2) without the points that lie on a straight line between others."""
    points = ring[:-1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    kept = points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return np.vstack([kept, kept[:1]])
