"""Writing files: names that are safe, directories that can be written, files that are whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from fsa.errors import InputError


def safe_stem(name: str) -> str:
    """A name without what could lead out of a directory or trouble a file system."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "picture"


RESULT_ENDINGS = {"labels": "-labels.png", "overlay": "-overlay.png", "json": ".json"}
"""What the files of a segmentation are called after its stem."""


def read_record(file: Path) -> dict[str, Any] | None:
    """What `Segmentation.save` wrote as JSON, or None for what is not there or something else."""
    try:
        record = json.loads(file.read_bytes())
        return record if "fsa" in record["settings"] and "areas" in record else None
    # Whatever a file of that name may hold that is none of ours.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def results_in(folder: Path) -> frozenset[str]:
    """Names of the pictures in a directory that `Segmentation.save` wrote, known by their JSON."""
    names = []
    for labels in folder.glob(f"*{RESULT_ENDINGS['labels']}"):
        stem = labels.name.removesuffix(RESULT_ENDINGS["labels"])
        if read_record(folder / f"{stem}{RESULT_ENDINGS['json']}") is not None:
            names += [stem + RESULT_ENDINGS["labels"], stem + RESULT_ENDINGS["overlay"]]
    return frozenset(names)


def free_stem(folder: Path, stem: str, path: str, taken: Iterable[str] = ()) -> str:
    """A stem under which no result of another picture lies: NAME, or NAME-2, NAME-3, ...

    Args:
        folder: of the results.
        stem: the safe name wanted.
        path: of the picture, absolute.
        taken: stems that are given away already, in small letters: there are file systems that do
            not tell them from capitals.
    """
    number, candidate = 2, stem
    while candidate.casefold() in taken or not _free(folder, candidate, path):
        candidate = f"{stem}-{number}"
        number += 1
    return candidate


def _free(folder: Path, stem: str, path: str) -> bool:
    record = read_record(folder / f"{stem}{RESULT_ENDINGS['json']}")
    return record is None or record.get("picture", {}).get("path") in (None, path)


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
