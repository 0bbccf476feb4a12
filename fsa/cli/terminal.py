"""What the commands write to a terminal."""

from __future__ import annotations

import unicodedata


def shown(text: str) -> str:
    """A text for the terminal: a file's name may hold characters that would control it."""
    return "".join(
        ascii(c)[1:-1] if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text
    )
