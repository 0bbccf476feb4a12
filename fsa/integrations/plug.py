"""What takes the place of `custom_attn` on a published tower."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa.config import FSAConfig
from fsa.errors import FSAWarning, InputError
from fsa.hosts.base import adapted_heads
from fsa.integrations.styles import sequence, style_of
from fsa.models.tower import with_branch
from fsa.ops.checks import autocast_off

METHOD = "custom_attn"
# Calls that ask for the attention matrix itself go to the original.
_DIAGNOSTICS = ("return_attn", "with_attn")
_IGNORE_RESIDUAL = "ignore_residual"

# How far a tower's own result may lie from ours, relative to its length, when it is looked at once.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TRIAL_GRID = (2, 3)
_TRIAL_CHANNELS = 32


class Plug:
    """Stands in for a tower's `custom_attn`.

    Pickled and copied with the tower it belongs to, hooks and all.
    """

    def __init__(self, visual: Any, text_features: Tensor, config: FSAConfig, backend: str) -> None:
        self.visual = visual
        self.style = style_of(visual)
        self.config = config
        self.backend = backend
        self.text_features = functional.normalize(text_features.detach(), dim=-1)
        # Where the method lies on the object itself and not on its class, to be put back there.
        self.overlaid = vars(visual).get(METHOD)
        self.residual = self.style.residual
        self.tokens: Tensor | None = None
        self.asked = False
        self.hooks: tuple[Any, ...] = ()

    @property
    def last(self) -> Any:
        return self.visual.transformer.resblocks[-1]

    @property
    def original(self) -> Callable[..., Tensor]:
        """The tower's own method."""
        if self.overlaid is not None:
            return self.overlaid
        return getattr(type(self.visual), METHOD).__get__(self.visual)

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @cached_property
    def forward_signature(self) -> inspect.Signature:
        return inspect.signature(self.visual.forward)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is of one forward pass and what is found again."""
        passing = ("tokens", "signature", "forward_signature")
        return {name: value for name, value in vars(self).items() if name not in passing} | {
            "tokens": None
        }

    def insert(self) -> None:
        self.visual.custom_attn = self
        # `custom_attn` is given the tokens only after the normalisation, and is not told whether
        # the residual connection is kept.
        self.hooks = (
            self.last.ln_1.register_forward_pre_hook(self._remember_tokens),
            self.visual.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.visual.register_forward_hook(self._end),
        )

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        del self.visual.custom_attn
        if self.overlaid is not None:
            self.visual.custom_attn = self.overlaid

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.asked = True
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        attn_layer, x, *_ = bound.args
        if attn_layer is not self.last.attn or any(map(bound.arguments.get, _DIAGNOSTICS)):
            return self.original(*args, **kwargs)
        if torch.is_grad_enabled() and x.requires_grad:
            warnings.warn(
                "the plugged-in tower is asked for gradients, and feedback has no backward pass: "
                "none flow through its last block. Train unplugged, or run under torch.no_grad()",
                FSAWarning,
                stacklevel=2,
            )
        # Under torch.autocast the blocks before hand over another type than that of the weights.
        with torch.no_grad(), autocast_off(x):
            adapted = self._adapted(attn_layer, x.to(attn_layer.in_proj_weight.dtype), bound)
        return adapted.to(x.dtype)

    def _adapted(self, attn_layer: Any, x: Tensor, bound: inspect.BoundArguments) -> Tensor:
        """What the tower goes on with, (L,B,D), for normalised tokens (L,B,D)."""
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
                assert tokens is not None
                branch = with_branch(tokens.to(x.dtype)[1:].transpose(0, 1), branch)
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
        with autocast_off(x):
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

    def _remember_tokens(self, module: Any, args: tuple[Any, ...]) -> None:
        self.tokens = args[0]

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.asked = False
        if self.style.residual is None:
            bound = self.forward_signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.residual = not bound.arguments.get(_IGNORE_RESIDUAL, True)

    def _end(self, module: Any, args: tuple[Any, ...], result: Any) -> None:
        if not self.asked:
            hint = (
                ": a ProxyCLIP tower needs the features of another model, ex_feats"
                if "ex_feats" in self.style.arguments
                else ""
            )
            warnings.warn(
                "the plugged-in tower ran without calling its custom_attn, so there was no "
                f"feedback{hint}",
                FSAWarning,
                stacklevel=2,
            )


def plug_of(visual: nn.Module) -> Plug | None:
    method = vars(visual).get(METHOD)
    return method if isinstance(method, Plug) else None


def _output(attn_layer: Any, heads: Tensor, class_heads: Tensor | None) -> Tensor:
    """(L,B,D) as the tower goes on with it, of what patches and class token gathered."""
    if class_heads is not None:
        heads = torch.cat([class_heads, heads], dim=2)
    return attn_layer.out_proj(sequence(heads))
