"""Class names: how they are given, checked and read from files."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsa.errors import InputError

Classes = Sequence["str | Sequence[str]"]

MAX_NAMES = 50_000
"""More names than this, synonyms counted, are refused: each is encoded in 80 sentences. The largest
vocabularies in use have some 22 000."""

MAX_NAME_LENGTH = 1000
"""In characters. CLIP reads 77 tokens of a sentence."""

_TOO_MANY_NAMES = f"classes holds more than {MAX_NAMES} names"
_MAX_FILE_BYTES = 1 << 24
# Control characters, and halves of surrogate pairs, which no encoder takes.
_NOT_IN_NAMES = ("Cc", "Cs")


def parse_classes(classes: Classes, *, allow_repeats: bool = False) -> tuple[tuple[str, ...], ...]:
    """Checks a list of classes, each a name or a list of synonyms; white space is made single.

    Args:
        classes: the list.
        allow_repeats: take a name that occurs twice; published class lists have them.

    Raises:
        InputError: an empty list, an empty name, a name that occurs twice, a name with control
            characters or of more than 1000 characters, or more than 50 000 names.
    """
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise InputError(
            "classes must be a list of names, each a string or a list of synonyms, "
            f"not {type(classes).__name__}"
        )
    if len(classes) == 0:
        raise InputError("classes is empty: name at least one class")
    parsed = []
    seen: set[str] = set()
    for entry in classes:
        synonyms = tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)
        if not synonyms:
            raise InputError("classes holds a class without a name")
        synonyms = tuple(checked_name(name, "classes") for name in synonyms)
        for name in synonyms:
            if name.casefold() in seen and not allow_repeats:
                raise InputError(f"classes names {name!r} twice")
            seen.add(name.casefold())
        if len(seen) > MAX_NAMES:
            raise InputError(_TOO_MANY_NAMES)
        parsed.append(synonyms)
    return tuple(parsed)


def checked_name(name: Any, argument: str) -> str:
    """A class's name with single white space.

    Args:
        name: what came.
        argument: where it came, for messages.

    Raises:
        InputError: no name, one with control characters, or one of more than 1000 characters.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{argument} holds {name!r}, which is not a name")
    if len(name) > MAX_NAME_LENGTH:
        raise InputError(
            f"{argument} holds a name of {len(name)} characters, which begins {name[:30]!r}: at "
            f"most {MAX_NAME_LENGTH} are accepted"
        )
    name = " ".join(name.split())
    if not name.isprintable() and any(
        unicodedata.category(character) in _NOT_IN_NAMES for character in name
    ):
        raise InputError(f"{argument} holds {name!r}, which has control characters in it")
    return name


def parse_class_text(text: str) -> list[list[str]]:
    """Classes from one line: "cat; dog, puppy; grass" -> [["cat"], ["dog", "puppy"], ["grass"]].

    A backslash before a comma, a semicolon or a backslash makes it a part of the name.

    Raises:
        InputError: as `parse_classes`.
    """
    entries = [entry for entry in _parted(text, ";") if entry.strip()]
    # Before a list is made for each.
    if len(entries) > MAX_NAMES:
        raise InputError(_TOO_MANY_NAMES)
    return [list(synonyms) for synonyms in parse_classes([_names_in(e) for e in entries])]


def _parted(text: str, mark: str) -> list[str]:
    """The text between marks that have no backslash of their own before them."""
    # One more mark to end the last part, with a space before it, which no backslash can touch.
    return re.findall(rf"((?:\\[,;\\]|[^{mark}])*){mark}", f"{text} {mark}")


def _names_in(entry: str) -> list[str]:
    return [re.sub(r"\\([,;\\])", r"\1", name).strip() for name in _parted(entry, ",")]


def read_class_file(file: str | os.PathLike[str]) -> list[list[str]]:
    """Classes from a text file in UTF-8, one class a line, its synonyms parted by commas.

    A line may hold several classes, parted by semicolons. Empty lines may follow the last class.

    Raises:
        InputError: a file that cannot be read, is no text or has more than 16 MiB; an empty line
            before the last class, which would move every later class to another number; and as
            `parse_classes`. The message names the file.
    """
    path = Path(file)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(None, "this is no file")
        with path.open("rb") as stream:
            content = stream.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise OSError(None, f"more than {_MAX_FILE_BYTES >> 20} MiB")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: the classes cannot be read (not a text in UTF-8)") from None
    # ValueError: a path with a null character.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: the classes cannot be read ({reason})") from None
    lines = text.rstrip().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(
                f"{path}: line {number} is empty, and the classes below it would get other "
                "numbers; name a class there, or take the line out"
            )
    try:
        return parse_class_text(" ;".join(lines))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
