"""The hosts: training-free CLIP segmentors that feedback plugs into.

`build(name, visual)` turns the vision tower of any plain open_clip ViT into one of them, or into
one whose attention is a function of yours.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fsa.errors import InputError
from fsa.hosts.base import Host
from fsa.hosts.block import LastAttention, LastBlock
from fsa.hosts.function import AttentionFunction, FunctionHost
from fsa.hosts.naclip import NACLIP
from fsa.hosts.pearl import PEARL
from fsa.hosts.proxy import ProxyCLIP
from fsa.hosts.segearth import SegEarth
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

__all__ = [
    "AttentionFunction",
    "FunctionHost",
    "Host",
    "LastAttention",
    "LastBlock",
    "SelfAttentionHost",
    "build",
    "host_class",
    "names",
]

_HOSTS: dict[str, type[Host]] = {
    "clip": CLIP,
    "maskclip": MaskCLIP,
    "sclip": SCLIP,
    "clearclip": ClearCLIP,
    "proxyclip": ProxyCLIP,
    "naclip": NACLIP,
    "segearth": SegEarth,
    "pearl": PEARL,
    "qk": QueryKey,
    "qq": QueryQuery,
    "kk": KeyKey,
    "vv": ValueValue,
}


def names() -> tuple[str, ...]:
    """The names that `build` takes."""
    return tuple(_HOSTS)


def host_class(host: str | AttentionFunction) -> type[Host]:
    """The class behind a name, or behind a function of the user's.

    Raises:
        InputError: an unknown name.
    """
    if callable(host):
        return FunctionHost
    if not isinstance(host, str) or host not in _HOSTS:
        raise InputError(
            f"host={host!r} is not known: it must be one of {', '.join(_HOSTS)}, or a function "
            "that returns the attention between patches"
        )
    return _HOSTS[host]


def build(host: str | AttentionFunction, visual: nn.Module, **host_options: Any) -> Host:
    """A host on a vision tower.

    Args:
        host: one of `names()`, or a function from a `LastBlock` to the attention between its
            patches, (B,N,N) or (B,H,N,N): with it a method that is not a host here gets feedback.
            See `FunctionHost`.
        visual: the `visual` part of an open_clip model, a plain `VisionTransformer`; or a `Tower`,
            such as `fsa.models.transformers.CLIPTower(model)`.
        **host_options: `backend` for all; `residual` for all but ProxyCLIP; `shift` and `gain`
            for ProxyCLIP; `match_mass` for SCLIP; `std` for NACLIP; `class_weight` for SegEarth;
            `steps` and `key_weight` for PEARL.

    Raises:
        InputError: an unknown name or option, or another kind of tower.
    """
    cls = host_class(host)
    arguments = (visual, host) if cls is FunctionHost else (visual,)
    try:
        return cls(*arguments, **host_options)
    except TypeError as error:
        raise InputError(f"host {host!r} does not take these options: {error}") from None
