"""How published code bases customise the last block of their towers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError
from fsa.hosts.block import LastAttention
from fsa.hosts.proxy import affinity_attention
from fsa.hosts.self_attention import attention_of_pairs, identity_attention

# What ClearCLIP's `model_type` asks for; with no pairs it is the identity.
_MODEL_TYPES = {
    "vanilla": ("qk",),
    "SCLIP": ("qq", "kk"),
    "ClearCLIP": ("qq",),
    "MaskCLIP": (),
    "SegEarth": ("qq", "kk", "vv"),
}


@dataclass(frozen=True)
class Call:
    """One call of `custom_attn`, as the styles read it.

    Attributes:
        attention: on patches.
        class_heads: (B,H,1,d), what the class token gathers; None where the result has no row for
            it.
    """

    attention: LastAttention
    class_heads: Tensor | None


@dataclass(frozen=True)
class Style:
    """How one published code base customises the last block.

    Attributes:
        name: of the method.
        arguments: of `custom_attn`, by which the style is known.
        residual: whether the residual connection and the feed-forward network are kept; None
            where the tower's forward has an argument for it.
        read: (attn_layer, x (L,B,D), the arguments by name, backend, the configuration of the
            feedback that will follow or None) -> what is computed.
        trial: (features (1,F,gh,gw)) -> the arguments with which the tower is tried.
    """

    name: str
    arguments: frozenset[str]
    residual: bool | None
    read: Callable[[nn.Module, Tensor, dict[str, Any], str, FSAConfig | None], Call]
    trial: Callable[[Tensor], dict[str, Any]]

    def __reduce__(self) -> tuple[Callable[[str], Style], tuple[str]]:
        """Pickled by its name."""
        return _style_named, (self.name,)


def _read_proxyclip(
    attn_layer: Any,
    x: Tensor,
    arguments: dict[str, Any],
    backend: str,
    config: FSAConfig | None,
) -> Call:
    attention = affinity_attention(
        arguments["ex_feats"],
        _project(attn_layer, x[1:])["v"],
        tuple(arguments["token_size"]),
        arguments["beta"],
        arguments["gamma"],
        backend,
        config,
    )
    return Call(attention, None)


def _read_clearclip(
    attn_layer: Any,
    x: Tensor,
    arguments: dict[str, Any],
    backend: str,
    config: FSAConfig | None,
) -> Call:
    model_type = arguments["model_type"]
    if model_type not in _MODEL_TYPES:
        raise InputError(
            f"model_type={model_type!r} of the plugged-in tower is not known: it must be one of "
            f"{', '.join(_MODEL_TYPES)}"
        )
    return _self_attention(attn_layer, x, _MODEL_TYPES[model_type], backend, config)


def _read_sclip(
    attn_layer: Any,
    x: Tensor,
    arguments: dict[str, Any],
    backend: str,
    config: FSAConfig | None,
) -> Call:
    pairs = _MODEL_TYPES["SCLIP" if arguments["csa"] else "vanilla"]
    return _self_attention(attn_layer, x, pairs, backend, config)


def _self_attention(
    attn_layer: Any,
    x: Tensor,
    pairs: tuple[str, ...],
    backend: str,
    config: FSAConfig | None,
) -> Call:
    projected = _project(attn_layer, x)
    value = projected["v"]
    if not pairs:
        attention = identity_attention(value[:, :, 1:], feedback=config is not None)
        return Call(attention, value[:, :, :1])
    class_heads = reduce(
        torch.add,
        (
            functional.scaled_dot_product_attention(
                projected[pair[0]][:, :, :1], projected[pair[1]], value
            )
            for pair in pairs
        ),
    )
    return Call(attention_of_pairs(projected, pairs, backend, config), class_heads)


def _project(attn_layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values (B,H,L,d) of tokens (L,B,D)."""
    packed = functional.linear(x, attn_layer.in_proj_weight, attn_layer.in_proj_bias)
    heads = packed.unflatten(-1, (3, attn_layer.num_heads, -1)).permute(2, 1, 3, 0, 4)
    return dict(zip("qkv", heads, strict=True))


def sequence(heads: Tensor) -> Tensor:
    """Heads (B,H,L,d) side by side, as the published towers lay tokens out: (L,B,D)."""
    return heads.permute(2, 0, 1, 3).flatten(2)


_STYLES = (
    Style(
        name="ProxyCLIP",
        arguments=frozenset({"ex_feats", "beta", "gamma", "token_size"}),
        residual=False,
        read=_read_proxyclip,
        trial=lambda features: {
            "ex_feats": features,
            "beta": PROXY_SHIFT,
            "gamma": PROXY_GAIN,
            "token_size": tuple(features.shape[-2:]),
        },
    ),
    Style(
        name="ClearCLIP",
        arguments=frozenset({"model_type"}),
        residual=None,
        read=_read_clearclip,
        trial=lambda features: {"model_type": "ClearCLIP"},
    ),
    Style(
        name="SCLIP",
        arguments=frozenset({"csa"}),
        residual=True,
        read=_read_sclip,
        trial=lambda features: {"csa": True},
    ),
)


def _style_named(name: str) -> Style:
    return next(style for style in _STYLES if style.name == name)


def style_of(visual: Any) -> Style:
    if hasattr(visual, "FSA"):
        raise InputError(
            f"visual, a {type(visual).__name__}, computes FSA by a method of its own; to have this "
            "library compute it, set visual.FSA = fsa.published_feedback"
        )
    parameters = inspect.signature(visual.custom_attn).parameters
    for style in _STYLES:
        if style.arguments <= set(parameters):
            return style
    known = "; ".join(f"{style.name}: {', '.join(sorted(style.arguments))}" for style in _STYLES)
    raise InputError(
        f"custom_attn of visual takes ({', '.join(parameters)}), which is no style known here. "
        f"Known are {known}"
    )
