"""Small datasets in the layouts of the real ones, made in a directory of the test's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("green", "blue", "red", "white")


def write_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_picture(path: Path, size: tuple[int, int], seed: int) -> None:
    """A picture of (height, width) with some structure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def folder(root: Path, pictures: int = 7, classes: str = "cat\ndog, hound\ngrass\n") -> Path:
    """images/, masks/ and classes.txt with pictures of several sizes; 255 in every mask."""
    rng = np.random.default_rng(0)
    count = len(classes.splitlines())
    for number in range(pictures):
        size = (40 + 6 * (number % 3), 50 + 9 * (number % 2))
        write_picture(root / "images" / f"p{number}.jpg", size, number)
        mask = rng.integers(0, count, size, dtype=np.uint8)
        mask[:3] = 255
        write_mask(root / "masks" / f"p{number}.png", mask)
    (root / "classes.txt").write_text(classes)
    return root


def counts(folder: Path) -> np.ndarray:
    """The matrix of a finished run."""
    return np.array(json.loads((folder / "result.json").read_text())["confusion"])
