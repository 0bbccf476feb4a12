"""PEARL: keys are rotated onto the queries before they meet."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fsa.arguments import finite_number
from fsa.config import PEARL_KEY_WEIGHT, PEARL_STEPS, FSAConfig
from fsa.errors import InputError
from fsa.hosts.base import Host
from fsa.hosts.block import LastAttention, LastBlock
from fsa.hosts.self_attention import attention_of_pairs

# Of the published code: below it a sum of weights or a norm counts as nothing.
_SMALLEST = 1e-6


class PEARL(Host):
    """The attention of PEARL (Pei et al., CVPR 2026), without residual and feed-forward network.

    In each head, with weights w_i = |q_i| over the patches (0 for the class token), queries and
    keys are centred: q'_i = q_i - sum_j w_j q_j / sum_j w_j, and k' likewise with the same weights.
    R, the orthogonal factor of the polar decomposition of M = k'^T q', is the rotation that takes
    the centred keys nearest to the centred queries (orthogonal Procrustes). The attention is

        softmax((q (k R)^T + key_weight k' k'^T) / sqrt(d)),

    with the class token among the keys. M, R and what is centred are computed in float32.

    R = M (M^T M)^(-1/2), where the root is found by Newton-Schulz steps on M^T M over its Frobenius
    norm. As published there are five, which is far from the end where M's singular values differ
    much. The published code and this one then agree to rounding, and both are off the exact R by
    45% of its length on the small tower of random weights in the tests and 43% on a ViT-B/16 of
    random weights; 22% even where keys and queries are the same random numbers. Starting from the
    spectral norm instead changes little. `steps=None` takes R from a singular value decomposition.

    The paper's second step, the propagation of logits over the picture, belongs to evaluation: see
    `fsa.evaluation.refinement.text_aware_propagation`.

    Args:
        steps: of the Newton-Schulz iteration; None for the exact R, which synchronises on a GPU
            and cannot be captured in a CUDA graph.
        key_weight: of the product of the centred keys; 0 leaves it out.

    Raises:
        InputError: steps that are no positive integer, or a weight that is not a finite number of
            at least 0.
    """

    published_residual = False

    def __init__(
        self,
        visual: nn.Module,
        *,
        steps: int | None = PEARL_STEPS,
        key_weight: float = PEARL_KEY_WEIGHT,
        residual: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(visual, residual=residual, backend=backend)
        if steps is not None and (
            not isinstance(steps, int) or isinstance(steps, bool) or steps < 1
        ):
            raise InputError(
                f"steps={steps!r} is not accepted: it must be an integer >= 1, or None for the "
                "exact rotation"
            )
        self.steps = steps
        self.key_weight = finite_number("key_weight", key_weight, least=0)

    def attention(self, block: LastBlock, config: FSAConfig | None) -> LastAttention:
        query, key = self._aligned(block.query, block.key, block.prefix_tokens)
        value = block.value
        projected = {"q": query.to(value.dtype), "k": key.to(value.dtype), "v": value}
        return attention_of_pairs(
            projected, ("qk",), self.backend, config, prefix_tokens=block.prefix_tokens
        )

    def _aligned(self, query: Tensor, key: Tensor, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        """Queries and keys whose product, over the root of their width, makes the scores.

        Both terms of the scores are one product of twice the width.

        Args:
            query, key: (B,H,L,d).

        Returns:
            Each (B,H,L,2d), or (B,H,L,d) without the product of the keys; at least float32.
        """
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(wide), key.to(wide)
        weights = query[:, :, prefix_tokens:].norm(dim=-1, keepdim=True)
        weights = weights / (weights.sum(dim=2, keepdim=True) + _SMALLEST)
        centred_query, centred_key = (
            x - (weights * x[:, :, prefix_tokens:]).sum(dim=2, keepdim=True) for x in (query, key)
        )
        rotated = key @ orthogonal_factor(centred_key.mT @ centred_query, self.steps)
        if not self.key_weight:
            return query, rotated
        # The attention divides by the root of the width, which is twice as large here.
        both = torch.cat([query, self.key_weight * centred_key], dim=-1) * math.sqrt(2)
        return both, torch.cat([rotated, centred_key], dim=-1)


def orthogonal_factor(matrix: Tensor, steps: int | None) -> Tensor:
    """R of the polar decomposition M = R S, with R orthogonal and S symmetric and positive.

    Args:
        matrix: M (...,d,d).
        steps: of the Newton-Schulz iteration for (M^T M)^(-1/2); None for a singular value
            decomposition M = U D V^T, of which R = U V^T.
    """
    if steps is None:
        left, _, right = torch.linalg.svd(matrix)
        return left @ right
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    square = matrix.mT @ matrix
    norm = square.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(_SMALLEST)
    # `root` tends to the square root of `square / norm`, `inverse` to that root's inverse.
    root = square / norm + _SMALLEST * identity
    inverse = identity.expand_as(root)
    for _ in range(steps):
        step = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    return matrix @ inverse / norm.sqrt()
