"""Class names as text features: synonyms, templates, caching."""

from __future__ import annotations

import os
import stat
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional

from fsa.errors import InputError
from fsa.models import LoadedModel

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

_CACHED_CLASS_LISTS = 32
_TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class TextQueries:
    """What the pictures are compared with: one query per name, several names per class.

    Attributes:
        features: (Q,E) float32, of unit length.
        class_index: (Q,) int64, the class of each query.
        names: the first name of each class.
    """

    features: Tensor
    class_index: Tensor
    names: tuple[str, ...]


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

    Raises:
        InputError: as `parse_classes`.
    """
    entries = [entry for entry in text.split(";") if entry.strip()]
    # Before a list is made for each.
    if len(entries) > MAX_NAMES:
        raise InputError(_TOO_MANY_NAMES)
    return [list(synonyms) for synonyms in parse_classes([e.split(",") for e in entries])]


def read_class_file(file: str | os.PathLike[str]) -> list[list[str]]:
    """Classes from a text file in UTF-8, one class a line, its synonyms parted by commas.

    Raises:
        InputError: a file that cannot be read, is no text or has more than 16 MiB; and as
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
    try:
        return parse_class_text(";".join(text.splitlines()))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class TextEncoder:
    """Text features of class lists, by ImageNet's 80 templates.

    Each filled template is encoded and normalised; their mean, normalised, is the feature of the
    name (Radford et al., "CLIP", section 3.1.4). The last class lists are remembered.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._cache: OrderedDict[tuple[tuple[str, ...], ...], TextQueries] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, classes: Classes, *, allow_repeats: bool = False) -> TextQueries:
        """The queries of a class list; `allow_repeats` as in `parse_classes`.

        Raises:
            InputError: as `parse_classes`.
        """
        parsed = parse_classes(classes, allow_repeats=allow_repeats)
        with self._lock:
            if parsed in self._cache:
                self._cache.move_to_end(parsed)
                return self._cache[parsed]
        queries = self._encode(parsed)
        with self._lock:
            self._cache[parsed] = queries
            while len(self._cache) > _CACHED_CLASS_LISTS:
                self._cache.popitem(last=False)
        return queries

    # Not inference mode: its tensors could not be used outside of it later.
    @torch.no_grad()
    def _encode(self, parsed: tuple[tuple[str, ...], ...]) -> TextQueries:
        names = [name for synonyms in parsed for name in synonyms]
        texts = [template(name) for name in names for template in OPENAI_IMAGENET_TEMPLATES]
        features = torch.cat(
            [
                self._encode_texts(texts[start : start + _TEXTS_AT_ONCE])
                for start in range(0, len(texts), _TEXTS_AT_ONCE)
            ]
        )
        means = features.unflatten(0, (len(names), -1)).mean(dim=1)
        index = [i for i, synonyms in enumerate(parsed) for _ in synonyms]
        return TextQueries(
            features=functional.normalize(means, dim=-1),
            class_index=torch.tensor(index, device=features.device),
            names=tuple(synonyms[0] for synonyms in parsed),
        )

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self._loaded.tokenizer(texts).to(self._loaded.device)
        return functional.normalize(self._loaded.model.encode_text(tokens).float(), dim=-1)
