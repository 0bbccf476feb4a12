"""What patches attend to before and after feedback, as matrices to be looked at and measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fsa import ops
from fsa.config import FSAConfig
from fsa.errors import InputError, NotFiniteError
from fsa.hosts import Host, LastAttention, LastBlock
from fsa.hosts.base import adapted_heads
from fsa.ops.checks import autocast_off
from fsa.pictures.windows import Window, plan
from fsa.segment.sizes import Sizes

if TYPE_CHECKING:
    from fsa.segment.segmentor import Segmentor


@dataclass(frozen=True)
class Attentions:
    """Attention between patches, the mean over the heads.

    Attributes:
        host: A (B,N,N); a class token that the host attends to is left out.
        feedback: A_f (B,N,N) of the last iteration; 0 where a patch was pruned.
        adapted: (B,N,N), the mean of A_f A, A A_f and A_f that takes the place of A (Eq. 14).
        features: (B,N,E), of the patches after feedback.
        host_features: (B,N,E), of the patches before feedback.
        uniform_features: (B,1,E) or (B,N,E), of the patches before feedback if every patch attended
            to all alike; None without isolation.
    """

    host: Tensor
    feedback: Tensor
    adapted: Tensor
    features: Tensor
    host_features: Tensor
    uniform_features: Tensor | None


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


@dataclass(frozen=True)
class WindowAttentions:
    """What all patches of a window attend to, before and after feedback.

    Attributes:
        size: height and width of the resized picture in pixels.
        area: the window in it, with the padding to whole patches: it may reach beyond the picture.
        grid: rows and columns of patches in the window.
        patch: row and column on that grid of the patch that the window was chosen for.
        attentions: of a batch of one, the window.
    """

    size: tuple[int, int]
    area: Window
    grid: tuple[int, int]
    patch: tuple[int, int]
    attentions: Attentions

    def of_patch(self) -> PatchAttentions:
        """What the patch attends to that the window was chosen for."""
        seen, index = self.attentions, self.patch[0] * self.grid[1] + self.patch[1]
        host, feedback, adapted = (
            matrix[0, index].unflatten(0, self.grid).float().cpu().numpy()
            for matrix in (seen.host, seen.feedback, seen.adapted)
        )
        return PatchAttentions(
            size=self.size,
            area=self.area,
            patch=self.patch,
            host=host,
            feedback=feedback,
            adapted=adapted,
        )


def window_attentions(
    segmentor: Segmentor,
    image: Tensor,
    text_features: Tensor,
    patch: tuple[int, int] | None,
    sizes: Sizes,
    *,
    max_patches: int | None = None,
) -> WindowAttentions:
    """What the patches of a window attend to, before and after feedback.

    Attention never leaves a window; of the windows that show the patch, this is the one whose
    middle is nearest to it.

    Args:
        segmentor: with feedback.
        image: the picture (3,h,w), resized and normalised, on the model's device.
        text_features: (Q,E) of unit length.
        patch: row and column on the grid of patches of the resized picture, from 0; None takes the
            patch in the middle.
        sizes: in which it is cut.
        max_patches: a window with more is refused before its attention is computed.

    Raises:
        InputError: a patch that is not there; too many patches.
        NotFiniteError: attention with NaN or inf.
    """
    assert segmentor.config is not None
    height, width = image.shape[-2:]
    patch_height, patch_width = segmentor.host.tower.patch_size
    rows, columns = math.ceil(height / patch_height), math.ceil(width / patch_width)
    row, column = (
        (height // 2 // patch_height, width // 2 // patch_width) if patch is None else patch
    )
    if not (0 <= row < rows and 0 <= column < columns):
        raise InputError(
            f"patch={row},{column} is not in the picture: it has rows 0 to {rows - 1} "
            f"and columns 0 to {columns - 1} of patches"
        )
    y = min((row + 0.5) * patch_height, height - 1)
    x = min((column + 0.5) * patch_width, width - 1)
    parts = plan(height, width, sizes.window, sizes.stride)
    part = min(parts, key=lambda window: math.hypot(*_from_middle(window, y, x)))
    padded, (top, left) = segmentor.padded(part.of(image)[None])
    with autocast_off(padded), torch.no_grad():
        vfm_features, tokens = segmentor.vfm_features(padded)
        grid = segmentor.host.grid(padded.shape[-2], padded.shape[-1], vfm_features)
        if max_patches is not None and math.prod(grid) > max_patches:
            raise InputError(
                f"a window of {grid[0]} x {grid[1]} = {math.prod(grid)} patches is too large: at "
                f"most {max_patches} are accepted; choose a smaller window"
            )
        seen = attentions(
            segmentor.host,
            padded,
            text_features,
            vfm_features=vfm_features,
            tokens=tokens,
            config=segmentor.config,
        )
    if not (seen.host.isfinite().all() and seen.adapted.isfinite().all()):
        raise NotFiniteError("the attention holds NaN or inf")
    return WindowAttentions(
        size=(height, width),
        area=Window(part.top - top, part.left - left, *padded.shape[-2:]),
        grid=grid,
        patch=(
            int((y - part.top + top) * grid[0] / padded.shape[-2]),
            int((x - part.left + left) * grid[1] / padded.shape[-1]),
        ),
        attentions=seen,
    )


def _from_middle(window: Window, y: float, x: float) -> tuple[float, float]:
    return window.top + window.height / 2 - y, window.left + window.width / 2 - x


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
    terms = [forms[name]() for name in config.adaptations]
    adapted = reduce(torch.add, terms) / len(terms)
    return Attentions(
        host=matrix,
        feedback=feedback,
        adapted=adapted,
        features=tail(heads),
        host_features=seen[0][0],
        uniform_features=seen[0][1],
    )


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
