"""What is said of a scene in training: a caption of the things in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fsa.tiny.vocabulary import CLASSES, Entry

_TEMPLATES = (
    "a photo of {}.",
    "a picture of {}.",
    "{}.",
    "an image of {}.",
    "there is {} in the scene.",
    "a photo of the {}.",
    "a drawing of {}.",
    "a rendering of {}.",
    "a good photo of {}.",
    "a cropped photo of {}.",
    "a close-up photo of {}.",
    "{} in a video game.",
)
_GROUNDS = ("on {}", "with {}", "in front of {}", "and {}")


def caption(
    objects: Sequence[int], textures: Sequence[int], rng: np.random.Generator, ground: float = 0.5
) -> str:
    """A sentence that names a scene's objects, though not always all, and often its ground.

    Args:
        objects, textures: indices into CLASSES, as in `Scenes`.
        ground: how often the ground is named where there are objects.
    """
    objects = [i for i in objects if rng.random() < 0.9] or list(objects[:1])
    names = [_with_article(_name(CLASSES[i], rng), rng) for i in rng.permutation(objects)]
    words = _joined(names)
    if not names or rng.random() < ground:
        grounds = [_name(CLASSES[i], rng) for i in textures]
        under = _joined(grounds if rng.random() < 0.7 else grounds[:1])
        words = f"{words} {rng.choice(_GROUNDS).format(under)}" if names else under
    return str(rng.choice(_TEMPLATES)).format(words)


def _name(entry: Entry, rng: np.random.Generator) -> str:
    return entry.name if rng.random() < 0.6 else str(rng.choice(entry.names))


def _with_article(name: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _joined(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)
