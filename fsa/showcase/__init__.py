"""Figures that show what feedback does: one picture compared, and the demo."""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
