"""Pictures: reading them, and the windows they are cut into."""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
