"""The hosts: training-free CLIP segmentors that feedback plugs into.

`build(name, visual)` turns the vision tower of any plain open_clip ViT into one of them, or into
one whose attention is a function of yours.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args, get_type_hints

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
    "parsed_options",
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
            `steps` and `key_weight` for PEARL. `host_class(host).default_options()` has their
            published values.

    Raises:
        InputError: an unknown name or option, a value that an option does not take, or another
            kind of tower.
    """
    cls = host_class(host)
    for name in host_options:
        if name != "backend":
            _check_option(host, name)
    arguments = (visual, host) if cls is FunctionHost else (visual,)
    return cls(*arguments, **host_options)


def parsed_options(host: str | AttentionFunction, texts: Iterable[str]) -> dict[str, Any]:
    """Options of a host for `build`, of the form NAME=VALUE as a user writes them.

    Args:
        host: as `build` takes it.
        texts: such as "key_weight=0.3", "residual=true" or "steps=none".

    Raises:
        InputError: another form, a name twice, an option that the host does not have, or a value of
            another kind. What a value must be besides is checked by `build`.
    """
    kinds = get_type_hints(host_class(host).__init__)
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise InputError(f"host option {text!r} must be NAME=VALUE, such as residual=false")
        _check_option(host, name)
        if name in options:
            raise InputError(f"host option {name!r} was given more than once")
        options[name] = _parsed(name, value, kinds[name])
    return options


def _check_option(host: str | AttentionFunction, name: str) -> None:
    """Raises InputError for what is no option of the host, with those that are."""
    defaults = host_class(host).default_options()
    if name not in defaults:
        taken = ", ".join(f"{option}={value}" for option, value in defaults.items())
        raise InputError(
            f"host {host!r} has no option {name!r}; those it has, with their defaults: {taken}"
        )


def _parsed(name: str, value: str, kind: Any) -> Any:
    """The value of an option, by the annotation of its parameter."""
    kinds = get_args(kind) or (kind,)
    lower = value.lower()
    # Of `residual`, None is no value of its own but stands for what was published.
    if lower == "none" and NoneType in kinds and bool not in kinds:
        return None
    if bool in kinds:
        if lower in ("true", "false"):
            return lower == "true"
        accepted = "true or false"
    else:
        number, accepted = (int, "an integer") if int in kinds else (float, "a number")
        try:
            return number(value)
        except ValueError:
            accepted += " or none" if NoneType in kinds else ""
    raise InputError(f"host option {name}={value!r} is not accepted: it must be {accepted}")
