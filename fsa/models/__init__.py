"""CLIP models: their vision towers, their text, the models that guide ProxyCLIP, and loading."""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
