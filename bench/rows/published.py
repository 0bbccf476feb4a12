"""The published formulation, written plainly: what it computes and how, to compare with.

The divergence by a tensor of N x N x C, a full sort with its inverse permutation, the scaled
similarity repeated for every head before the softmax, and products of N x N matrices per head. Our
own code, after the form of the authors' (github.com/chi-chi-zx/FSA); it agrees with
`fsa.reference` to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONFIDENCE = 0.45


def scaled_similarity(patch_logits: Tensor, uniform_logits: Tensor, beta: float = 3.0) -> Tensor:
    """S exp(beta S) (B,N,N) of the kept patches, -inf elsewhere.

    Args:
        patch_logits: (B,N,C), scaled.
        uniform_logits: (B,1,C) or (B,N,C), scaled.
        beta: sharpness of the scaling.
    """
    probabilities = (patch_logits - uniform_logits).softmax(dim=-1)
    log = torch.log(probabilities + 1e-10)
    difference = log.unsqueeze(2) - log.unsqueeze(1)
    divergence = (probabilities.unsqueeze(2) * difference).sum(dim=3).clamp(min=0.0)
    similarity = 1 / (divergence + 1.0)

    ordered, order = torch.sort(similarity, descending=True, dim=-1)
    kept = ordered.softmax(dim=-1).cumsum(dim=-1) <= CONFIDENCE
    kept[..., 0] = True
    pruned = ordered.clone()
    pruned[~kept] = float("-inf")
    B, N, _ = similarity.shape
    positions = torch.arange(N, device=order.device).view(1, 1, N).expand(B, N, N)
    inverse = torch.empty_like(order).scatter_(-1, order, positions)
    pruned = pruned.gather(-1, inverse)

    outside = pruned == float("-inf")
    scaled = pruned * torch.exp(beta * pruned)
    scaled[outside] = float("-inf")
    return scaled


def feedback_attention(patch_logits: Tensor, uniform_logits: Tensor, beta: float = 3.0) -> Tensor:
    """A_f (B,N,N) from logits (B,N,C) and (B,1,C)."""
    return scaled_similarity(patch_logits, uniform_logits, beta).softmax(dim=-1)


def per_head(matrix: Tensor, heads: int) -> Tensor:
    """(B,N,N) -> (B*H,N,N), a copy for every head."""
    B, N, M = matrix.shape
    return matrix.unsqueeze(1).repeat(1, heads, 1, 1).reshape(B * heads, N, M)


def adapt(value: Tensor, scaled: Tensor, attention: Tensor) -> Tensor:
    """The adapted values (B*H,N,d), by products of N x N matrices for every head.

    Args:
        value: (B*H,N,d).
        scaled: (B,N,N) of `scaled_similarity`; the softmax comes after repeating it per head.
        attention: the host's attention (B*H,N,N).
    """
    feedback = per_head(scaled.to(value.dtype), len(value) // len(scaled)).softmax(dim=-1)
    ensemble = torch.bmm(feedback, attention) + torch.bmm(attention, feedback) + feedback
    return torch.bmm(ensemble / 3.0, value)
