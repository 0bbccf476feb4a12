"""The published formulation with its avoidable costs repaired, in eager PyTorch.

The exact algebra - one matrix product for the divergence, products with values only - and a plain
`torch.sort`, without anything else of this library. Also what `torch.compile` is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.rows.contenders import NotInstalled

CONFIDENCE = 0.45

# Similarities S (B,N,N) -> which patches each row keeps, (B,N,N) bool.
Kept = Callable[[Tensor], Tensor]


def kept_by_sorting(similarity: Tensor) -> Tensor:
    """The longest prefix of the order of similarity whose cumulative confidence is at most 0.45."""
    ordered, order = torch.sort(similarity, descending=True, dim=-1)
    kept = ordered.softmax(dim=-1).cumsum(dim=-1) <= CONFIDENCE
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def kept_by_flashinfer() -> Kept:
    """The same by FlashInfer's search for a threshold, `flashinfer.sampling.top_p_renorm_probs`.

    It keeps the shortest prefix whose cumulative confidence is at least 0.45: one patch more in
    each row than is kept here, and all that are equal to that one.

    Raises:
        NotInstalled: flashinfer-python is not there.
    """
    try:
        from flashinfer.sampling import top_p_renorm_probs
    except ImportError as error:
        raise NotInstalled(f"flashinfer-python is not installed: {error}") from None

    def kept(similarity: Tensor) -> Tensor:
        confidence = similarity.softmax(dim=-1).flatten(0, 1)
        return (top_p_renorm_probs(confidence, CONFIDENCE) > 0).view_as(similarity)

    return kept


def feedback_attention(
    patch_logits: Tensor,
    uniform_logits: Tensor,
    beta: float = 3.0,
    kept_patches: Kept = kept_by_sorting,
) -> Tensor:
    """A_f (B,N,N) from logits (B,N,C) and (B,1,C), computed in float32."""
    probabilities = (patch_logits - uniform_logits).float().softmax(dim=-1)
    log = torch.log(probabilities + 1e-10)
    log = log - log.mean(dim=1, keepdim=True)
    own = (probabilities * log).sum(dim=-1, keepdim=True)
    divergence = (own - probabilities @ log.transpose(1, 2)).clamp(min=0.0)
    similarity = 1 / (divergence + 1.0)

    kept = kept_patches(similarity)
    scaled = similarity * torch.exp(beta * similarity)
    return scaled.masked_fill(~kept, float("-inf")).softmax(dim=-1).to(patch_logits.dtype)


def adapt(value: Tensor, feedback: Tensor, attention: Tensor, attended: Tensor) -> Tensor:
    """The adapted values (B,H,N,d), from V, A_f (B,N,N), A (B,N,N) and A V."""
    B, H, N, d = value.shape
    both = torch.cat([attended, value], dim=1).transpose(1, 2).reshape(B, N, 2 * H * d)
    after, only = (feedback @ both).split(H * d, dim=-1)
    mean = (after + only + attention @ only) / 3.0
    return mean.view(B, N, H, d).transpose(1, 2)
