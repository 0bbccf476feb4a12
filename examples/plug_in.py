"""Adds feedback to published code without editing it: one line for a tower with `custom_attn`.

    python examples/plug_in.py

The tower below stands for the one in your repository. It is built like ClearCLIP's: open_clip's
vision transformer, whose forward calls `custom_attn` for the attention of the last block.
"""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

import fsa
from fsa import tiny
from fsa.models.loading import load_model
from fsa.models.text import TextEncoder


class ClearCLIPTower(VisionTransformer):
    """A tower in the manner of the ClearCLIP repository."""

    def forward(
        self, x: Tensor, model_type: str = "ClearCLIP", ignore_residual: bool = True
    ) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        *first, last = self.transformer.resblocks
        for block in first:
            x = block(x)
        x = x.transpose(0, 1)  # That code has tokens first: (L,B,D).
        attended = self.custom_attn(last.attn, last.ln_1(x), model_type=model_type)
        if not ignore_residual:
            attended = x + attended
            attended = attended + last.mlp(last.ln_2(attended))
        return self.ln_post(attended.transpose(0, 1)[:, 1:]) @ self.proj

    def custom_attn(
        self, attn_layer: nn.MultiheadAttention, x: Tensor, model_type: str = "ClearCLIP"
    ) -> Tensor:
        length, batch, width = x.shape
        packed = functional.linear(x, attn_layer.in_proj_weight, attn_layer.in_proj_bias)
        query, _, value = (
            part.reshape(length, batch * attn_layer.num_heads, -1).transpose(0, 1)
            for part in packed.chunk(3, dim=-1)
        )
        weights = (query @ query.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        attended = (weights @ value).transpose(0, 1).reshape(length, batch, width)
        return attn_layer.out_proj(attended)


def main() -> None:
    # Your code loads its own model. Here the weights are those of the included model.
    loaded = load_model("tiny")
    visual = ClearCLIPTower(
        image_size=224, patch_size=16, width=192, layers=6, heads=3, mlp_ratio=4, output_dim=192
    )
    visual.load_state_dict(loaded.model.visual.state_dict())
    visual.eval().requires_grad_(False)

    scene = tiny.demo_scenes()[0]
    text_features = TextEncoder(loaded).encode(scene.classes).features
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    baseline = visual(images)
    fsa.plug_in(visual, text_features, config=fsa.FSAConfig())
    with_feedback = visual(images)
    fsa.unplug(visual)

    change = (with_feedback - baseline).norm() / baseline.norm()
    print(f"feedback changed the patch features by {change:.0%} of their length")
    restored = torch.equal(visual(images), baseline)
    print(f"after unplug, the tower computes what it did before: {restored}")


if __name__ == "__main__":
    main()
