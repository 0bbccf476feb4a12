"""What a segmentation gives back, and how it is kept."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from fsa.arguments import as_integer
from fsa.draw.colours import colours_of_classes
from fsa.draw.figures import class_counts, overlay
from fsa.draw.lettering import percent, shortened
from fsa.errors import InputError
from fsa.files import RESULT_ENDINGS, free_stem, make_directory, safe_stem, write_whole
from fsa.pictures.reading import Picture
from fsa.segment.probabilities import ClassMaps
from fsa.segment.shapes import detections_of, masks_of

_PALETTE_CLASSES = 256
CLASSES_NAMED = 4
"""How many classes a line about a result names."""

_SHOWN_SIZE = (1024, 1024)


@dataclass(frozen=True, repr=False)
class Segmentation:
    """A labelled picture.

    Attributes:
        label_tensor: (H,W) int32 at the picture's own size (EXIF orientation applied), indices into
            `class_names`; on the CPU, or where it was asked for on the model's device.
        maps: how probable the classes are, computed when it is asked for.
        class_names: the first name of each class; a background that was added comes last.
        settings: every setting that is needed to repeat the run.
        picture: what was segmented.
    """

    label_tensor: Tensor
    maps: ClassMaps
    class_names: list[str]
    settings: dict[str, Any]
    picture: Picture

    @cached_property
    def labels(self) -> np.ndarray:
        """(H,W) int32, `label_tensor` in NumPy; without a copy where that is on the CPU."""
        return self.label_tensor.cpu().numpy()

    @cached_property
    def score_tensor(self) -> Tensor:
        """Probabilities (C,h,w) float32 of the classes asked for, at the working size, where
        `label_tensor` is.

        Raises:
            InputError: as `probabilities`.
        """
        return self.maps.scores()

    @cached_property
    def scores(self) -> np.ndarray:
        """`score_tensor` in NumPy, without a copy where that is on the CPU."""
        return self.score_tensor.cpu().numpy()

    def probabilities(self, name: str | int) -> np.ndarray:
        """How probable a class is at every pixel, (H,W) float32 at the picture's own size.

        Args:
            name: the name or the number of a class that was asked for.

        Raises:
            InputError: another name or number; the cosines of a picture of which more than 1 GiB
                would have had to be kept.
        """
        return self.maps.of_class(self._number(name)).cpu().numpy()

    def _number(self, name: str | int) -> int:
        names = self.maps.queries.names
        number = as_integer(name)
        if number is None and name in names:
            number = names.index(str(name))
        if number is None or not 0 <= number < len(names):
            raise InputError(
                f"{name!r} is not one of the {len(names)} classes that were asked for, by its "
                "first name or its number"
            )
        return number

    @cached_property
    def pixel_counts(self) -> np.ndarray:
        """Pixels of each class, (C,) int64."""
        return class_counts(self.labels, len(self.class_names))

    def areas(self) -> dict[str, float]:
        """Share of the picture by class, largest first; classes that are absent have 0."""
        counts = self.pixel_counts
        order = np.argsort(-counts, kind="stable")
        return {self.class_names[i]: float(counts[i] / self.labels.size) for i in order}

    def named_areas(self) -> list[str]:
        """The classes that are present and their shares, such as "sky 12%", largest first."""
        return [
            f"{shortened(name)} {percent(share)}"
            for name, share in self.areas().items()
            if share > 0
        ]

    def overlay(self, alpha: float = 0.6, legend: bool = True) -> Image.Image:
        """The picture tinted by its labels, with a legend beside it."""
        rgb = self.picture.rgb.permute(1, 2, 0).numpy()
        return overlay(rgb, self.labels, self.class_names, alpha=alpha, legend=legend)

    def label_image(self) -> Image.Image:
        """The labels as a picture: in the overlay's colours, or 16 bits deep above 256."""
        if len(self.class_names) > _PALETTE_CLASSES:
            return Image.fromarray(self.labels.astype(np.uint16))
        image = Image.fromarray(self.labels.astype(np.uint8))
        image.putpalette(colours_of_classes(self.pixel_counts).tobytes())
        return image

    def to_detections(self) -> Any:
        """As `supervision.Detections`, to be drawn, filtered or tracked with supervision.

        One detection for each class that is present, the largest first: its mask, the box around
        it, its number, its name in `data["class_name"]`, and as confidence the mean probability of
        the class over its pixels (NaN of a background that was added).

        Raises:
            InputError: supervision is not installed; as `probabilities`.
        """
        return detections_of(self)

    def masks(self, shapes: Iterable[str] = ()) -> list[dict[str, Any]]:
        """A record of each class that is present, as plain values; see
        `fsa.segment.shapes.masks_of`.

        Args:
            shapes: "rle" for COCO's run lengths, "polygons" for outlines.

        Raises:
            InputError: another shape, or one whose package is not installed.
        """
        return masks_of(self, shapes)

    def save(
        self,
        directory: str | os.PathLike[str],
        stem: str | None = None,
        *,
        shapes: Iterable[str] = (),
    ) -> dict[str, Path]:
        """Writes STEM-labels.png, STEM-overlay.png and STEM.json.

        The JSON holds the picture's name, its absolute path and its size in pixels, the
        class names, their areas and the settings.

        Args:
            directory: made if it is not there.
            stem: default the picture's name, with a number where the result of another file lies
                under it; what could leave the directory is replaced.
            shapes: what the JSON holds besides, under "masks": as `masks` takes it.

        Returns:
            "labels", "overlay", "json" -> file.

        Raises:
            InputError: a directory or file that cannot be written; as `masks`.
        """
        shapes = tuple(shapes)
        folder = Path(directory)
        path = None if self.picture.path is None else os.path.abspath(self.picture.path)
        if stem is not None:
            stem = safe_stem(stem)
        elif path is None:
            stem = safe_stem(self.picture.name)
        else:
            stem = free_stem(folder, safe_stem(self.picture.name), path)
        height, width = self.labels.shape
        record: dict[str, Any] = {
            "picture": {
                "name": self.picture.name,
                "path": path,
                "width": width,
                "height": height,
            },
            "classes": self.class_names,
            "areas": self.areas(),
            "settings": self.settings,
        }
        if shapes:
            record["masks"] = self.masks(shapes)
        files = {kind: folder / f"{stem}{ending}" for kind, ending in RESULT_ENDINGS.items()}
        # The numbers of masks would be a line each.
        text = json.dumps(record, indent=None if shapes else 2) + "\n"
        make_directory(folder)
        write_whole(files["labels"], lambda out: self.label_image().save(out, "PNG"))
        write_whole(files["overlay"], lambda out: _save_png(self.overlay(), out))
        write_whole(files["json"], lambda out: out.write(text.encode()))
        return files

    def __repr__(self) -> str:
        height, width = self.label_tensor.shape
        shares = ", ".join(self.named_areas()[:CLASSES_NAMED])
        return f"<Segmentation of {self.picture.label}, {width} x {height} pixels: {shares}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the overlay, at most 1024 pixels wide and high."""
        overlay = self.overlay()
        overlay.thumbnail(_SHOWN_SIZE)
        out = io.BytesIO()
        overlay.save(out, "PNG")
        return out.getvalue()


def _save_png(image: Image.Image, out: BinaryIO) -> None:
    # Twice as fast as Pillow's default of 6, and the file a tenth larger.
    image.save(out, "PNG", compress_level=4)
