"""Writing files: names that are safe, directories that can be written, files that are whole."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fsa.errors import InputError


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
