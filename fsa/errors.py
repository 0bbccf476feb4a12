"""The exceptions of the library. Every message is one or two readable lines that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType


class FSAError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(FSAError, ValueError):
    """An argument or a file that cannot be used as it is; the message names it."""


class NotFiniteError(InputError):
    """NaN or inf where numbers were expected."""


class FSAWarning(UserWarning):
    """Something that is computed, but perhaps not as was meant."""


class ModelUnavailableError(FSAError, RuntimeError):
    """Weights that are not available: a file is missing, or the hub cannot be reached."""


class OutOfMemoryError(FSAError, MemoryError):
    """Sizes that do not fit into memory. Everything allocated for the failed call has been
    freed."""


class named_out_of_memory(AbstractContextManager[None]):
    """Turns every allocator's complaint into an `OutOfMemoryError` that says what to do.

    Args:
        what: that did not fit, with its sizes; or what returns it, called only then.
        advice: what makes it smaller.
    """

    __slots__ = ("_advice", "_what")

    def __init__(self, what: str | Callable[[], str], advice: str) -> None:
        self._what = what
        self._advice = advice

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not _is_out_of_memory(error):
            return
        # Its frames hold the tensors that were made before the one that did not fit.
        error.__traceback__ = None
        what = self._what if isinstance(self._what, str) else self._what()
        raise OutOfMemoryError(f"out of memory: {what}; {self._advice}") from None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OutOfMemoryError) or not isinstance(error, MemoryError | RuntimeError):
        return False
    # By name, not by type: PyTorch is not imported before a command needs it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # The CPU's allocator raises a plain RuntimeError; a product of sizes may pass what it counts.
    return "DefaultCPUAllocator" in str(error) or "Storage size calculation overflow" in str(error)
