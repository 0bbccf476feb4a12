"""Feedback self-adaptive attention (FSA) for training-free open-vocabulary segmentation with CLIP.

The op:        `feedback_attention`, `adapt`, `feedback_step`, `proxy_attention`,
               `ProxyAttention`, `explain`, `FSAConfig`
The hosts:     `fsa.hosts.build(name, visual)`
The segmentor: `load_segmentor(...)`, `Segmentor.segment(image, classes)`
Your own code: `plug_in(visual, text_features)`, `unplug(visual)`, `published_feedback`

Chi et al., "Plug-in Feedback Self-adaptive Attention in CLIP for Training-free Open-Vocabulary
Segmentation", ICCV 2025.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fsa.lazy import submodules

if TYPE_CHECKING:
    from fsa import hosts
    from fsa.config import FSAConfig
    from fsa.errors import FSAError, InputError, ModelUnavailableError, OutOfMemoryError
    from fsa.integrations.published import plug_in, published_feedback, unplug
    from fsa.ops import (
        ProxyAttention,
        adapt,
        explain,
        feedback_attention,
        feedback_step,
        proxy_attention,
    )
    from fsa.segment.segmentor import Segmentation, Segmentor, load_segmentor

__version__ = "0.1.0"

__all__ = [
    "FSAConfig",
    "FSAError",
    "InputError",
    "ModelUnavailableError",
    "OutOfMemoryError",
    "ProxyAttention",
    "Segmentation",
    "Segmentor",
    "adapt",
    "explain",
    "feedback_attention",
    "feedback_step",
    "hosts",
    "load_segmentor",
    "plug_in",
    "proxy_attention",
    "published_feedback",
    "unplug",
]

_submodule = submodules(__name__)

# Resolved at first use, so that `fsa --help` and `import fsa` do not wait for torch.
_HOMES = {
    "FSAConfig": "fsa.config",
    "FSAError": "fsa.errors",
    "InputError": "fsa.errors",
    "ModelUnavailableError": "fsa.errors",
    "OutOfMemoryError": "fsa.errors",
    "ProxyAttention": "fsa.ops",
    "adapt": "fsa.ops",
    "explain": "fsa.ops",
    "feedback_attention": "fsa.ops",
    "feedback_step": "fsa.ops",
    "plug_in": "fsa.integrations.published",
    "proxy_attention": "fsa.ops",
    "published_feedback": "fsa.integrations.published",
    "unplug": "fsa.integrations.published",
    "Segmentation": "fsa.segment.result",
    "Segmentor": "fsa.segment.segmentor",
    "load_segmentor": "fsa.segment.segmentor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    return _submodule(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
