"""Attentions that a feedback step applies more than once, and what the applications share."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError
from fsa.ops import library
from fsa.ops.checks import check_same, check_tensor
from fsa.ops.dispatch import choose
from fsa_kernels import Adaptations

# What ProxyCLIP's attention may take, as a matrix, before blocks of its rows are made instead.
_STORED_BYTES = 1 << 29


class ProxyAttention:
    """ProxyCLIP's attention, prepared for more than one application.

    s = cosine of the features; s <- (s - shift * mean(s)) * gain; negative s are masked; softmax
    over the rest. The mean is taken per image. A patch with nothing left attends to itself.
    (Lan et al., "ProxyCLIP", ECCV 2024, section 3.3.)

    On a GPU the matrix is made once and kept, one entry in the type of the features for each pair
    of patches, up to 512 MiB; beyond, and on the CPU, blocks of its rows are made for every
    application.

    Args:
        features: (B,N,F), of any length; normalised here.
        shift, gain: ProxyCLIP's constants (its beta and gamma).
        backend: "auto", "triton" or "torch".

    Raises:
        InputError: as `feedback_attention`.
        OutOfMemoryError: the work on it does not fit.
    """

    def __init__(
        self,
        features: Tensor,
        *,
        shift: float = PROXY_SHIFT,
        gain: float = PROXY_GAIN,
        backend: str = "auto",
    ) -> None:
        check_tensor("features", features, "(B, N, F)")
        # Written with comparisons, which torch.compile traces; NaN fails them.
        if not (abs(shift) < math.inf and 0 < gain < math.inf):
            raise InputError(
                f"shift={shift!r} and gain={gain!r} are not accepted: they must be finite, gain > 0"
            )
        self.backend = choose(features.device, features.dtype, backend).backend
        self.gain = gain
        self._features = features
        B, N, _ = features.shape
        stored = self.backend == "triton" and features.dtype.itemsize * B * N * N <= _STORED_BYTES
        self._state = library.proxy_prepare(features, shift, gain, stored, self.backend)

    def __call__(self, value: Tensor, *, add: Tensor | None = None) -> Tensor:
        """The attention applied to values (B,N,D), plus a tensor of their shape.

        Returns:
            (B,N,D) in the type of `value`.
        """
        self._check_value(value)
        return library.proxy_apply(*self._state, value, add, self.gain, self.backend)

    def gather(self, value: Tensor, config: FSAConfig) -> tuple[Tensor, Tensor]:
        """Applies the attention to V (B,N,D), and prepares the columns that a feedback step
        multiplies with A_f.

        Returns:
            A V, and after its last row the mean of V, (B,N+1,D); and the scaled columns (B,N,D) or
            (B,N,2D) of `Adaptations`.
        """
        self._check_value(value)
        adaptations = library.op_adaptations(config)
        return library.proxy_gather(*self._state, value, self.gain, adaptations, self.backend)

    def _check_value(self, value: Tensor) -> None:
        features = self._features
        check_tensor("value", value, "(B, N, D)")
        if features.shape[:2] != value.shape[:2]:
            raise InputError(
                f"features has shape {tuple(features.shape)} and value {tuple(value.shape)}: "
                "the first two sizes, images and patches, must agree"
            )
        check_same("features", features, "value", value)


class AttentionStep:
    """A host's attention in a feedback step: applied to the values before, and once more to A_f V.

    What a step takes besides, the mean of the values and the columns that A_f is multiplied with,
    is laid out in one launch.

    Attributes:
        gathered: (B,H,N+1,d): A V, and after the last row V under uniform attention.

    Args:
        apply: from values (B,H,N,d) of the patches, and the scale of those of all else that the
            host attends to, to (B,H,N,d): applies the host's attention A.
        value: V (B,H,L,d) of everything the host attends to, the patches' last.
        attended: A V (B,H,N,d) of the patches.
        config: only `adaptations` matters here.
        backend: "auto", "triton" or "torch".
    """

    def __init__(
        self,
        apply: Callable[[Tensor, float], Tensor],
        value: Tensor,
        attended: Tensor,
        config: FSAConfig,
        backend: str = "auto",
    ) -> None:
        backend = choose(value.device, value.dtype, backend).backend
        adaptations = library.op_adaptations(config)
        gathered, columns = library.gather(value, attended, adaptations, backend)
        self._apply = apply
        self._hold(gathered, columns, value.shape[1], adaptations)

    def __call__(self, value: Tensor) -> Tensor:
        """The attention applied to other values (B,H,N,d)."""
        return self._apply(value, 1.0)

    def adapted(self, apply_feedback: Callable[[Tensor], Tensor]) -> Tensor:
        """The adapted values (B,H,N,d), given what multiplies columns (B,N,K) with A_f."""
        dtype = self._columns.dtype
        product = apply_feedback(self._columns)
        if not self._adaptations.before:
            return heads_apart(product.to(dtype), self._heads)
        width = self.gathered.shape[1] * self.gathered.shape[-1]
        others = product[..., :width] if self._adaptations.second() else None
        return self._apply_and_add(product[..., -width:].to(dtype), others).to(dtype)

    def _hold(
        self, gathered: Tensor, columns: Tensor, heads: int, adaptations: Adaptations
    ) -> None:
        self.gathered = heads_apart(gathered, heads)
        self._columns = columns
        self._heads = heads
        self._adaptations = adaptations

    def _apply_and_add(self, value: Tensor, others: Tensor | None) -> Tensor:
        # The terms come scaled, so that their sum is their mean.
        total = self._apply(heads_apart(value, self._heads), self._adaptations.scale())
        return total if others is None else total + heads_apart(others, self._heads)


class ProxyStep(AttentionStep):
    """An `AttentionStep` for ProxyCLIP's attention, whose kernels lay out the columns and add the
    terms without further launches.

    Args:
        attention: of the images.
        value: V (B,H,N,d).
        config: only `adaptations` matters here.
    """

    def __init__(self, attention: ProxyAttention, value: Tensor, config: FSAConfig) -> None:
        self._attention = attention
        gathered, columns = attention.gather(heads_side_by_side(value), config)
        self._hold(gathered, columns, value.shape[1], library.op_adaptations(config))

    def __call__(self, value: Tensor) -> Tensor:
        """The attention applied to other values (B,H,N,d)."""
        return heads_apart(self._attention(heads_side_by_side(value)), self._heads)

    def _apply_and_add(self, value: Tensor, others: Tensor | None) -> Tensor:
        return heads_apart(self._attention(value, add=others), self._heads)


def heads_side_by_side(value: Tensor) -> Tensor:
    """Values of heads (B,H,N,d) as (B,N,D)."""
    return value.transpose(1, 2).flatten(2)


def heads_apart(value: Tensor, heads: int) -> Tensor:
    """Values (B,N,D) as those of heads (B,H,N,d)."""
    return value.unflatten(-1, (heads, -1)).transpose(1, 2)
