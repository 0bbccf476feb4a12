"""The exceptions of the library. Every message is one or two readable lines that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def named_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Turns every allocator's complaint into an `OutOfMemoryError` that says what to do.

    Args:
        what: that did not fit, with its sizes.
        advice: what makes it smaller.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # Its frames hold the tensors that were made before the one that did not fit.
        error.__traceback__ = None
        raise OutOfMemoryError(f"out of memory: {what}; {advice}") from None


def _is_out_of_memory(error: Exception) -> bool:
    # By name, not by type: PyTorch is not imported before a command needs it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # The CPU's allocator raises a plain RuntimeError; a product of sizes may pass what it counts.
    return "DefaultCPUAllocator" in str(error) or "Storage size calculation overflow" in str(error)
