"""Composes the scenes that the embedded model is shown with and judged by.

    python -m fsa.tiny.compose demo   --pictographs DIR --out fsa/tiny/demo
    python -m fsa.tiny.compose guard  --pictographs DIR --out tests/scenes
    python -m fsa.tiny.compose splits --pictographs DIR --out SPLITS

`demo` writes the pictures of `fsa demo`, `guard` the held-out scenes of tests/test_quality.py, and
`splits` the test splits of `python -m bench quality`, each a folder with images/, masks/,
classes.txt and scenes.json. Every one of them has a seed of its own; training's are below 100.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsa.tiny.captions import caption
from fsa.tiny.pictographs import TRAIN_STYLES, UNSEEN_STYLE
from fsa.tiny.scenes import Composer, Scenes, Sprites
from fsa.tiny.vocabulary import CLASSES, OBJECTS

PICTURES = 200
"""Of a split."""

SINGLE_PICTURES = 4 * len(OBJECTS)
"""Of a split of single objects: each of them four times."""

SIDE = 224
"""Of the scenes of the splits, in pixels."""

_AT_ONCE = 25


@dataclass(frozen=True)
class Split:
    """Scenes of 224 x 224 pixels with 1 to 4 objects, or with a single large one.

    Attributes:
        name: of the folder.
        seed: of everything random.
        styles: of the pictographs.
        synonyms: True asks for the classes by names that no caption of training used.
        single: True composes one large object a scene, for top-1 accuracy.
    """

    name: str
    seed: int
    styles: tuple[str, ...] = TRAIN_STYLES
    synonyms: bool = False
    single: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every class of `fsa.tiny.vocabulary.CLASSES` in this split."""
        return tuple(e.unseen_synonyms[0] if self.synonyms else e.name for e in CLASSES)

    def scenes(self, pictographs: Path, count: int) -> Iterator[Scenes]:
        """The first scenes of the split, some at a time.

        Args:
            pictographs: what `python -m fsa.tiny.pictographs` wrote.
            count: how many in all.
        """
        composer = Composer(
            Sprites(pictographs, self.styles),
            (SIDE, SIDE),
            seed=self.seed,
            object_sizes=_SINGLE_SIZES if self.single else _OBJECT_SIZES,
        )
        for first in range(0, count, _AT_ONCE):
            indices = range(first, min(first + _AT_ONCE, count))
            yield composer.compose(indices, objects=1 if self.single else None)


_OBJECT_SIZES = (40, 140)
_SINGLE_SIZES = (100, 170)

VALIDATION = Split("validation", seed=100)
"""For what is chosen by looking, such as the default sizes of windows; never reported."""

TESTS = (
    Split("test-seen", seed=101),
    Split("test-unseen", seed=102, styles=(UNSEEN_STYLE,)),
    Split("test-synonyms", seed=103, synonyms=True),
)
# These lack some of the objects, so there is no split of theirs alone.
_INCOMPLETE_STYLES = ("fxemoji", "streamline")
SINGLES = (
    *(
        Split(f"single-{style}", seed=110 + number, styles=(style,), single=True)
        for number, style in enumerate((*TRAIN_STYLES, UNSEEN_STYLE))
        if style not in _INCOMPLETE_STYLES
    ),
    Split("single-synonyms", seed=119, synonyms=True, single=True),
)
GUARD = Split("guard", seed=120)
GUARD_PICTURES = 12

NAMES = 20
"""How many classes a picture is asked for where it is not all of them; VOC has as many."""

_DEMO_SEED = 2027
_DEMO_SIZES = ((336, 448), (336, 336), (336, 448), (448, 336), (336, 448), (336, 336))
_DEMO_OBJECT_SIZES = (72, 190)


