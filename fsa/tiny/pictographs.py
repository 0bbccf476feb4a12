"""Where the objects of the scenes come from: licence-clean pictographs in three styles.

    python -m fsa.tiny.pictographs --noto NotoColorEmoji.ttf --twemoji SVG_DIR --fluent WEBP_DIR \
        --out pictographs

gathers the pictographs that `fsa.tiny.scenes` knows into one folder per style, as 128-pixel PNGs:

- noto: the colour font of Noto Emoji (Apache-2.0 pictures), e.g. Debian's fonts-noto-color-emoji;
- twemoji: the SVG files of Twemoji (CC-BY 4.0, Twitter and other contributors), e.g. the npm
  package @twemoji/svg;
- fluent: the 3D pictures of Fluent Emoji (MIT, Microsoft), e.g. the npm package
  @lobehub/fluent-emoji-3d.

Fluent is the style that training never sees. The pictographs themselves are not part of this
project; the embedded model was trained on the first two.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fsa.tiny.vocabulary import OBJECTS

STYLES = ("noto", "twemoji", "fluent")
SIZE = 128
# The one size at which the bitmap font holds its pictures.
_NOTO_POINTS = 109


def gather(out: Path, readers: dict[str, Callable[[str], Image.Image]]) -> None:
    """Writes OUT/style/codepoint.png for every object and style.

    Args:
        out: the folder.
        readers: style -> function from a code point in hexadecimal to an RGBA picture.
    """
    for style, read in readers.items():
        folder = out / style
        folder.mkdir(parents=True, exist_ok=True)
        for entry in OBJECTS:
            picture = _fit(read(entry.codepoint))
            picture.save(folder / f"{entry.codepoint}.png")


def read_noto(font_file: Path) -> Callable[[str], Image.Image]:
    """Pictures out of the bitmap colour font."""
    font = ImageFont.truetype(str(font_file), _NOTO_POINTS)

    def read(codepoint: str) -> Image.Image:
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text(
            (12, 12), chr(int(codepoint, 16)), font=font, embedded_color=True
        )
        return canvas

    return read


def read_svg(folder: Path) -> Callable[[str], Image.Image]:
    """Pictures out of a folder of SVG files named by code point (needs `pip install resvg-py`)."""
    import resvg_py

    def read(codepoint: str) -> Image.Image:
        data = resvg_py.svg_to_bytes(svg_path=str(folder / f"{codepoint}.svg"), width=SIZE)
        return Image.open(io.BytesIO(bytes(data))).convert("RGBA")

    return read


def read_folder(folder: Path) -> Callable[[str], Image.Image]:
    """Pictures out of a folder of WebP files named by code point."""

    def read(codepoint: str) -> Image.Image:
        plain, emoji = folder / f"{codepoint}.webp", folder / f"{codepoint}-fe0f.webp"
        return Image.open(plain if plain.exists() else emoji).convert("RGBA")

    return read


def _fit(picture: Image.Image) -> Image.Image:
    """Cropped to what is drawn, and scaled so that the longer side is SIZE."""
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = SIZE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noto", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--twemoji", type=Path, required=True, help="folder of SVG files")
    parser.add_argument("--fluent", type=Path, required=True, help="folder of WebP files")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    readers = {
        "noto": read_noto(arguments.noto),
        "twemoji": read_svg(arguments.twemoji),
        "fluent": read_folder(arguments.fluent),
    }
    gather(arguments.out, readers)


if __name__ == "__main__":
    main()
