"""The ops, for users and for the hosts: checked, and run by the backend that fits.

`functional` holds what users call, `steps` the attentions that a feedback step applies more than
once. Below them, `dispatch` chooses the backend, `checks` says what is accepted, `library`
registers the ops with `torch.library`, and `torch_backend` computes them without Triton.
"""

from fsa.ops.dispatch import BACKENDS, Explanation, explain
from fsa.ops.functional import adapt, feedback_attention, feedback_step, proxy_attention
from fsa.ops.steps import (
    AttentionStep,
    ProxyAttention,
    ProxyStep,
    heads_apart,
    heads_side_by_side,
)

__all__ = [
    "BACKENDS",
    "AttentionStep",
    "Explanation",
    "ProxyAttention",
    "ProxyStep",
    "adapt",
    "explain",
    "feedback_attention",
    "feedback_step",
    "heads_apart",
    "heads_side_by_side",
    "proxy_attention",
]
