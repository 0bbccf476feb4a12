"""Composes the pictures of `fsa demo`, with their masks.

    python -m fsa.tiny.compose --pictographs DIR --out fsa/tiny/demo

Half of them in a style of pictograph that training never sees; no scene is one of training's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from fsa.tiny.pictographs import STYLES
from fsa.tiny.scenes import Composer, load_sprites
from fsa.tiny.train import TRAIN_STYLES
from fsa.tiny.vocabulary import CLASSES

SEED = 2026
UNSEEN_STYLES = tuple(style for style in STYLES if style not in TRAIN_STYLES)
SIZES = ((336, 448), (336, 336), (336, 448), (448, 336), (336, 448), (336, 336))


def compose(pictographs: Path, out: Path) -> None:
    """Writes the pictures, their masks and scenes.json."""
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, size in enumerate(SIZES):
        styles = UNSEEN_STYLES if number % 2 else TRAIN_STYLES
        composer = Composer(
            load_sprites(pictographs, styles),
            size,
            seed=SEED,
            object_sizes=(72, 190),
            most_objects=5,
        )
        scene = composer.scene(number, objects=3 + number % 3)
        present = np.unique(scene.mask)
        mask = np.searchsorted(present, scene.mask).astype(np.uint8)
        name = f"scene-{number + 1}"
        Image.fromarray(scene.picture).save(out / f"{name}.png", optimize=True)
        Image.fromarray(mask).save(out / f"{name}-mask.png", optimize=True)
        entries.append(
            {
                "picture": f"{name}.png",
                "mask": f"{name}-mask.png",
                "classes": [CLASSES[i].name for i in present],
                "styles": list(styles),
            }
        )
    (out / "scenes.json").write_text(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictographs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    compose(arguments.pictographs, arguments.out)


if __name__ == "__main__":
    main()
