"""Feedback for code that people already run."""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
