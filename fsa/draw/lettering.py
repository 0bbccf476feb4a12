"""Names of classes as a font at hand can write them."""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from fsa.errors import FSAWarning

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
_FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# A system may have thousands; those of a script are among the first where there are any.
_MOST_FONTS = 3000
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
    file = _file_with(frozenset(name) - {" "})
    if file is not None:
        return name, ImageFont.truetype(file, size)
    _warn_of(name)
    first = fonts(size)[0]
    rest = " ".join("".join(" " if _missing(c, first) else c for c in unaccented).split())
    return (f"{otherwise}: {rest}" if any(map(str.isalpha, rest)) else otherwise), first


@lru_cache(maxsize=1024)
def _file_with(letters: frozenset[str]) -> str | None:
    """A font file of the system that has all the letters, or None."""
    for file in _font_files(_font_folders()):
        # A font that is broken, or of a kind that FreeType does not read.
        with contextlib.suppress(OSError, ImportError):
            if not _missing("".join(letters), ImageFont.truetype(file, 12)):
                return file
    return None


@lru_cache(maxsize=1024)
def _warn_of(name: str) -> None:
    """Says once for each name that it stands as its number."""
    warnings.warn(
        f"no font on this system can write the class name {name!r}: legends give its number; "
        "install a font of its script, such as Noto Sans",
        FSAWarning,
        stacklevel=2,
    )


def _font_folders() -> tuple[Path, ...]:
    """Where the systems keep their fonts."""
    home = Path.home()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", home)
        return (
            Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"),
            Path(local, "Microsoft/Windows/Fonts"),
        )
    if sys.platform == "darwin":
        return Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
    folders = [Path(folder, "fonts") for folder in (own, *shared.split(":"))]
    return *folders, home / ".fonts"


@lru_cache(maxsize=8)
def _font_files(folders: tuple[Path, ...]) -> tuple[str, ...]:
    found = [
        os.path.join(folder, name)
        for root in folders
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(_FONT_SUFFIXES)
    ]
    # Upright and regular ones first, then by name.
    styled = ("bold", "italic", "oblique", "thin", "light", "black", "mono")
    found.sort(key=lambda file: (any(s in os.path.basename(file).lower() for s in styled), file))
    return tuple(found[:_MOST_FONTS])


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
