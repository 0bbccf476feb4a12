"""Every form of the op that a configuration can ask for."""

from __future__ import annotations

import itertools

from fsa import FSAConfig

FORMS = [
    FSAConfig(similarity=similarity, pruning=pruning, scaling=scaling)
    for similarity, pruning, scaling in itertools.product(
        ("kl", "cosine"), ("confidence", "ratio", "threshold", None), (True, False)
    )
]


def form_id(config: FSAConfig) -> str:
    return f"{config.similarity}-{config.pruning}-{'scaled' if config.scaling else 'plain'}"
