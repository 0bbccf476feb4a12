"""Where the objects of the scenes come from: pictographs in eight styles, and drawings by others.

    npm install --prefix pictographs @iconify-json/noto @iconify-json/noto-v1 \
        @iconify-json/twemoji @iconify-json/emojione @iconify-json/fluent-emoji-flat \
        @iconify-json/fxemoji @lobehub/fluent-emoji-3d @iconify-json/streamline-emojis \
        @iconify/json
    python -m fsa.tiny.pictographs --modules pictographs/node_modules --out pictographs/png \
        --openclipart /usr/share/openclipart/svg

gathers the pictographs that `fsa.tiny.scenes` knows into one folder per style, as PNGs of 128
pixels (needs `pip install resvg-py`). The pictographs themselves are not part of this project.
Two further folders hold the drawings that drawings.txt names: `drawn` those in colour, `glyphs`
those in one colour. They are from @iconify/json, which collects sets of icons, and from Debian's
package openclipart-svg; `fsa.tiny.paint` makes further drawings of them, for training.

| style | pictures by | licence |
|---|---|---|
| noto, noto-v1 | Google | Apache-2.0 |
| twemoji | Twitter and other contributors | CC-BY 4.0 |
| fluent, fluent-flat | Microsoft | MIT |
| fxemoji | Mozilla | Apache-2.0 |
| streamline | Streamline | CC-BY 4.0 |
| emojione | Emoji One | CC-BY 4.0 |
| drawn, glyphs | MODEL_CARD.md lists them | Apache-2.0, MIT, ISC, BSD, CC-BY, OFL, public domain |
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from fsa.tiny.vocabulary import OBJECTS

TRAIN_STYLES = ("noto", "noto-v1", "twemoji", "fluent", "fluent-flat", "fxemoji", "streamline")
UNSEEN_STYLE = "emojione"
"""The style that training never sees."""

DRAWN, GLYPHS, PAINTED = "drawn", "glyphs", "painted"
"""Folders of drawings by many hands, which only training sees."""

LICENCES = (
    *("Apache-2.0", "MIT", "ISC", "BSD-3-Clause", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0"),
    *("OFL-1.1", "Unlicense"),
)
"""That a set of icons may have."""

SIZE = 128

_ICONIFY = {
    "noto": "noto",
    "noto-v1": "noto-v1",
    "twemoji": "twemoji",
    "fluent-flat": "fluent-emoji-flat",
    "fxemoji": "fxemoji",
    "streamline": "streamline-emojis",
    "emojione": "emojione",
}
# Sets that come without a list of code points share the names of those that have one.
_NAMED_BY = ("noto", "twemoji", "fluent-emoji-flat")
_CLIPART = "openclipart"

Reader = Callable[[str], Image.Image | None]
"""From a code point in hexadecimal to an RGBA picture; None where the style has none."""


def gather(out: Path, readers: dict[str, Reader]) -> dict[str, int]:
    """Writes OUT/style/codepoint.png for every object a style has.

    Returns:
        style -> how many objects it has.
    """
    counts = {}
    for style, read in readers.items():
        folder = out / style
        folder.mkdir(parents=True, exist_ok=True)
        counts[style] = 0
        for entry in OBJECTS:
            picture = read(entry.codepoint)
            if picture is not None:
                _fit(picture).save(folder / f"{entry.codepoint}.png")
                counts[style] += 1
    return counts


def read_iconify(modules: Path, package: str) -> Reader:
    """Pictures out of a package @iconify-json/..., which is one file of SVG bodies by name."""
    icons = json.loads((modules / "@iconify-json" / package / "icons.json").read_text())
    names = _names(modules)

    def read(codepoint: str) -> Image.Image | None:
        for name in names.get(codepoint, ()):
            svg = _svg(icons, name)
            if svg is not None:
                return _drawn(svg)
        return None

    return read


def drawings() -> dict[str, list[tuple[str, str]]]:
    """Codepoint -> (set, name) of the drawings of an object, all of which were looked at."""
    codepoints = {entry.name: entry.codepoint for entry in OBJECTS}
    chosen: dict[str, list[tuple[str, str]]] = {}
    codepoint = ""
    for line in (Path(__file__).parent / "drawings.txt").read_text().splitlines():
        if line.startswith(" "):
            group, name = line.strip().split(":")
            chosen.setdefault(codepoint, []).append((group, name))
        else:
            codepoint = codepoints[line]
    return chosen


def gather_drawings(
    out: Path, modules: Path, openclipart: Path, chosen: dict[str, list[tuple[str, str]]]
) -> dict[str, tuple[str, str, int]]:
    """Writes OUT/drawn/CODEPOINT-SET-NAME.png, or OUT/glyphs/... where a set has one colour.

    Args:
        modules: holds @iconify/json.
        openclipart: the folder of SVG files.
        chosen: as `drawings` returns it.

    Returns:
        Set -> author, licence and number of drawings.

    Raises:
        ValueError: a set's licence is not among `LICENCES`.
    """
    folder = modules / "@iconify" / "json"
    known = json.loads((folder / "collections.json").read_text())
    icons: dict[str, dict[str, Any]] = {}
    credits: dict[str, tuple[str, str, int]] = {}
    for codepoint, names in chosen.items():
        for group, name in names:
            if group == _CLIPART:
                author, licence, colour = "many", "public domain", True
                svg: str | None = (openclipart / f"{name}.svg").read_text(errors="replace")
            else:
                author, licence = known[group]["author"]["name"], known[group]["license"]["spdx"]
                if licence not in LICENCES:
                    raise ValueError(f"the set {group!r} has the licence {licence}")
                colour = known[group]["palette"]
                if group not in icons:
                    icons[group] = json.loads((folder / "json" / f"{group}.json").read_text())
                svg = _svg(icons[group], name)
            if svg is None:
                raise ValueError(f"the set {group!r} has no icon {name!r}")
            place = out / (DRAWN if colour else GLYPHS)
            place.mkdir(parents=True, exist_ok=True)
            file = place / f"{codepoint}-{group}-{name.replace('/', '-')}.png"
            _fit(_drawn(svg)).save(file)
            credits[group] = (author, licence, credits.get(group, ("", "", 0))[2] + 1)
    return credits


def _svg(icons: dict[str, Any], name: str) -> str | None:
    """An icon of a set, or None; `icons` is the set's file."""
    icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
    if icon is None:
        return None
    side = icons.get("height", 16)
    width, height = icon.get("width", icons.get("width", side)), icon.get("height", side)
    left, top = icon.get("left", 0), icon.get("top", 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _drawn(svg: str) -> Image.Image:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def _names(modules: Path) -> dict[str, list[str]]:
    """Code point -> the names that the sets give it, with and without hyphens."""
    names: dict[str, list[str]] = {}
    for package in _NAMED_BY:
        characters = json.loads((modules / "@iconify-json" / package / "chars.json").read_text())
        for codepoint, name in characters.items():
            known = names.setdefault(codepoint, [])
            known += [n for n in (name, name.replace("-", "")) if n not in known]
    for entry in OBJECTS:
        own = entry.name.replace(" ", "-")
        names.setdefault(entry.codepoint, []).extend([own, own.replace("-", "")])
    return names


def read_fluent(modules: Path) -> Reader:
    """Pictures out of @lobehub/fluent-emoji-3d, a folder of WebP files named by code point."""
    folder = modules / "@lobehub" / "fluent-emoji-3d" / "assets"

    def read(codepoint: str) -> Image.Image | None:
        for file in (folder / f"{codepoint}.webp", folder / f"{codepoint}-fe0f.webp"):
            if file.exists():
                return Image.open(file).convert("RGBA")
        return None

    return read


def _fit(picture: Image.Image) -> Image.Image:
    """Cropped to what is drawn, and scaled so that the longer side is SIZE."""
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = SIZE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=Path, required=True, help="the folder node_modules")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/svg"))
    arguments = parser.parse_args()
    readers = {
        style: read_iconify(arguments.modules, package) for style, package in _ICONIFY.items()
    }
    readers["fluent"] = read_fluent(arguments.modules)
    for style, count in gather(arguments.out, readers).items():
        print(f"{style}: {count} of {len(OBJECTS)} objects")
    credits = gather_drawings(arguments.out, arguments.modules, arguments.openclipart, drawings())
    for group, (author, licence, count) in sorted(credits.items()):
        print(f"| {group} | {author} | {licence} | {count} |")


if __name__ == "__main__":
    main()
