"""What a segmentation gives back, and how it is kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fsa import viz
from fsa.errors import InputError
from fsa.images import Picture

_PALETTE_CLASSES = 256


@dataclass(frozen=True)
class Segmentation:
    """A labelled picture.

    Attributes:
        labels: (H,W) int32 at the picture's own size (EXIF orientation applied), indices into
            `class_names`.
        scores: (C,h,w) float32, probabilities of the classes asked for, at the working size.
        class_names: the first name of each class; a background that was added comes last.
        settings: everything needed to do it again.
        picture: what was segmented.
    """

    labels: np.ndarray
    scores: np.ndarray
    class_names: list[str]
    settings: dict[str, Any]
    picture: Picture = field(repr=False)

    def areas(self) -> dict[str, float]:
        """Share of the picture by class, largest first; classes that are absent have 0."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
        order = np.argsort(-counts, kind="stable")
        return {self.class_names[i]: float(counts[i] / self.labels.size) for i in order}

    def overlay(self, alpha: float = 0.6, legend: bool = True) -> Image.Image:
        """The picture tinted by its labels, with a legend beside it."""
        rgb = self.picture.rgb.permute(1, 2, 0).numpy()
        return viz.overlay(rgb, self.labels, self.class_names, alpha=alpha, legend=legend)

    def label_image(self) -> Image.Image:
        """The labels as a picture: with the palette up to 256 classes, else 16 bits deep."""
        if len(self.class_names) > _PALETTE_CLASSES:
            return Image.fromarray(self.labels.astype(np.uint16))
        image = Image.fromarray(self.labels.astype(np.uint8))
        image.putpalette(viz.palette(len(self.class_names)).tobytes())
        return image

    def save(self, directory: str | os.PathLike[str], stem: str | None = None) -> dict[str, Path]:
        """Writes STEM-labels.png, STEM-overlay.png and STEM.json.

        The JSON holds the picture's name and its size in pixels, the class names, their areas and
        the settings.

        Args:
            directory: made if it is not there.
            stem: default the picture's name; what could leave the directory is replaced.

        Returns:
            "labels", "overlay", "json" -> file.

        Raises:
            InputError: a directory or file that cannot be written.
        """
        folder = Path(directory)
        stem = safe_stem(self.picture.name if stem is None else stem)
        height, width = self.labels.shape
        record = {
            "picture": {"name": self.picture.name, "width": width, "height": height},
            "classes": self.class_names,
            "areas": self.areas(),
            "settings": self.settings,
        }
        files = {
            "labels": folder / f"{stem}-labels.png",
            "overlay": folder / f"{stem}-overlay.png",
            "json": folder / f"{stem}.json",
        }
        text = json.dumps(record, indent=2) + "\n"
        make_directory(folder)
        write_whole(files["labels"], lambda out: self.label_image().save(out, "PNG"))
        write_whole(files["overlay"], lambda out: self.overlay().save(out, "PNG"))
        write_whole(files["json"], lambda out: out.write(text.encode()))
        return files


def safe_stem(name: str) -> str:
    """A name without what could lead out of a directory or trouble a file system."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "picture"


def make_directory(folder: Path) -> None:
    """Makes a directory that can be written to.

    Raises:
        InputError: it cannot be made or written; the message names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise InputError(f"{folder}: cannot write there (not a directory)") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror})") from None


def make_room_for_png(file: Path) -> None:
    """Makes the directory of a PNG that is to be written later.

    Raises:
        InputError: as `make_directory`; a name that is no PNG's.
    """
    if file.suffix.lower() != ".png":
        raise InputError(f"{str(file)!r} is no name for the figure, a PNG: it must end in .png")
    make_directory(file.absolute().parent)


def write_whole(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        InputError: it cannot be written; the message names it.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with temporary.open("wb") as out:
            write(out)
        temporary.replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from None
    finally:
        # Where even the name was not accepted there is nothing to take away.
        with contextlib.suppress(OSError):
            temporary.unlink()
