"""One evaluation at a time in a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fsa.errors import InputError
from fsa.evaluation.processes import Group

_FILE = ".lock"

# A process does not lock itself out by the system's locks.
_held: set[Path] = set()


@contextmanager
def exclusive(folder: Path, group: Group) -> Iterator[None]:
    """Holds a folder for the processes of one run.

    The system lets go of the lock when the first process ends, however it ends. The file stays.

    Args:
        folder: it must be there.
        group: all call this together; the first holds the lock.

    Raises:
        InputError: another run holds it, in every process of the group.
    """
    path = (folder / _FILE).resolve()
    stream: BinaryIO | None = None
    refusal = ""
    if group.rank == 0:
        try:
            stream = _lock(path)
        except BlockingIOError:
            refusal = (
                f"{folder}: another evaluation is running there{_holder(path)}; wait for it, or "
                "pass another --out"
            )
    try:
        # The other processes would wait for ever for one that was refused.
        refusal = "".join(group.gather(refusal))
        if refusal:
            raise InputError(refusal)
        yield
    finally:
        if stream is not None:
            _held.discard(path)
            stream.close()


def _lock(path: Path) -> BinaryIO:
    """The open file, locked; raises BlockingIOError where another one holds the lock."""
    if path in _held:
        raise BlockingIOError
    try:
        stream = path.open("r+b" if path.exists() else "w+b", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        _system_lock(stream)
    except (BlockingIOError, PermissionError):
        stream.close()
        raise BlockingIOError from None
    except OSError as error:
        # Some network file systems have no locks.
        print(
            f"{path.parent} cannot be locked ({error.strerror}): see to it that no other "
            "evaluation writes there",
            file=sys.stderr,
        )
    _held.add(path)
    stream.truncate(0)
    stream.write(str(os.getpid()).encode())
    return stream


def _system_lock(stream: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:
        # Windows. One byte far behind the number of the process, which others read.
        import msvcrt

        stream.seek(1 << 20)
        lock = vars(msvcrt)
        lock["locking"](stream.fileno(), lock["LK_NBLCK"], 1)
        stream.seek(0)
    else:
        # Not flock: its locks pass on to the processes that decode, which outlive a killed one.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(path: Path) -> str:
    try:
        number = path.read_bytes()[:20].decode("ascii").strip()
    except (OSError, ValueError):
        return ""
    return f" (process {number})" if number.isdecimal() else ""
