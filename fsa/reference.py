"""Feedback self-adaptive attention as the paper defines it: readable, any dtype, no tricks.

The definition that every backend is tested against. It builds the N x N x C tensor of pairwise
divergences and multiplies N x N matrices with each other, so it is for small inputs only.

Chi et al., "Plug-in Feedback Self-adaptive Attention in CLIP for Training-free Open-Vocabulary
Segmentation", ICCV 2025. Shapes: B images, N patches, C text queries, H heads of width d.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from fsa.config import PROBABILITY_FLOOR, PROXY_GAIN, PROXY_SHIFT, FSAConfig


def isolated_probabilities(patch_logits: Tensor, uniform_logits: Tensor | None) -> Tensor:
    """P (B,N,C): what the attention itself contributed to each patch's prediction (Eq. 6)."""
    if uniform_logits is not None:
        patch_logits = patch_logits - uniform_logits
    return patch_logits.softmax(dim=-1)


def divergence(probabilities: Tensor) -> Tensor:
    """KL (B,N,N): KL_ij = sum_c P_ic (log P_ic - log P_jc), not below 0 (Eq. 7)."""
    log = (probabilities + PROBABILITY_FLOOR).log()
    difference = log[:, :, None, :] - log[:, None, :, :]
    return (probabilities[:, :, None, :] * difference).sum(dim=-1).clamp(min=0)


def similarity(probabilities: Tensor, config: FSAConfig) -> Tensor:
    """S (B,N,N) in [0, 1]: 1 / (1 + KL) (Eq. 8), or the cosine of the probabilities."""
    if config.similarity == "cosine":
        unit = torch.nn.functional.normalize(probabilities, dim=-1)
        return (unit[:, :, None, :] * unit[:, None, :, :]).sum(dim=-1).clamp(0, 1)
    return 1 / (1 + divergence(probabilities))


def kept_patches(similarities: Tensor, config: FSAConfig) -> Tensor:
    """Which patches each row keeps, (B,N,N) bool: a prefix of the order of similarity (Eq. 9).

    Equal similarities are ordered by patch index; the first of the order is always kept.
    """
    N = similarities.shape[-1]
    ordered, order = similarities.sort(dim=-1, descending=True, stable=True)
    if config.pruning == "confidence" and config.confidence < 1:
        kept_in_order = ordered.softmax(dim=-1).cumsum(dim=-1) <= config.confidence
    elif config.pruning == "ratio":
        rank = torch.arange(1, N + 1, device=similarities.device)
        kept_in_order = (rank <= math.floor(config.ratio * N)).expand_as(ordered).clone()
    elif config.pruning == "threshold":
        kept_in_order = ordered >= config.threshold
    else:
        kept_in_order = torch.ones_like(ordered, dtype=torch.bool)
    kept_in_order[..., 0] = True
    return torch.zeros_like(kept_in_order).scatter(-1, order, kept_in_order)


def scaled_similarity(similarities: Tensor, config: FSAConfig) -> Tensor:
    """S * exp(beta * S) (Eq. 10), or S where the configuration switches scaling off."""
    if not config.scaling:
        return similarities
    return similarities * (config.beta * similarities).exp()


def feedback_attention(
    patch_logits: Tensor, uniform_logits: Tensor | None = None, config: FSAConfig | None = None
) -> Tensor:
    """A_f (B,N,N): attention between patches by how similar their predictions are (Eqs. 6 to 10).

    Args:
        patch_logits: (B,N,C), scaled.
        uniform_logits: (B,1,C) or (B,N,C), scaled, or None for no isolation.
    """
    config = config or FSAConfig()
    probabilities = isolated_probabilities(
        patch_logits, uniform_logits if config.isolation else None
    )
    similarities = similarity(probabilities, config)
    feedback = scaled_similarity(similarities, config)
    feedback = feedback.masked_fill(~kept_patches(similarities, config), float("-inf"))
    return feedback.softmax(dim=-1)


def adapt(
    value: Tensor, feedback: Tensor, attention: Tensor, config: FSAConfig | None = None
) -> Tensor:
    """The adapted values (B,H,N,d): the mean over the configured adaptations (Eqs. 11 to 14).

    Args:
        value: (B,H,N,d).
        feedback: A_f, (B,N,N), the same for all heads.
        attention: A, (B,N,N) shared by the heads or (B,H,N,N).
    """
    config = config or FSAConfig()
    feedback = feedback[:, None]
    if attention.ndim == 3:
        attention = attention[:, None]
    adapted_attention = {
        "after": lambda: feedback @ attention,
        "before": lambda: attention @ feedback,
        "only": lambda: feedback,
    }
    ensemble = reduce(torch.add, [adapted_attention[name]() for name in config.adaptations])
    return ensemble @ value / len(config.adaptations)


def proxy_attention(
    features: Tensor, value: Tensor, shift: float = PROXY_SHIFT, gain: float = PROXY_GAIN
) -> Tensor:
    """ProxyCLIP's attention by the affinity of another model's features, applied to the values.

    Args:
        features: (B,N,F).
        value: (B,N,D).

    The mean of the affinity is taken per image; a patch with nothing above it attends to itself.
    """
    return proxy_weights(features, shift, gain) @ value


def proxy_weights(features: Tensor, shift: float = PROXY_SHIFT, gain: float = PROXY_GAIN) -> Tensor:
    """A (B,N,N) of ProxyCLIP: softmax of gain * (cosine - shift * mean), negatives masked."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    affinity = unit @ unit.transpose(1, 2)
    affinity = (affinity - shift * affinity.mean(dim=(1, 2), keepdim=True)) * gain
    allowed = affinity >= 0
    alone = ~allowed.any(dim=-1, keepdim=True)
    itself = torch.eye(affinity.shape[-1], dtype=torch.bool, device=affinity.device)
    return affinity.masked_fill(~(allowed | (alone & itself)), float("-inf")).softmax(dim=-1)
