"""SegEarth-OV: self-self attention of queries, keys and values, and less of what the class sees."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa.arguments import finite_number
from fsa.config import SEGEARTH_CLASS_WEIGHT, FSAConfig
from fsa.errors import InputError
from fsa.hosts.block import LastAttention, LastBlock
from fsa.hosts.self_attention import SelfAttentionHost, attention_of_pairs


class SegEarth(SelfAttentionHost):
    """SegEarth-OV (Li et al., CVPR 2025), for remote sensing, without residual and network.

    The attention is softmax(q q^T / sqrt(d)) + softmax(k k^T / sqrt(d)) + softmax(v v^T / sqrt(d)),
    so rows sum to 3. What the class token says of the whole picture weighs on every patch in CLIP;
    `class_weight` times its cosine with each text is subtracted from those of the patches. The
    class token's features go the way of the patches', by the same attention.

    The method's upsampler of features, SimFeatUp, is trained and not part of this host: its
    published numbers are with it.

    Feedback is computed from the cosines of the patches before the subtraction, and leaves the
    class token's own attention as it is.

    Args:
        class_weight: of the class token's cosines; None takes the published 0.3 where the tower
            has a class token, and 0 where it has none.

    Raises:
        InputError: a weight that is not a finite number of at least 0, or one above 0 for a tower
            without a class token.
    """

    pairs = ("qq", "kk", "vv")
    published_residual = False

    def __init__(
        self,
        visual: nn.Module,
        *,
        class_weight: float | None = None,
        residual: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(visual, residual=residual, backend=backend)
        if class_weight is None:
            class_weight = SEGEARTH_CLASS_WEIGHT if self.tower.has_class_token else 0.0
        class_weight = finite_number("class_weight", class_weight, least=0)
        if class_weight and not self.tower.has_class_token:
            raise InputError(
                f"class_weight={class_weight!r} needs a class token, which the vision tower has "
                "not; leave it out"
            )
        self.class_weight = class_weight
        self.compared_as_they_are = class_weight > 0

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        # Of a tower with a class token; without one it is 0.
        return {**super().default_options(), "class_weight": SEGEARTH_CLASS_WEIGHT}

    def attention(self, block: LastBlock, config: FSAConfig | None) -> LastAttention:
        projected = {"q": block.query, "k": block.key, "v": block.value}
        return attention_of_pairs(
            projected, self.pairs, self.backend, config, prefix_tokens=block.prefix_tokens
        )

    def finish(self, block: LastBlock, features: Tensor) -> Tensor:
        if not self.class_weight:
            return features
        class_features = self._class_features(block)
        unit, class_unit = (functional.normalize(x, dim=-1) for x in (features, class_features))
        return unit - self.class_weight * class_unit

    def _class_features(self, block: LastBlock) -> Tensor:
        """(B,1,E): what the class token gathers by the host's attention, in the shared space."""
        projected = {"q": block.query, "k": block.key, "v": block.value}
        heads = reduce(
            torch.add,
            (
                functional.scaled_dot_product_attention(
                    projected[pair[0]][:, :, :1], projected[pair[1]], block.value
                )
                for pair in self.pairs
            ),
        )
        branch = self.tower.attention_branch(heads)
        if self.residual:
            branch = self.tower.residual_branches(block.tokens[:, :1], branch)
        return self.tower.embed(branch)
