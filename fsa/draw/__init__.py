"""Pictures for people: colours, lettering and figures."""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
