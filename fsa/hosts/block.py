"""The last block of a vision tower, as a host finds it and as it leaves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fsa import ops
from fsa.models.tower import Tower


@dataclass(frozen=True)
class LastBlock:
    """What a host computes its attention from.

    Attributes:
        tower: the vision tower that the block belongs to.
        images: (B,3,H,W), normalised with CLIP's mean and deviation.
        tokens: (B,L,D), as they enter the block; the first `prefix_tokens` of the L belong to no
            patch, the others are the grid row by row.
        vfm_features: (B,F,gh,gw) of another vision model, or None.
    """

    tower: Tower
    images: Tensor
    tokens: Tensor
    vfm_features: Tensor | None = None
    _projected: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def prefix_tokens(self) -> int:
        """How many tokens come before the patches': 1 for CLIP, its class token."""
        return self.tower.prefix_tokens

    @property
    def patch_tokens(self) -> Tensor:
        """(B,N,D), the tokens of the patches."""
        return self.tokens[:, self.prefix_tokens :]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.tower.grid(*self.images.shape[-2:])

    @property
    def query(self) -> Tensor:
        """(B,H,L,d), projected from the normalised tokens."""
        return self._projections()["q"]

    @property
    def key(self) -> Tensor:
        """(B,H,L,d), projected from the normalised tokens."""
        return self._projections()["k"]

    @property
    def value(self) -> Tensor:
        """(B,H,L,d), projected from the normalised tokens."""
        return self._projections()["v"]

    def _projections(self) -> dict[str, Tensor]:
        if not self._projected:
            self._projected.update(self.tower.project(self.tokens, "qkv", self.grid))
        return self._projected


@dataclass(frozen=True)
class LastAttention:
    """The attention of a host's last block, on patches.

    Attributes:
        value: V (B,H,N,d).
        apply: (B,H,N,d) -> (B,H,N,d), applies the host's attention A. Where the host attends to
            the class token, its value stays what it is. None where A is the identity, or where no
            feedback follows.
        attended: A V (B,H,N,d).
        mean_value: (B,H,1,d), V under uniform attention over everything the host attends to; None
            where no feedback follows.
        step: what has gathered the above for the feedback that follows, or None.
    """

    value: Tensor
    apply: Callable[[Tensor], Tensor] | None
    attended: Tensor
    mean_value: Tensor | None
    step: ops.AttentionStep | None = None

    @classmethod
    def of_step(cls, value: Tensor, step: ops.AttentionStep) -> LastAttention:
        """Of values V (B,H,N,d) of patches and what a step has gathered."""
        return cls(value, step, step.gathered[:, :, :-1], step.gathered[:, :, -1:], step)
