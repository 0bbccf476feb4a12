"""Small models of every family that open_clip takes from timm, with random weights.

Each is timm's own model of the family with fewer and narrower blocks, under a name of its own, so
that open_clip's `TimmModel` makes it as it makes the large one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.models import register_model
from timm.models.eva import EvaBlockPostNorm

_NARROW = {"embed_dim": 48, "num_heads": 3, "depth": 3}
_EXTRAS = {"qk_norm": True, "init_values": 0.5, "reg_tokens": 2, "no_embed_class": True}


@dataclass(frozen=True)
class Family:
    """How open_clip's configurations of a family call timm.

    Attributes:
        timm_name: of the large model.
        changes: what makes it small.
        pool, proj: as `TimmModel` takes them.
        patch: side in pixels.
        side: of the pictures of the trained grid, in pixels.
        width: of the space shared with text.
    """

    timm_name: str
    changes: dict
    pool: str
    proj: str | None
    patch: int = 16
    side: int = 64
    width: int = 24


FAMILIES = {
    "siglip": Family("vit_base_patch16_siglip_224", _NARROW, "map", "none", width=48),
    "pe": Family(
        "vit_pe_core_base_patch16_224",
        {**_NARROW, "attn_pool_num_heads": 3, "ref_feat_shape": (5, 5)},
        "map",
        None,
    ),
    "eva01": Family("eva_giant_patch14_224", _NARROW, "token", None, patch=14, side=56),
    "eva02": Family("eva02_base_patch16_clip_224", _NARROW, "token", None),
    "eva02-post-norm": Family(
        "eva02_enormous_patch14_clip_224", {**_NARROW, "mlp_ratio": 2}, "token", None, 14, 56
    ),
    # The widths of these two belong to their convolutions.
    "vitamin": Family("vitamin_small_224", {"depth": 2}, "", "linear"),
    "mobileclip": Family("vit_base_mci_224", {"depth": 2, "mlp_ratio": 1}, "token", None),
    "mobileclip2": Family("vit_large_patch14_clip_224", _NARROW, "token", None, 14, 56),
    # No model of open_clip's: query and key norms, layer scale, registers.
    "norms": Family("vit_base_patch16_224", {**_NARROW, **_EXTRAS}, "token", "mlp"),
    "registers": Family("vit_medium_patch16_rope_reg1_gap_256", _NARROW, "avg", "linear"),
}


def _registered(name: str, family: Family) -> str:
    make = timm.models.model_entrypoint(family.timm_name)

    def small(pretrained=False, **options):
        return make(pretrained, **{"img_size": family.side, **family.changes, **options})

    small.__name__ = f"small_{name.replace('-', '_')}"
    register_model(small)
    return small.__name__


POST_NORM_RUNS = "swiglu_align_to" in inspect.signature(EvaBlockPostNorm).parameters

NAMES = {name: _registered(name, family) for name, family in FAMILIES.items()}
"""Their names in timm."""


def random_timm_model(name: str, dtype=torch.float32) -> TimmModel:
    if name == "eva02-post-norm" and not POST_NORM_RUNS:
        pytest.skip(f"timm {timm.__version__} cannot make EVA's blocks with norms after them")
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TimmModel(NAMES[name], family.width, family.side, family.pool, family.proj)
        return spread(model).to(dtype)


def spread(model):
    """Weights at which every part matters: as initialised many are next to nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
