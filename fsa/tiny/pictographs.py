"""Where the objects of the scenes come from: licence-clean pictographs in eight styles.

    npm install --prefix pictographs @iconify-json/noto @iconify-json/noto-v1 \
        @iconify-json/twemoji @iconify-json/emojione @iconify-json/fluent-emoji-flat \
        @iconify-json/fxemoji @lobehub/fluent-emoji-3d @iconify-json/streamline-emojis
    python -m fsa.tiny.pictographs --modules pictographs/node_modules --out pictographs/png

gathers the pictographs that `fsa.tiny.scenes` knows into one folder per style, as PNGs of 128
pixels (needs `pip install resvg-py`). The pictographs themselves are not part of this project.

| style | pictures by | licence |
|---|---|---|
| noto, noto-v1 | Google | Apache-2.0 |
| twemoji | Twitter and other contributors | CC-BY 4.0 |
| fluent, fluent-flat | Microsoft | MIT |
| fxemoji | Mozilla | Apache-2.0 |
| streamline | Streamline | CC-BY 4.0 |
| emojione | Emoji One | CC-BY 4.0 |
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from fsa.tiny.vocabulary import OBJECTS

TRAIN_STYLES = ("noto", "noto-v1", "twemoji", "fluent", "fluent-flat", "fxemoji", "streamline")
UNSEEN_STYLE = "emojione"
"""The style that training never sees."""

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
    import resvg_py

    icons = json.loads((modules / "@iconify-json" / package / "icons.json").read_text())
    names = _names(modules)
    side = icons.get("height", 16)

    def read(codepoint: str) -> Image.Image | None:
        for name in names.get(codepoint, ()):
            alias = icons.get("aliases", {}).get(name, {}).get("parent", name)
            icon = icons["icons"].get(alias)
            if icon is not None:
                break
        else:
            return None
        width, height = icon.get("width", icons.get("width", side)), icon.get("height", side)
        left, top = icon.get("left", 0), icon.get("top", 0)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" '
            f'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE)
        return Image.open(io.BytesIO(bytes(data))).convert("RGBA")

    return read


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
    arguments = parser.parse_args()
    readers = {
        style: read_iconify(arguments.modules, package) for style, package in _ICONIFY.items()
    }
    readers["fluent"] = read_fluent(arguments.modules)
    for style, count in gather(arguments.out, readers).items():
        print(f"{style}: {count} of {len(OBJECTS)} objects")


if __name__ == "__main__":
    main()
