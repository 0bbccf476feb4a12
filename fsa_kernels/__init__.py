"""Triton kernels for feedback self-adaptive attention. Knows nothing of CLIP.

Imports without Triton and without a GPU; the kernels themselves are imported when first called.

    feedback_attention   logits -> A_f, in three launches, at least as exact as float32
    apply_feedback       A_f times columns, without an N x N matrix
    proxy_attention      affinity of features applied to values, without an N x N matrix
    warmup               compiles ahead of the first call

Inputs are trusted here; `fsa.ops` checks them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "apply_feedback",
    "available",
    "feedback_attention",
    "interpreting",
    "proxy_attention",
    "warmup",
]


# Looked for once: a compiler that traces `available` cannot follow the search.
_INSTALLED = importlib.util.find_spec("triton") is not None


def available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def feedback_attention(
    patch_logits: Tensor, uniform_logits: Tensor | None, **options: Any
) -> Tensor:
    """See `fsa_kernels.feedback.feedback_attention`."""
    from fsa_kernels import feedback

    return feedback.feedback_attention(patch_logits, uniform_logits, **options)


def apply_feedback(
    patch_logits: Tensor, uniform_logits: Tensor | None, columns: Tensor, **options: Any
) -> Tensor:
    """See `fsa_kernels.feedback.apply_feedback`."""
    from fsa_kernels import feedback

    return feedback.apply_feedback(patch_logits, uniform_logits, columns, **options)


def proxy_attention(features: Tensor, value: Tensor, *, shift: float, gain: float) -> Tensor:
    """See `fsa_kernels.proxy.proxy_attention`."""
    from fsa_kernels import proxy

    return proxy.proxy_attention(features, value, shift=shift, gain=gain)


def warmup(*args: Any, **kwargs: Any) -> None:
    """See `fsa_kernels.launch.warmup`."""
    from fsa_kernels import launch

    launch.warmup(*args, **kwargs)
