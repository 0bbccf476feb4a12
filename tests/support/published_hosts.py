"""Towers, pictures and results of published code, kept as arrays: see the vectors beside the tests.

Each file holds the weights of a small tower of random numbers as its `state_dict()`, pictures and
unit text features, and what the method's own code computed of them in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from tests.support.accuracy import VECTORS


def published(name: str, **changes):
    """(tower, images, text features, {name: result}) of one file, all in float64."""
    with np.load(VECTORS / f"host_{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    settings = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "heads": 3}
    visual = VisionTransformer(**settings, output_dim=16, **changes).double()
    prefix = "state."
    visual.load_state_dict(
        {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
    )
    results = {
        key: x
        for key, x in arrays.items()
        if not key.startswith(prefix) and key not in ("images", "text")
    }
    visual.eval().requires_grad_(False)
    return visual, arrays["images"], arrays["text"], results


def published_segearth():
    return published("segearth", mlp_ratio=2.0)


def published_pearl():
    return published("pearl", mlp_ratio=4.0, act_layer=QuickGELU)
