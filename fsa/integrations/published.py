"""FSA for code that people already run: published towers, unedited.

`plug_in` gives feedback to a vision tower whose last block was customised in the manner of the
published ProxyCLIP, ClearCLIP and SCLIP code, which all call a method `custom_attn(attn_layer, x,
...)` of the tower. `published_feedback` takes the place of the method `FSA` of the published FSA
tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa import ops
from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError
from fsa.hosts.base import adapted_heads
from fsa.hosts.block import LastAttention
from fsa.hosts.proxy import affinity_attention
from fsa.hosts.self_attention import attention_of_pairs, identity_attention
from fsa.models.tower import with_branch

_METHOD = "custom_attn"
_PARTS = (_METHOD, "transformer.resblocks", "ln_post", "proj")
_PARTS_OF_LAST_BLOCK = ("attn.in_proj_weight", "attn.out_proj", "ln_1", "ln_2", "mlp")
# Calls that ask for the attention matrix itself go to the original.
_DIAGNOSTICS = ("return_attn", "with_attn")
_IGNORE_RESIDUAL = "ignore_residual"

# What ClearCLIP's `model_type` asks for; with no pairs it is the identity.
_MODEL_TYPES = {
    "vanilla": ("qk",),
    "SCLIP": ("qq", "kk"),
    "ClearCLIP": ("qq",),
    "MaskCLIP": (),
    "SegEarth": ("qq", "kk", "vv"),
}

# How far a tower's own result may lie from ours, relative to its length, when it is looked at once.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TRIAL_GRID = (2, 3)
_TRIAL_CHANNELS = 32


def plug_in(
    visual: nn.Module,
    text_features: Tensor,
    config: FSAConfig | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Gives feedback to a tower with a customised last block; its code stays as it is.

    The tower's `custom_attn` is overlaid on this one object, by one that computes the same
    attention, feeds the class predictions back, and returns what the tower goes on with: in the
    shape of the original, (L,B,D). The class token's row, where there is one, stays what the tower
    makes of it. Calls for another block than the last, or for the attention itself
    (`return_attn`, `with_attn`), go to the original. Plugging in again replaces the text features
    and the configuration.

    The styles are told apart by the arguments of `custom_attn`:

    - ProxyCLIP: `ex_feats, beta, gamma, token_size`. The mean of the affinity is taken per image,
      where the published code takes it over the batch: the same for one image at a time.
    - ClearCLIP and SegEarth-OV: `model_type`, any of "vanilla", "MaskCLIP", "SCLIP", "ClearCLIP"
      and "SegEarth". Whether the residual connection is kept is read from the tower's argument
      `ignore_residual`.
    - SCLIP: `csa`.

    Args:
        visual: the vision tower, `model.visual`.
        text_features: (C,E), one row per query; normalised here.
        config: how feedback is computed; default `FSAConfig()`. See `FSAConfig.preset` for the
            published values of each backbone and proxy model.
        backend: of the ops: "auto", "triton" or "torch".

    Raises:
        InputError: a tower without `custom_attn` or with other arguments, one whose `custom_attn`
            computes another attention than its style says (it is tried once, on small random
            tokens), text features of another width, a wrong configuration or backend.
    """
    config = FSAConfig() if config is None else config
    if not isinstance(config, FSAConfig):
        raise InputError(f"config must be an FSAConfig or None, not {type(config).__name__}")
    if backend not in ops.BACKENDS:
        raise InputError(f"backend={backend!r} is not known: it must be one of {ops.BACKENDS}")
    if not isinstance(visual, nn.Module):
        raise InputError(f"visual must be a torch module, not {type(visual).__name__}")
    missing = _missing(visual, _PARTS) or [
        f"{part} in its last block"
        for part in _missing(visual.transformer.resblocks[-1], _PARTS_OF_LAST_BLOCK)
    ]
    if missing:
        raise InputError(
            f"visual, a {type(visual).__name__}, has no {', '.join(missing)}. plug_in is for "
            "towers in the manner of ProxyCLIP, ClearCLIP and SCLIP; for a plain open_clip "
            "tower take fsa.hosts.build(host, visual)"
        )
    width = visual.proj.shape[1]
    if (
        not isinstance(text_features, Tensor)
        or text_features.ndim != 2
        or text_features.shape[1] != width
        or len(text_features) == 0
    ):
        came = (
            f"have shape {tuple(text_features.shape)}"
            if isinstance(text_features, Tensor)
            else f"are a {type(text_features).__name__}"
        )
        raise InputError(f"text_features must be (C, {width}) for this tower; they {came}")
    if _plug_of(visual) is not None:
        unplug(visual)
    plug = _Plug(visual, text_features, config, backend)
    plug.check_agreement()
    plug.insert()


