"""Text features of class lists, by templates, with a cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional

from fsa.classes import Classes, parse_classes
from fsa.models.loading import LoadedModel
from fsa.ops.checks import autocast_off

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
            NotFiniteError: text features with NaN or inf.
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

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which stays in its process."""
        with self._lock:
            return {**vars(self), "_cache": self._cache.copy(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

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
        if not bool(means.isfinite().all()):
            raise self._loaded.not_finite("the class names")
        index = [i for i, synonyms in enumerate(parsed) for _ in synonyms]
        return TextQueries(
            features=functional.normalize(means, dim=-1),
            class_index=torch.tensor(index, device=features.device),
            names=tuple(synonyms[0] for synonyms in parsed),
        )

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self._loaded.tokenizer(texts).to(self._loaded.device)
        with autocast_off(tokens):
            return functional.normalize(self._loaded.model.encode_text(tokens).float(), dim=-1)
