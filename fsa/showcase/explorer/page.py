"""Fills the page with what was gathered, and writes it."""

from __future__ import annotations

import html
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from fsa.classes import Classes
from fsa.errors import InputError
from fsa.files import make_directory, write_whole
from fsa.segment.segmentor import Segmentor
from fsa.showcase.explorer.gathering import gathered

_ENDINGS = (".html", ".htm")


def explore(
    segmentor: Segmentor,
    image: Any,
    classes: Classes,
    out: str | os.PathLike[str],
    *,
    patch: tuple[int, int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    short_side: int | None = None,
) -> Path:
    """Writes one HTML page to look into feedback, which needs neither a network nor a server.

    It shows the labels without and with feedback, and for each patch of one window what it attends
    to before, which patches the pruning keeps, A_f and the adapted attention. A_f is computed again
    in the page when its settings are changed there.

    Args:
        segmentor: with feedback.
        image, classes, window, stride, short_side: as in `Segmentor.segment`.
        out: the page, a name that ends in .html.
        patch: row and column on the grid of patches of the resized picture; the page shows the
            window around it. Default the patch in the middle.

    Returns:
        The page's path.

    Raises:
        InputError: as `Segmentor.window_attentions`; more than 1764 patches in a window, or too
            many class names for them; a name that does not end in .html; a file that cannot be
            written.
    """
    file = Path(out)
    if file.suffix.lower() not in _ENDINGS:
        raise InputError(f"{str(file)!r} is no name for the page: it must end in .html")
    make_directory(file.absolute().parent)
    sizes = {"window": window, "stride": stride, "short_side": short_side}
    text = page(gathered(segmentor, image, classes, patch, sizes))
    write_whole(file, lambda stream: stream.write(text.encode()))
    return file


def page(data: dict[str, Any]) -> str:
    """The page of what `gathered` returns."""
    # No name of a class or a picture can end the script element.
    values = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(f"{data['about']['picture']}: feedback, patch by patch"),
        "style": _part("explorer.css"),
        "data": values,
        "script": _part("explorer.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("explorer.html"))


def _part(name: str) -> str:
    return resources.files("fsa.showcase.explorer").joinpath(f"template/{name}").read_text("utf-8")
