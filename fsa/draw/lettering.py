"""Names of classes as a font at hand can write them."""

from __future__ import annotations

import contextlib
import unicodedata
from functools import lru_cache

from PIL import ImageFont

_LONGEST_LEGEND_NAME = 40
# Pillow's own font may hold nothing beyond Latin. Looked for where the system keeps its fonts.
_FONT_FILES = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "segoeui.ttf",
    "msyh.ttc",
    "malgun.ttf",
    "Nirmala.ttf",
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# No character, so every font draws its sign for what is missing.
_MISSING = "\uffff"


def shortened(name: str) -> str:
    """A name, or the beginning of a long one."""
    if len(name) <= _LONGEST_LEGEND_NAME:
        return name
    return name[: _LONGEST_LEGEND_NAME - 1].rstrip() + "…"


def legible(name: str, number: int) -> str:
    """A class's name as a legend writes it: if need be shortened, or "class 3", its number."""
    # What letters a font has does not depend on its size.
    return written(name, f"class {number}", 12)[0]


def written(name: str, otherwise: str, size: int) -> tuple[str, Font]:
    """A name, shortened, if need be without accents, in a font that has it; else the other name.

    The other name is followed by what the first font has of the name, if there is a letter.
    """
    name = shortened(name)
    decomposed = unicodedata.normalize("NFKD", name)
    unaccented = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    for spelling in (name, unaccented):
        for font in fonts(size):
            if not _missing(spelling, font):
                return spelling, font
    first = fonts(size)[0]
    rest = " ".join("".join(" " if _missing(c, first) else c for c in unaccented).split())
    return (f"{otherwise}: {rest}" if any(map(str.isalpha, rest)) else otherwise), first


@lru_cache(maxsize=64)
def fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font and those of the system that are there, in one size."""
    found = [ImageFont.load_default(size)]
    for file in _FONT_FILES:
        # A Pillow without FreeType raises ImportError.
        with contextlib.suppress(OSError, ImportError):
            found.append(ImageFont.truetype(file, size))
    return tuple(found)


def _missing(name: str, font: Font) -> bool:
    """Whether a font lacks a character of a name."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        return not name.isascii()
    blank = _drawn(_MISSING, font)
    return any(_drawn(letter, font) == blank for letter in set(name) if not letter.isspace())


def _drawn(letter: str, font: ImageFont.FreeTypeFont) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def percent(share: float) -> str:
    """A share of a picture in whole percents: "12%", and "<1%" for what is there and is less."""
    return f"{share:.0%}" if share >= 0.01 else "<1%"
