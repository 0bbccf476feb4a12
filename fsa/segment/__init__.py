"""From a picture and class names to labels."""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
