"""The exceptions of the library. Every message is one or two readable lines that say what to do."""

from __future__ import annotations


class FSAError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(FSAError, ValueError):
    """An argument or a file that cannot be used as it is; the message names it."""


class ModelUnavailableError(FSAError, RuntimeError):
    """Weights that cannot be had: a missing file, or a hub out of reach."""
