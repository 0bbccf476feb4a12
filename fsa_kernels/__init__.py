"""Triton kernels for feedback self-adaptive attention. Knows nothing of CLIP.

Imports without Triton and without a GPU; the kernels themselves are imported when first called.

    feedback_attention   logits, or features and texts, -> A_f, in three launches
    apply_feedback       A_f times columns, without an N x N matrix
    gather               values and attended values, laid out for the products of a step
    proxy_prepare, proxy_apply, proxy_gather
                         the affinity of features, applied to values once or more
    warmup               compiles ahead of the first call
    Options, Adaptations what a caller chooses

Inputs are trusted here; `fsa.ops` checks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fsa_kernels.options import Adaptations, Options
from fsa_kernels.runtime import available, interpreting
from fsa_kernels.warmup import warmup

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Adaptations",
    "Options",
    "apply_feedback",
    "available",
    "feedback_attention",
    "gather",
    "interpreting",
    "proxy_apply",
    "proxy_gather",
    "proxy_prepare",
    "warmup",
]


def feedback_attention(*args: Any, **options: Any) -> Tensor:
    """See `fsa_kernels.feedback.feedback_attention`."""
    from fsa_kernels import feedback

    return feedback.feedback_attention(*args, **options)


def apply_feedback(*args: Any, **options: Any) -> Tensor:
    """See `fsa_kernels.feedback.apply_feedback`."""
    from fsa_kernels import feedback

    return feedback.apply_feedback(*args, **options)


def gather(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """See `fsa_kernels.columns.gather`."""
    from fsa_kernels import columns

    return columns.gather(*args, **options)


def proxy_prepare(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """See `fsa_kernels.proxy.prepare`."""
    from fsa_kernels import proxy

    return proxy.prepare(*args, **options)


def proxy_apply(*args: Any, **options: Any) -> Tensor:
    """See `fsa_kernels.proxy.apply`."""
    from fsa_kernels import proxy

    return proxy.apply(*args, **options)


def proxy_gather(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """See `fsa_kernels.proxy.gather`."""
    from fsa_kernels import proxy

    return proxy.gather(*args, **options)
