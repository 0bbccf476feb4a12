"""Text features of class lists, by templates, remembered in memory and on the disk."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional

from fsa.classes import Classes, parse_classes
from fsa.models.loading import LoadedModel
from fsa.models.text_cache import TextCache
from fsa.models.text_tower import fingerprint, shortened
from fsa.ops.checks import autocast_off

_CACHED_CLASS_LISTS = 32
# Part of the keys on the disk: a change in how features are computed needs another number.
_FORMAT = 1

Progress = Callable[[int, int], None]
"""Called with (texts encoded, texts in all)."""


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
    name (Radford et al., "CLIP", section 3.1.4). The last class lists are remembered. The texts of
    a name are encoded together and without those of others, so that its feature is the same to the
    bit whatever the other names are, and whether it comes from the disk.

    Args:
        loaded: the model.
        cache: where the features of names are kept on the disk; default nowhere.
    """

    def __init__(self, loaded: LoadedModel, cache: TextCache | None = None) -> None:
        self._loaded = loaded
        self._disk = cache
        self._fingerprint: str | None = None
        self._cache: OrderedDict[tuple[tuple[str, ...], ...], TextQueries] = OrderedDict()
        self._lock = threading.Lock()

    def encode(
        self, classes: Classes, *, allow_repeats: bool = False, progress: Progress | None = None
    ) -> TextQueries:
        """The queries of a class list.

        Args:
            classes: names, each a string or a list of synonyms.
            allow_repeats: as in `parse_classes`.
            progress: called before the first text and while they are encoded with (texts done,
                texts in all); not called where all are remembered.

        Raises:
            InputError: as `parse_classes`.
            NotFiniteError: text features with NaN or inf.
        """
        parsed = parse_classes(classes, allow_repeats=allow_repeats)
        with self._lock:
            if parsed in self._cache:
                self._cache.move_to_end(parsed)
                return self._cache[parsed]
        queries = self._encode(parsed, progress)
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
    def _encode(
        self, parsed: tuple[tuple[str, ...], ...], progress: Progress | None
    ) -> TextQueries:
        names = [name for synonyms in parsed for name in synonyms]
        features = self._features(list(dict.fromkeys(names)), progress)
        index = [i for i, synonyms in enumerate(parsed) for _ in synonyms]
        return TextQueries(
            features=torch.stack([features[name] for name in names]),
            class_index=torch.tensor(index, device=self._loaded.device),
            names=tuple(synonyms[0] for synonyms in parsed),
        )

    def _features(self, names: list[str], progress: Progress | None) -> dict[str, Tensor]:
        """The features (E,) of names, from the disk where they are there."""
        keys, features = {}, {}
        if self._disk is not None:
            keys = {name: self._key(name) for name in names}
            read = {name: self._disk.read(key) for name, key in keys.items()}
            features = {
                name: torch.from_numpy(feature).to(self._loaded.device)
                for name, feature in read.items()
                if feature is not None
            }
        new = [name for name in names if name not in features]
        count = len(OPENAI_IMAGENET_TEMPLATES)
        for number, name in enumerate(new):
            if progress is not None and number == 0:
                progress(0, len(new) * count)
            features[name] = self._feature(name)
            if self._disk is not None:
                self._disk.write(keys[name], features[name].cpu().numpy())
            if progress is not None:
                progress((number + 1) * count, len(new) * count)
        if self._disk is not None and new:
            self._disk.trim()
        return features

    def _feature(self, name: str) -> Tensor:
        mean = self._encode_texts(_filled(name)).mean(dim=0)
        if not bool(mean.isfinite().all()):
            raise self._loaded.not_finite("the class names")
        return functional.normalize(mean, dim=-1)

    def _key(self, name: str) -> str:
        """What the feature of a name depends on, as one hash."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._loaded.model)
        texts = _filled(name)
        # Tokens of one text tell tokenizers apart, and their lengths; of all they would take long.
        tokens = self._loaded.tokenizer(texts[:1]).tolist()
        parts = [_FORMAT, self._fingerprint, self._loaded.device.type, tokens, texts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _encode_texts(self, texts: list[str]) -> Tensor:
        model, tokens = shortened(self._loaded.model, self._loaded.tokenizer(texts))
        tokens = tokens.to(self._loaded.device)
        with autocast_off(tokens):
            return functional.normalize(model.encode_text(tokens).float(), dim=-1)


def _filled(name: str) -> list[str]:
    return [template(name) for template in OPENAI_IMAGENET_TEMPLATES]
