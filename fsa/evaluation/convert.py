"""Masks as they are shipped, renumbered as the benchmarks count them."""

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
from fsa.evaluation.layouts import IGNORE, LAYOUTS, ORIGINAL_SUFFIX
from fsa.files import make_directory, write_whole

# COCO-Stuff stores category ids from 0: 80 objects below 91, then 91 kinds of stuff. These ids
# below 91 were once planned and no annotation uses them.
_COCO_UNUSED = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})
_COCO_FIRST_STUFF = 91
_COCO_IDS = 182

# Cityscapes' label ids of the 19 evaluated classes, in the order of their train ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

_IMPOSSIBLE = -1


def table(name: str) -> np.ndarray:
    """(256,) int16: what becomes of each stored id, -1 for one that cannot occur.

    "coco_stuff": 0 to 170 in the order of ids, 255 stays. "coco_object": 0 is background, stuff
    and unlabelled pixels included, and objects are 1 to 80. "cityscapes": train ids, 255 for the
    rest.
    """
    if name == "cityscapes":
        classes = np.full(256, IGNORE, dtype=np.int16)
        classes[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
        return classes
    classes = np.full(256, _IMPOSSIBLE, dtype=np.int16)
    used = [identifier for identifier in range(_COCO_IDS) if identifier not in _COCO_UNUSED]
    classes[used] = np.arange(len(used))
    classes[IGNORE] = IGNORE
    if name == "coco_object":
        objects = np.where(np.arange(256) < _COCO_FIRST_STUFF, classes + 1, 0)
        classes = np.where(classes == _IMPOSSIBLE, _IMPOSSIBLE, objects).astype(np.int16)
    return classes


def convert(
    name: str,
    root: Path,
    *,
    workers: int | None = None,
    progress: Callable[[Iterable[None], int], Iterable[None]] | None = None,
) -> int:
    """Writes the masks of a benchmark's validation split beside the original ones.

    Args:
        name: "coco_object", "coco_stuff" or "cityscapes".
        root: where the benchmark lies.
        workers: processes; default as many as there are cores.
        progress: wraps the results as they come, with their count.

    Returns:
        How many masks were written; those that were there already are left.

    Raises:
        InputError: what is missing, or a mask that cannot be read or holds an impossible id.
    """
    if name not in ORIGINAL_SUFFIX:
        raise InputError(f"{name!r} is not converted here: {', '.join(ORIGINAL_SUFFIX)} are")
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be an integer >= 1")
    folder = Path(root) / LAYOUTS[name].masks
    if not folder.is_dir():
        raise InputError(f"{root}: there is no {LAYOUTS[name].masks}/")
    suffix, original = LAYOUTS[name].mask_suffix, ORIGINAL_SUFFIX[name]
    sources = [path for path in sorted(folder.rglob(f"*{original}")) if "TrainIds" not in path.name]
    if not sources:
        raise InputError(f"{folder}: there is no *{original} to renumber")
    make_directory(folder)
    pairs = [(path, path.with_name(path.name.removesuffix(original) + suffix)) for path in sources]
    todo = [pair for pair in pairs if not pair[1].exists()]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        results: Iterable[None] = pool.map(partial(_renumber, name), todo, chunksize=8)
        for _ in progress(results, len(todo)) if progress else results:
            pass
    return len(todo)


def _renumber(name: str, pair: tuple[Path, Path]) -> None:
    source, target = pair
    try:
        with Image.open(source, formats=("PNG",)) as opened:
            stored = np.asarray(opened)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{source}: the mask cannot be read ({error})") from None
    if stored.ndim != 2 or stored.dtype != np.uint8:
        raise InputError(f"{source}: not an original mask, which are grey with 8 bits")
    mask = table(name)[stored]
    if (mask == _IMPOSSIBLE).any():
        raise InputError(
            f"{source}: the id {stored[mask == _IMPOSSIBLE].min()} cannot occur in {name}'s "
            "original masks; was this one converted already?"
        )
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    write_whole(target, lambda out: out.write(buffer.getvalue()))