def unplug(visual: nn.Module) -> None:
    """Makes a tower what it was before `plug_in`.

    Raises:
        InputError: a tower that is not plugged in.
    """
    plug = _plug_of(visual)
    if plug is None:
        raise InputError(f"visual, a {type(visual).__name__}, is not plugged in")
    plug.remove()


@torch.no_grad()
def published_feedback(
    patch_probs: Tensor,
    uni_probs: Tensor,
    attn_layer: nn.Module,
    v: Tensor,
    attn_weights_orig: Tensor,
    lamda: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """Takes the place of the method `FSA` of the published FSA tower.

    `visual.FSA = fsa.published_feedback` for one tower, or on its class
    `VisionTransformer.FSA = staticmethod(fsa.published_feedback)`.

    The published constants (confidence 0.45, all three adaptations); the names are the published
    ones. No N x N x C tensor is built and no two N x N matrices are multiplied.

    Args:
        patch_probs: (B,N,C), the host's logits, 20 x cosine.
        uni_probs: (B,N,C) or (B,1,C), the logits under uniform attention, 35 x cosine.
        attn_layer: the last block's `nn.MultiheadAttention`; its `num_heads` and `out_proj` count.
        v: (B*H,N,d), head by head of the first image, then of the next.
        attn_weights_orig: (B*H,N,N), the host's attention.
        lamda: the paper's beta.
        backend: "auto", "triton" or "torch".

    Returns:
        (N,B,D), after `out_proj`.

    Raises:
        InputError: shapes that do not fit together, and as `fsa.feedback_attention`, which calls
            the first two arguments patch_logits and uniform_logits.
    """
    config = FSAConfig(beta=lamda)
    feedback = ops.feedback_attention(patch_probs, uni_probs, config=config, backend=backend)
    B, N, _ = patch_probs.shape
    heads = attn_layer.num_heads
    for name, tensor, layout in (
        ("v", v, (B * heads, N, attn_layer.embed_dim // heads)),
        ("attn_weights_orig", attn_weights_orig, (B * heads, N, N)),
    ):
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != layout:
            came = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(
                f"{name} must have shape {layout}, with patch_probs of shape "
                f"{tuple(patch_probs.shape)} and {heads} heads; it has {came}"
            )
    adapted = ops.adapt(
        v.unflatten(0, (B, heads)),
        feedback.to(v.dtype),
        attn_weights_orig.unflatten(0, (B, heads)),
        config=config,
        backend=backend,
    )
    return attn_layer.out_proj(_sequence(adapted))


# --------------------------------------------------------------------------------------------------
# The published styles


@dataclass(frozen=True)
class _Call:
    """One call of `custom_attn`, as the styles read it.

    Attributes:
        attention: on patches.
        class_heads: (B,H,1,d), what the class token gathers; None where the result has no row for
            it.
    """

    attention: LastAttention
    class_heads: Tensor | None


@dataclass(frozen=True)
class _Style:
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
    read: Callable[[nn.Module, Tensor, dict[str, Any], str, FSAConfig | None], _Call]
    trial: Callable[[Tensor], dict[str, Any]]


def _read_proxyclip(
    attn_layer: nn.Module,
    x: Tensor,
    arguments: dict[str, Any],
    backend: str,
    config: FSAConfig | None,
) -> _Call:
    attention = affinity_attention(
        arguments["ex_feats"],
        _project(attn_layer, x[1:])["v"],
        tuple(arguments["token_size"]),
        arguments["beta"],
        arguments["gamma"],
        backend,
        config,
    )
    return _Call(attention, None)


def _read_clearclip(
    attn_layer: nn.Module,
    x: Tensor,
    arguments: dict[str, Any],
    backend: str,
    config: FSAConfig | None,
) -> _Call:
    model_type = arguments["model_type"]
    if model_type not in _MODEL_TYPES:
        raise InputError(
            f"model_type={model_type!r} of the plugged-in tower is not known: it must be one of "
            f"{', '.join(_MODEL_TYPES)}"
        )
    return _self_attention(attn_layer, x, _MODEL_TYPES[model_type], backend, config)


def _read_sclip(
    attn_layer: nn.Module,
    x: Tensor,
    arguments: dict[str, Any],
    backend: str,
    config: FSAConfig | None,
) -> _Call:
    pairs = _MODEL_TYPES["SCLIP" if arguments["csa"] else "vanilla"]
    return _self_attention(attn_layer, x, pairs, backend, config)


def _self_attention(
    attn_layer: nn.Module,
    x: Tensor,
    pairs: tuple[str, ...],
    backend: str,
    config: FSAConfig | None,
) -> _Call:
    projected = _project(attn_layer, x)
    value = projected["v"]
    if not pairs:
        attention = identity_attention(value[:, :, 1:], feedback=config is not None)
        return _Call(attention, value[:, :, :1])
    class_heads = sum(
        functional.scaled_dot_product_attention(projected[a][:, :, :1], projected[b], value)
        for a, b in pairs
    )
    return _Call(attention_of_pairs(projected, pairs, backend, config), class_heads)


def _project(attn_layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values (B,H,L,d) of tokens (L,B,D)."""
    packed = functional.linear(x, attn_layer.in_proj_weight, attn_layer.in_proj_bias)
    heads = packed.unflatten(-1, (3, attn_layer.num_heads, -1)).permute(2, 1, 3, 0, 4)
    return dict(zip("qkv", heads, strict=True))


def _sequence(heads: Tensor) -> Tensor:
    """Heads (B,H,L,d) side by side, as the published towers lay tokens out: (L,B,D)."""
    return heads.permute(2, 0, 1, 3).flatten(2)


_STYLES = (
    _Style(
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
    _Style(
        name="ClearCLIP",
        arguments=frozenset({"model_type"}),
        residual=None,
        read=_read_clearclip,
        trial=lambda features: {"model_type": "ClearCLIP"},
    ),
    _Style(
        name="SCLIP",
        arguments=frozenset({"csa"}),
        residual=True,
        read=_read_sclip,
        trial=lambda features: {"csa": True},
    ),
)


def _style_of(visual: nn.Module) -> _Style:
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


# --------------------------------------------------------------------------------------------------
# The plug


class _Plug:
    """Stands in for a tower's `custom_attn`."""

    def __init__(
        self, visual: nn.Module, text_features: Tensor, config: FSAConfig, backend: str
    ) -> None:
        self.visual = visual
        self.style = _style_of(visual)
        self.config = config
        self.backend = backend
        self.text_features = functional.normalize(text_features.detach(), dim=-1)
        self.original = visual.custom_attn
        self.signature = inspect.signature(self.original)
        # Where the method lies on the object itself and not on its class, to be put back there.
        self.overlaid = vars(visual).get(_METHOD)
        self.forward_signature = inspect.signature(visual.forward)
        self.residual = self.style.residual
        self.tokens: Tensor | None = None
        self.hooks: tuple[Any, ...] = ()

    @property
    def last(self) -> nn.Module:
        return self.visual.transformer.resblocks[-1]

    def insert(self) -> None:
        self.visual.custom_attn = self
        # `custom_attn` is given the tokens only after the normalisation, and is not told whether
        # the residual connection is kept.
        self.hooks = (
            self.last.ln_1.register_forward_pre_hook(self._remember_tokens),
            self.visual.register_forward_pre_hook(self._remember_residual, with_kwargs=True),
        )

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        del self.visual.custom_attn
        if self.overlaid is not None:
            self.visual.custom_attn = self.overlaid

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        attn_layer, x, *_ = bound.args
        if attn_layer is not self.last.attn or any(map(bound.arguments.get, _DIAGNOSTICS)):
            return self.original(*args, **kwargs)
        tokens, self.tokens = self.tokens, None
        if self.residual and (tokens is None or tokens.shape != x.shape):
            raise InputError(
                "the plugged-in tower keeps the residual connection, for which the tokens must go "
                "through ln_1 of its last block right before custom_attn; they did not"
            )
        call = self.style.read(attn_layer, x, bound.arguments, self.backend, self.config)
        self.text_features = self.text_features.to(x.device)

        def tail(heads: Tensor) -> Tensor:
            branch = attn_layer.out_proj(heads.transpose(1, 2).flatten(2))
            if self.residual:
                branch = with_branch(tokens[1:].transpose(0, 1), branch)
                branch = branch + self.last.mlp(self.last.ln_2(branch))
            return self.visual.ln_post(branch) @ self.visual.proj

        heads = adapted_heads(
            call.attention,
            tail,
            self.text_features,
            self.config,
            self.backend,
        )
        return _output(attn_layer, heads, call.class_heads)

    @torch.no_grad()
    def check_agreement(self) -> None:
        """Whether the tower computes what its style says, on a few random tokens.

        Raises:
            InputError: it does not, or does not take its style's arguments.
        """
        attn_layer = self.last.attn
        weight = attn_layer.in_proj_weight
        rows, columns = _TRIAL_GRID
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1 + rows * columns, 1, weight.shape[1], generator=generator).to(weight)
        features = torch.randn(1, _TRIAL_CHANNELS, rows, columns, generator=generator).to(weight)
        arguments = self.style.trial(features)
        method = f"custom_attn of {type(self.visual).__name__}, which reads as {self.style.name}'s,"
        try:
            bound = self.signature.bind(attn_layer, x, **arguments)
        except TypeError as error:
            raise InputError(f"{method} takes other arguments: {error}") from None
        bound.apply_defaults()
        theirs = self.original(*bound.args, **bound.kwargs)
        call = self.style.read(attn_layer, x, bound.arguments, self.backend, None)
        ours = _output(attn_layer, call.attention.attended, call.class_heads)
        if theirs.shape != ours.shape:
            raise InputError(
                f"{method} returns shape {tuple(theirs.shape)} for tokens of shape "
                f"{tuple(x.shape)}; expected is {tuple(ours.shape)}"
            )
        difference = float((theirs - ours).double().norm() / ours.double().norm())
        if not difference <= _AGREEMENT[weight.dtype]:
            raise InputError(
                f"{method} computes another attention: on random tokens its result differs by "
                f"{difference:.1e} of its length. For an attention of your own pass a function as "
                "the host, see fsa.hosts.build"
            )

    def _remember_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = args[0]

    def _remember_residual(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.style.residual is None:
            bound = self.forward_signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.residual = not bound.arguments.get(_IGNORE_RESIDUAL, True)


def _missing(module: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """Which of the parts, named with dots, the module does not have."""

    def has(part: str) -> bool:
        found: Any = module
        for name in part.split("."):
            found = getattr(found, name, None)
        return found is not None

    return [part for part in parts if not has(part)]


def _plug_of(visual: nn.Module) -> _Plug | None:
    method = vars(visual).get(_METHOD)
    return method if isinstance(method, _Plug) else None


def _output(attn_layer: nn.Module, heads: Tensor, class_heads: Tensor | None) -> Tensor:
    """(L,B,D) as the tower goes on with it, of what patches and class token gathered."""
    if class_heads is not None:
        heads = torch.cat([class_heads, heads], dim=2)
    return attn_layer.out_proj(_sequence(heads))
