"""One HTML page to look into feedback: a picture's labels, and what each patch attends to."""

from __future__ import annotations

from fsa.showcase.explorer.page import explore

__all__ = ["explore"]
