"""Hosts whose attention comes from CLIP's own queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fsa.config import FSAConfig
from fsa.hosts.base import Host, LastAttention


class SelfAttentionHost(Host):
    """Sum of softmax(a b^T / sqrt(d)) over pairs (a, b) of queries, keys and values.

    The class token stays a key. The attention is applied without building its matrix.
    """

    pairs: tuple[str, ...]

    def attention(
        self, tokens: Tensor, grid: tuple[int, int], vfm_features: Tensor | None
    ) -> LastAttention:
        needed = {*"".join(self.pairs), "v"}
        projected = self.tower.project(tokens, "".join(name for name in "qkv" if name in needed))
        value = projected["v"]
        class_value, patch_value = value[:, :, :1], value[:, :, 1:]

        def attend(values: Tensor) -> Tensor:
            return sum(
                scaled_dot_product_attention(projected[a][:, :, 1:], projected[b], values)
                for a, b in self.pairs
            )

        return LastAttention(
            value=patch_value,
            apply=lambda x: attend(torch.cat([class_value, x], dim=2)),
            attended=attend(value),
            mean_value=value.mean(dim=2, keepdim=True),
        )


class CLIP(SelfAttentionHost):
    """CLIP as it is: softmax(q k^T / sqrt(d)), residual and feed-forward network kept."""

    pairs = ("qk",)
    published_residual = True


class SCLIP(SelfAttentionHost):
    """SCLIP (Wang et al., ECCV 2024): q q^T and k k^T attention added, so rows sum to 2."""

    pairs = ("qq", "kk")
    published_residual = True


class ClearCLIP(SelfAttentionHost):
    """ClearCLIP (Lan et al., ECCV 2024): q q^T attention, no residual, no feed-forward network."""

    pairs = ("qq",)
    published_residual = False


class QueryKey(SelfAttentionHost):
    """Attention type "qk" of the paper's Table 4: CLIP's own, without residual and network."""

    pairs = ("qk",)
    published_residual = False


class QueryQuery(ClearCLIP):
    """Attention type "qq" of the paper's Table 4; the same as ClearCLIP."""


class KeyKey(SelfAttentionHost):
    """Attention type "kk" of the paper's Table 4."""

    pairs = ("kk",)
    published_residual = False


class ValueValue(SelfAttentionHost):
    """Attention type "vv" of the paper's Table 4."""

    pairs = ("vv",)
    published_residual = False


class MaskCLIP(Host):
    """MaskCLIP (Zhou et al., ECCV 2022): each patch attends to itself alone.

    Published with residual and feed-forward network; `residual=False` is the variant without
    (the paper's Table S10).
    """

    published_residual = True

    def attention(
        self, tokens: Tensor, grid: tuple[int, int], vfm_features: Tensor | None
    ) -> LastAttention:
        value = self.tower.project(tokens[:, 1:], "v")["v"]
        return LastAttention(
            value=value,
            apply=nn.Identity(),
            attended=value,
            mean_value=value.mean(dim=2, keepdim=True),
        )

    def adapt(self, attention: LastAttention, feedback: Tensor, config: FSAConfig) -> Tensor:
        # With the identity for A the three adaptations are one: A_f V.
        return super().adapt(attention, feedback, config.replace(adaptations=("only",)))
