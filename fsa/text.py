"""Class names as text features: synonyms, templates, caching."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional

from fsa.errors import InputError
from fsa.models import LoadedModel

Classes = Sequence["str | Sequence[str]"]

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
    """Checks a list of classes, each a name or a list of synonyms.

    Args:
        classes: the list.
        allow_repeats: take a name that occurs twice; published class lists have them.

    Raises:
        InputError: an empty list, an empty name, or a name that occurs twice.
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
        for name in synonyms:
            if not isinstance(name, str) or not name.strip():
                raise InputError(f"classes holds {name!r}, which is not a name")
        synonyms = tuple(name.strip() for name in synonyms)
        for name in synonyms:
            if name.casefold() in seen and not allow_repeats:
                raise InputError(f"classes names {name!r} twice")
            seen.add(name.casefold())
        parsed.append(synonyms)
    return tuple(parsed)


def parse_class_text(text: str) -> list[list[str]]:
    """Classes from one line: "cat; dog, puppy; grass" -> [["cat"], ["dog", "puppy"], ["grass"]].

    Raises:
        InputError: as `parse_classes`.
    """
    entries = [entry for entry in text.split(";") if entry.strip()]
    classes = [[name.strip() for name in entry.split(",")] for entry in entries]
    parse_classes(classes)
    return classes


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
