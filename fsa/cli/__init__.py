"""The command `fsa`, one file a command."""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
