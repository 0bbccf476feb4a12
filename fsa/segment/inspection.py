"""What patches attend to before and after feedback, as matrices to be looked at and measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fsa import ops
from fsa.config import FSAConfig
from fsa.hosts import Host, LastAttention, LastBlock
from fsa.hosts.base import adapted_heads
from fsa.pictures.windows import Window


@dataclass(frozen=True)
class Attentions:
    """Attention between patches, the mean over the heads.

    Attributes:
        host: A (B,N,N); a class token that the host attends to is left out.
        feedback: A_f (B,N,N) of the last iteration; 0 where a patch was pruned.
        adapted: (B,N,N), the mean of A_f A, A A_f and A_f that takes the place of A (Eq. 14).
        features: (B,N,E), of the patches after feedback.
    """

    host: Tensor
    feedback: Tensor
    adapted: Tensor
    features: Tensor


@dataclass(frozen=True)
class PatchAttentions:
    """What one patch attends to in a window, before and after feedback.

    Attributes:
        size: height and width of the resized picture in pixels.
        area: the window in it, with the padding to whole patches: it may reach beyond the picture.
        patch: row and column of the patch on the window's grid.
        host: its row of A, (gh,gw) float32.
        feedback: its row of A_f; 0 where a patch was pruned.
        adapted: its row of what takes the place of A.
    """

    size: tuple[int, int]
    area: Window
    patch: tuple[int, int]
    host: np.ndarray
    feedback: np.ndarray
    adapted: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Which patches were kept, (gh,gw) bool."""
        return self.feedback > 0


@torch.no_grad()
def attentions(
    host: Host,
    images: Tensor,
    text_features: Tensor,
    *,
    vfm_features: Tensor | None = None,
    tokens: Tensor | None = None,
    config: FSAConfig,
) -> Attentions:
    """Runs a host with feedback and keeps what it attended to.

    Args:
        host, images, text_features, vfm_features, tokens, config: as in `Host.features`.
    """
    if tokens is None:
        tokens = host.tower.trunk(images)
    attention = host.attention(LastBlock(host.tower, images, tokens, vfm_features), config)
    tail = partial(host.tail, tokens)
    seen: list[tuple[Tensor, Tensor | None]] = []
    heads = adapted_heads(
        attention,
        tail,
        text_features,
        config,
        host.backend,
        observe=lambda *features: seen.append(features),
    )
    matrix = attention_matrix(attention)
    feedback = ops.feedback_attention(
        *seen[-1],
        text_features=text_features,
        config=config,
        dtype=matrix.dtype,
        backend=host.backend,
    )
    forms = {
        "after": lambda: feedback @ matrix,
        "before": lambda: matrix @ feedback,
        "only": lambda: feedback,
    }
    adapted = sum(forms[name]() for name in config.adaptations) / len(config.adaptations)
    return Attentions(host=matrix, feedback=feedback, adapted=adapted, features=tail(heads))


def attention_matrix(attention: LastAttention) -> Tensor:
    """The host's attention A between patches (B,N,N), the mean over the heads.

    Hosts only ever apply A. Applied to unit vectors, as many at once as a value is wide, it gives
    its columns; what it gives for zeros is the class token's part.
    """
    value = attention.value
    B, _, N, width = value.shape
    if attention.apply is None:
        return torch.eye(N, dtype=value.dtype, device=value.device).expand(B, N, N)
    nothing = attention.apply(torch.zeros_like(value))
    columns = []
    for first in range(0, N, width):
        count = min(width, N - first)
        unit = torch.zeros_like(value)
        unit[:, :, range(first, first + count), range(count)] = 1
        columns.append((attention.apply(unit) - nothing)[..., :count])
    return torch.cat(columns, dim=-1).mean(dim=1)
