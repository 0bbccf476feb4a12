"""Hosts whose attention comes from CLIP's own queries, keys and values."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fsa import ops
from fsa.config import FSAConfig
from fsa.errors import InputError
from fsa.hosts.base import Host
from fsa.hosts.block import LastAttention, LastBlock


def attention_of_pairs(
    projected: dict[str, Tensor],
    pairs: tuple[str, ...],
    backend: str,
    config: FSAConfig | None,
    *,
    prefix_tokens: int = 1,
    bias: Tensor | None = None,
    match_mass: bool = False,
) -> LastAttention:
    """Sum of softmax(a b^T / sqrt(d) + bias) over pairs (a, b) of queries, keys and values.

    Args:
        projected: "v" and the others that `pairs` name, each (B,H,L,d), class token first.
        pairs: such as ("qk",) or ("qq", "kk").
        backend: of the ops.
        config: of the feedback that will follow, or None.
        prefix_tokens: how many tokens before the patches; they are keys, and stay what they are.
        bias: (N,L), added to the scores of patches, or None.
        match_mass: lets A_f V count as many times as there are pairs, which is what the rows of
            the attention sum to.
    """
    # The mean over the pairs, of values so many times as large: A V is the same, A_f V is not.
    mass = len(pairs) if match_mass and config is not None else 1
    value = projected["v"] * mass if mass > 1 else projected["v"]
    prefix, patches = value[:, :, :prefix_tokens], value[:, :, prefix_tokens:]

    def attend(values: Tensor) -> Tensor:
        attended = (
            scaled_dot_product_attention(
                projected[pair[0]][:, :, prefix_tokens:],
                projected[pair[1]],
                values,
                attn_mask=bias,
            )
            for pair in pairs
        )
        total = reduce(torch.add, attended)
        return total / mass if mass > 1 else total

    attended = attend(value)
    if config is None:
        return LastAttention(patches, None, attended, None)

    def attend_with_prefix(values: Tensor, scale: float) -> Tensor:
        return attend(torch.cat([prefix * scale, values], dim=2))

    step = ops.AttentionStep(attend_with_prefix, value, attended, config, backend)
    if mass > 1:
        # Uniform attention stays as published, with rows that sum to 1.
        step.gathered[:, :, -1:] /= mass
    return LastAttention.of_step(patches, step)


def identity_attention(value: Tensor, *, feedback: bool = True) -> LastAttention:
    """Each patch attends to itself alone: V (B,H,N,d) of patches."""
    mean = value.mean(dim=2, keepdim=True) if feedback else None
    return LastAttention(value=value, apply=None, attended=value, mean_value=mean)


class SelfAttentionHost(Host):
    """Sum of softmax(a b^T / sqrt(d)) over pairs (a, b) of queries, keys and values.

    The class token stays a key. The attention is applied without building its matrix.
    """

    pairs: tuple[str, ...]
    match_mass = False

    def attention(self, block: LastBlock, config: FSAConfig | None) -> LastAttention:
        needed = {*"".join(self.pairs), "v"}
        names = "".join(name for name in "qkv" if name in needed)
        return attention_of_pairs(
            self.tower.project(block.tokens, names, block.grid),
            self.pairs,
            self.backend,
            config,
            prefix_tokens=block.prefix_tokens,
            bias=self.bias(block),
            match_mass=self.match_mass,
        )

    def bias(self, block: LastBlock) -> Tensor | None:
        """What is added to the scores of patches, (N,L) in the type of the tokens, or None."""
        return None


class CLIP(SelfAttentionHost):
    """CLIP as it is: softmax(q k^T / sqrt(d)), residual and feed-forward network kept."""

    pairs = ("qk",)
    published_residual = True


class SCLIP(SelfAttentionHost):
    """SCLIP (Wang et al., ECCV 2024): q q^T and k k^T attention added, so rows of A sum to 2.

    Args:
        match_mass: True lets feedback take the mean of A_f A V, A A_f V and 2 A_f V, whose rows all
            sum to 2. As published the last term is A_f V, whose rows sum to 1, and the adapted
            attention is five sixths of the host's. The host without feedback is the same.
    """

    pairs = ("qq", "kk")
    published_residual = True

    def __init__(
        self,
        visual: nn.Module,
        *,
        match_mass: bool = False,
        residual: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(visual, residual=residual, backend=backend)
        if not isinstance(match_mass, bool):
            raise InputError(f"match_mass must be True or False, not {match_mass!r}")
        self.match_mass = match_mass


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
    """MaskCLIP (Zhou et al., ECCV 2022): each patch attends only to itself.

    Published with residual and feed-forward network; `residual=False` is the variant without
    (the paper's Table S10).
    """

    published_residual = True

    def attention(self, block: LastBlock, config: FSAConfig | None) -> LastAttention:
        value = self.tower.project(block.patch_tokens, "v")["v"]
        return identity_attention(value, feedback=config is not None)
