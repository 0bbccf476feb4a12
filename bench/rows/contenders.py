"""What the kinds of rows share: a row, its contenders, and how one fails."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

Call = Callable[[], Tensor]
Build = Callable[[], Call]

MEASURES = ("time", "numerics", "memory", "labels")

# What a call that compares labels returns: of all pixels, and of the picture where it is lowest.
SHARES = ("equal", "lowest")


class DoesNotFit(Exception):
    """A contender needs more memory than there is."""


class NotInstalled(Exception):
    """A contender needs a package that is not there."""


class Row(ABC):
    """One line of the benchmark: a problem, and several ways of solving it.

    Subclasses are frozen dataclasses whose fields are numbers, strings and paths, so that a row can
    be sent to another process and written down.

    Attributes:
        kind: "op", "step", "host", "picture" or "dtypes".
        graphs: whether a call can be captured in a CUDA graph.
    """

    kind: str
    graphs: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """Names the row in results and tables."""

    @abstractmethod
    def contenders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
        """name -> function that prepares the contender and returns one call of it.

        The inputs are the same for all; what only one needs is made by its own function.
        """

    @abstractmethod
    def small(self) -> Row:
        """The same kind of row at a toy size."""


@dataclass(frozen=True)
class Job:
    """What is measured of a row at once.

    Args:
        row: the row.
        measures: of `MEASURES`.
    """

    row: Row
    measures: tuple[str, ...]


def is_ours(contender: str) -> bool:
    """Whether a contender is this library."""
    return contender.startswith("fsa")


def failure(error: BaseException) -> dict[str, str]:
    """How an exception is written down."""
    if isinstance(error, NotInstalled):
        return {"not_installed": str(error)}
    text = f"{type(error).__name__}: {error}".strip()
    out_of_memory = isinstance(error, (DoesNotFit, MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("out of memory", "ALLOC_FAILED", "t allocate memory"))
    )
    return {"does_not_fit" if out_of_memory else "error": text[:600]}


def bytes_free(device: torch.device) -> int:
    """Memory that a contender may take."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 << 30
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(available[0]) * 1024 if available else 4 << 30


def require_memory(needed: int, device: torch.device) -> None:
    """Raises before an attempt that the operating system would end instead of refusing.

    Raises:
        DoesNotFit: more is needed than is free.
    """
    free = bytes_free(device)
    if needed > 0.8 * free:
        raise DoesNotFit(
            f"needs at least {needed / 2**30:.1f} GiB at once; {free / 2**30:.1f} GiB are free"
        )


def release(device: torch.device) -> None:
    """Gives memory that nothing refers to back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(row: Row) -> dict[str, Any]:
    """A row as data. Of a path its last name: where it lies is of no interest elsewhere."""
    fields = {
        name: value.name if isinstance(value, Path) else value for name, value in vars(row).items()
    }
    return {"kind": row.kind, "name": row.name, **fields}
