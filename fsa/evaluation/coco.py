"""COCO-Stuff's masks renumbered for COCO-Object and COCO-Stuff.

COCO-Stuff stores category ids from 0 with gaps: 80 objects below 90, 91 kinds of stuff from 91.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fsa.errors import InputError
from fsa.evaluation.datasets import LAYOUTS
from fsa.metrics import IGNORE
from fsa.result import make_directory, write_whole

# Category ids, from 0, that COCO once planned and no annotation uses.
_UNUSED = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})
_IDS = 182
_FIRST_STUFF = 91

CONVERTIBLE = ("coco_object", "coco_stuff")


def table(name: str) -> np.ndarray:
    """(256,) int16: the class of each stored id, -1 for one that cannot occur.

    "coco_stuff": 0 to 170 in the order of ids, 255 stays. "coco_object": 0 is background, stuff
    and unlabelled pixels included, and objects are 1 to 80.
    """
    classes = np.full(256, -1, dtype=np.int16)
    used = [identifier for identifier in range(_IDS) if identifier not in _UNUSED]
    for train_id, identifier in enumerate(used):
        classes[identifier] = train_id
    classes[IGNORE] = IGNORE
    if name == "coco_object":
        objects = np.arange(256) < _FIRST_STUFF
        classes = np.where(classes < 0, -1, np.where(objects, classes + 1, 0))
    return classes.astype(np.int16)


def convert(
    name: str,
    root: Path,
    *,
    workers: int | None = None,
    progress: Callable[[Iterable[Path], int], Iterable[Path]] | None = None,
) -> int:
    """Writes the masks of COCO-Object or COCO-Stuff beside COCO-Stuff's own.

    Args:
        name: one of `CONVERTIBLE`.
        root: with annotations/val2017/*.png as COCO-Stuff ships them.
        workers: processes; default as many as there are cores.
        progress: wraps the results as they come, with their count.

    Returns:
        How many masks were written; those that were there already are left.

    Raises:
        InputError: what is missing, or a mask that cannot be read or is not COCO-Stuff's.
    """
    if name not in CONVERTIBLE:
        raise InputError(f"{name!r} needs no conversion here: {', '.join(CONVERTIBLE)} can be made")
    layout = LAYOUTS[name]
    folder = Path(root) / layout.masks
    if not folder.is_dir():
        raise InputError(f"{root}: there is no {layout.masks}/; unpack stuffthingmaps there")
    sources = [path for path in sorted(folder.glob("*.png")) if "TrainIds" not in path.name]
    if not sources:
        raise InputError(f"{folder}: there are no masks of COCO-Stuff (000000000139.png, ...)")
    make_directory(folder)
    todo = [path for path in sources if not _target(path, layout.mask_suffix).exists()]
    work = partial(_convert, table(name), layout.mask_suffix)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        results: Iterable[Path] = pool.map(work, todo, chunksize=8)
        for _ in progress(results, len(todo)) if progress else results:
            pass
    return len(todo)


def _target(source: Path, suffix: str) -> Path:
    return source.with_name(f"{source.stem}{suffix}")


def _convert(classes: np.ndarray, suffix: str, source: Path) -> Path:
    try:
        with Image.open(source) as opened:
            stored = np.asarray(opened)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{source}: the mask cannot be read ({error})") from None
    if stored.ndim != 2 or stored.dtype != np.uint8:
        raise InputError(f"{source}: not a mask of COCO-Stuff, which are grey with 8 bits")
    mask = classes[stored]
    if mask.min() < 0:
        raise InputError(
            f"{source}: the id {stored[mask < 0].min()} is not one of COCO-Stuff's; "
            "was it converted already?"
        )
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    target = _target(source, suffix)
    write_whole(target, lambda out: out.write(buffer.getvalue()))
    return target