def compose_demo(pictographs: Path, out: Path) -> None:
    """Writes the pictures of the demo, their masks and scenes.json; every other one unseen."""
    entries = []
    for number, size in enumerate(_DEMO_SIZES):
        styles = (UNSEEN_STYLE,) if number % 2 else TRAIN_STYLES
        composer = Composer(
            Sprites(pictographs, styles), size, seed=_DEMO_SEED, object_sizes=_DEMO_OBJECT_SIZES
        )
        scenes = composer.compose([number], objects=3 + number % 3)
        entries.append(
            {**_write_scene(scenes, 0, out, f"scene-{number + 1}"), "styles": list(styles)}
        )
    _write_json(out / "scenes.json", entries)


def compose_guard(pictographs: Path, out: Path) -> None:
    """Writes the held-out scenes of the tests, their masks and scenes.json.

    All are asked for the classes that are in any of them.
    """
    (scenes,) = GUARD.scenes(pictographs, GUARD_PICTURES)
    classes = np.unique(scenes.masks.cpu().numpy())
    entries = [
        _write_scene(scenes, row, out, f"scene-{row + 1}", classes) for row in range(GUARD_PICTURES)
    ]
    _write_json(out / "scenes.json", entries)


def asked_classes(mask: np.ndarray, split: Split, number: int) -> np.ndarray:
    """The classes in a mask and others drawn to make `NAMES`, in order: (NAMES,)."""
    present = np.unique(mask)
    rng = np.random.default_rng((split.seed, number, 2))
    others = np.setdiff1d(np.arange(len(CLASSES)), present)
    return np.sort(np.append(present, rng.choice(others, NAMES - len(present), replace=False)))


def _write_scene(
    scenes: Scenes, row: int, out: Path, name: str, classes: np.ndarray | None = None
) -> dict[str, Any]:
    """One picture with a mask of `classes`, by default its own; returns its entry of the list."""
    mask = scenes.masks[row].cpu().numpy()
    classes = np.unique(mask) if classes is None else classes
    out.mkdir(parents=True, exist_ok=True)
    _write_picture(scenes, row, out / f"{name}.png")
    own = np.searchsorted(classes, mask).astype(np.uint8)
    Image.fromarray(own).save(out / f"{name}-mask.png", optimize=True)
    return {
        "picture": f"{name}.png",
        "mask": f"{name}-mask.png",
        "classes": [CLASSES[i].name for i in classes],
    }


def compose_split(split: Split, pictographs: Path, out: Path, count: int = PICTURES) -> None:
    """Writes a split as a folder.

    images/NUMBER.png; masks/NUMBER.png with indices into classes.txt, which has a class a line;
    scenes.json with the classes present in each scene and a caption of it.
    """
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in split.class_names))
    entries: list[dict[str, Any]] = []
    for scenes in split.scenes(pictographs, count):
        for row, (objects, textures) in enumerate(
            zip(scenes.objects, scenes.textures, strict=True)
        ):
            name = f"{len(entries):04}.png"
            mask = scenes.masks[row].cpu().numpy()
            _write_picture(scenes, row, out / "images" / name)
            Image.fromarray(mask).save(out / "masks" / name, optimize=True)
            rng = np.random.default_rng((split.seed, len(entries), 1))
            entries.append(
                {
                    "picture": f"images/{name}",
                    "mask": f"masks/{name}",
                    "classes": [split.class_names[i] for i in np.unique(mask)],
                    "caption": caption(objects, textures, rng),
                }
            )
    _write_json(out / "scenes.json", entries)


def _write_picture(scenes: Scenes, row: int, file: Path) -> None:
    picture = scenes.pictures[row].permute(1, 2, 0).cpu().numpy()
    Image.fromarray(picture).save(file, optimize=True)


def _write_json(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    file.write_text(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("demo", "guard", "splits"))
    parser.add_argument("--pictographs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "demo":
        compose_demo(arguments.pictographs, arguments.out)
    elif arguments.what == "guard":
        compose_guard(arguments.pictographs, arguments.out)
    else:
        for split in (*TESTS, *SINGLES):
            count = SINGLE_PICTURES if split.single else PICTURES
            compose_split(split, arguments.pictographs, arguments.out / split.name, count)


if __name__ == "__main__":
    main()
