"""Small vision towers with random weights, and inputs for them."""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer
from torch.nn import functional

# Of open_clip's form; the smallest plain ViT among its own names would still take seconds.
SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def random_tower(seed: int = 0, **changes) -> VisionTransformer:
    settings = {
        "image_size": 32,
        "patch_size": 8,
        "width": 24,
        "layers": 3,
        "heads": 3,
        "mlp_ratio": 2.0,
        "output_dim": 16,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(**settings).eval().requires_grad_(False)


def random_inputs(B=2, height=32, width=32, C=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(B, 3, height, width, generator=generator)
    text = functional.normalize(torch.randn(C, 16, generator=generator), dim=-1)
    vfm_features = torch.randn(B, 10, height // 8 + 1, width // 8 + 2, generator=generator)
    return images.to(dtype), text.to(dtype), vfm_features.to(dtype)


def inputs_of(name, *args, **kwargs):
    images, text, vfm_features = random_inputs(*args, **kwargs)
    return (images, text), {"vfm_features": vfm_features if name == "proxyclip" else None}
