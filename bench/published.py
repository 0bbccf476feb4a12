"""The published formulation, written plainly: what it computes and how, to compare with.

The divergence by a tensor of N x N x C, a full sort with its inverse permutation, the feedback
attention repeated for every head, and products of N x N matrices per head. Our own code, after the
form of the authors' (github.com/chi-chi-zx/FSA); it agrees with `fsa.reference` to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def feedback_attention(
    patch_logits: Tensor, uniform_logits: Tensor, beta: float = 3.0, confidence: float = 0.45
) -> Tensor:
    """A_f (B,N,N) from logits (B,N,C) and (B,1,C)."""
    probabilities = (patch_logits - uniform_logits).softmax(dim=-1)
    log = torch.log(probabilities + 1e-10)
    difference = log.unsqueeze(2) - log.unsqueeze(1)
    divergence = (probabilities.unsqueeze(2) * difference).sum(dim=3).clamp(min=0.0)
    similarity = 1 / (divergence + 1.0)

    ordered, order = torch.sort(similarity, descending=True, dim=-1)
    kept = ordered.softmax(dim=-1).cumsum(dim=-1) <= confidence
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
    return scaled.softmax(dim=-1)


def adapt(value: Tensor, feedback: Tensor, attention: Tensor) -> Tensor:
    """The adapted values (B,H,N,d), from V (B,H,N,d), A_f (B,N,N) and A (B,N,N)."""
    B, H, N, d = value.shape
    per_head = feedback.unsqueeze(1).repeat(1, H, 1, 1).reshape(B * H, N, N)
    original = attention.unsqueeze(1).repeat(1, H, 1, 1).reshape(B * H, N, N)
    ensemble = torch.bmm(per_head, original) + torch.bmm(original, per_head) + per_head
    adapted = torch.bmm(ensemble / 3.0, value.reshape(B * H, N, d))
    return adapted.view(B, H, N, d)
