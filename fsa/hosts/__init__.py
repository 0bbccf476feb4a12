"""The hosts: training-free CLIP segmentors that feedback plugs into.

`build(name, visual)` turns the vision tower of any plain open_clip ViT into one of them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fsa.errors import InputError
from fsa.hosts.base import Host, LastAttention
from fsa.hosts.proxy import ProxyCLIP
from fsa.hosts.self_attention import (
    CLIP,
    SCLIP,
    ClearCLIP,
    KeyKey,
    MaskCLIP,
    QueryKey,
    QueryQuery,
    SelfAttentionHost,
    ValueValue,
)

__all__ = ["Host", "LastAttention", "SelfAttentionHost", "build", "host_class", "names"]

_HOSTS: dict[str, type[Host]] = {
    "clip": CLIP,
    "maskclip": MaskCLIP,
    "sclip": SCLIP,
    "clearclip": ClearCLIP,
    "proxyclip": ProxyCLIP,
    "qk": QueryKey,
    "qq": QueryQuery,
    "kk": KeyKey,
    "vv": ValueValue,
}


def names() -> tuple[str, ...]:
    """The names that `build` takes."""
    return tuple(_HOSTS)


def host_class(name: str) -> type[Host]:
    """The class behind a name.

    Raises:
        InputError: an unknown name.
    """
    if name not in _HOSTS:
        raise InputError(f"host={name!r} is not known: it must be one of {', '.join(_HOSTS)}")
    return _HOSTS[name]


def build(name: str, visual: nn.Module, **host_options: Any) -> Host:
    """A host on an open_clip vision tower.

    Args:
        name: one of `names()`.
        visual: the `visual` part of an open_clip model, a plain `VisionTransformer`.
        **host_options: `backend` for all; `residual` for all but ProxyCLIP; `shift` and `gain`
            for ProxyCLIP.

    Raises:
        InputError: an unknown name or option, or another kind of tower.
    """
    cls = host_class(name)
    try:
        return cls(visual, **host_options)
    except TypeError as error:
        raise InputError(f"host {name!r} does not take these options: {error}") from None
