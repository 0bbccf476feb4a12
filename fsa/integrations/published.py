"""FSA for code that people already run: published towers, unedited.

`plug_in` gives feedback to a vision tower whose last block was customised in the manner of the
published ProxyCLIP, ClearCLIP and SCLIP code, which all call a method `custom_attn(attn_layer, x,
...)` of the tower. `published_feedback` takes the place of the method `FSA` of the published FSA
tower.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fsa import ops
from fsa.config import FSAConfig
from fsa.errors import FSAWarning, InputError, NotFiniteError
from fsa.integrations.plug import METHOD, Plug, plug_of
from fsa.integrations.styles import sequence

_PARTS = (METHOD, "transformer.resblocks", "ln_post", "proj")
_PARTS_OF_LAST_BLOCK = ("attn.in_proj_weight", "attn.out_proj", "ln_1", "ln_2", "mlp")


def plug_in(
    visual: nn.Module,
    text_features: Tensor,
    config: FSAConfig | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Gives feedback to a tower with a customised last block; its code stays as it is.

    That is the code of the tower. The published repositories pin torch 1.13.1 and timm 0.4.12, and
    this library needs torch 2.6: bring them to a newer PyTorch first.

    The tower's `custom_attn` is overlaid on this one object, by one that computes the same
    attention, feeds the class predictions back, and returns what the tower goes on with: in the
    shape of the original, (L,B,D). The class token's row, where there is one, stays what the tower
    makes of it. Calls for another block than the last, or for the attention itself
    (`return_attn`, `with_attn`), go to the original. Plugging in again replaces the text features
    and the configuration.

    Feedback has no backward pass. Gradients do not flow through the last block of a plugged-in
    tower; a call that asks for them is warned of, and so is a forward pass of the tower that never
    calls its `custom_attn`, such as ProxyCLIP's without the other model's features. Everything
    runs in the type of the tower's weights, under `torch.autocast` too.

    The styles are told apart by the arguments of `custom_attn`:

    - ProxyCLIP: `ex_feats, beta, gamma, token_size`. The mean of the affinity is taken per image,
      where the published code takes it over the batch: the same for one image at a time.
    - ClearCLIP and SegEarth-OV: `model_type`, any of "vanilla", "MaskCLIP", "SCLIP", "ClearCLIP"
      and "SegEarth". Whether the residual connection is kept is read from the tower's argument
      `ignore_residual`.
    - SCLIP: `csa`.

    Args:
        visual: the vision tower, `model.visual`.
        text_features: (C,E) floating point, one row per query; normalised here.
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
    # No type checker knows the parts of a published tower.
    tower: Any = visual
    missing = _missing(tower, _PARTS) or [
        f"{part} in its last block"
        for part in _missing(tower.transformer.resblocks[-1], _PARTS_OF_LAST_BLOCK)
    ]
    if missing:
        raise InputError(
            f"visual, a {type(visual).__name__}, has no {', '.join(missing)}. plug_in is for "
            "towers in the manner of ProxyCLIP, ClearCLIP and SCLIP; for a plain open_clip "
            "tower take fsa.hosts.build(host, visual)"
        )
    width = tower.proj.shape[1]
    if (
        not isinstance(text_features, Tensor)
        or text_features.ndim != 2
        or text_features.shape[1] != width
        or len(text_features) == 0
        or not text_features.is_floating_point()
    ):
        came = (
            f"have shape {tuple(text_features.shape)} and type {text_features.dtype}"
            if isinstance(text_features, Tensor)
            else f"are a {type(text_features).__name__}"
        )
        raise InputError(
            f"text_features must be (C, {width}) for this tower, floating point; they {came}"
        )
    if plug_of(visual) is not None:
        unplug(visual)
    plug = Plug(visual, text_features, config, backend)
    plug.check_agreement()
    plug.insert()


def unplug(visual: nn.Module) -> None:
    """Makes a tower what it was before `plug_in`.

    Raises:
        InputError: a tower that is not plugged in.
    """
    plug = plug_of(visual)
    if plug is None:
        raise InputError(f"visual, a {type(visual).__name__}, is not plugged in")
    plug.remove()


@torch.no_grad()
def published_feedback(
    patch_probs: Tensor,
    uni_probs: Tensor,
    attn_layer: Any,
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

    A patch whose logits are NaN or inf, as the published ProxyCLIP makes them for a patch that is
    similar enough to no other, attends to itself, and no other patch to it. On the CPU a warning
    says so; on a GPU, where looking would wait for the device, none does.

    Returns:
        (N,B,D), after `out_proj`.

    Raises:
        InputError: shapes that do not fit together, and as `fsa.feedback_attention`, which calls
            the first two arguments patch_logits and uniform_logits.
    """
    config = FSAConfig(beta=lamda)
    feedback, lost = _feedback_of_finite(patch_probs, uni_probs, config, backend)
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
    attention = attn_weights_orig.unflatten(0, (B, heads))

    def attend(values: Tensor) -> Tensor:
        assert lost is not None
        return torch.where(lost[:, None, :, None], values, attention @ values)

    adapted = ops.adapt(
        v.unflatten(0, (B, heads)),
        feedback.to(v.dtype),
        attention if lost is None else attend,
        config=config,
        backend=backend,
    )
    return attn_layer.out_proj(sequence(adapted))


def _feedback_of_finite(
    patch_logits: Tensor, uniform_logits: Tensor, config: FSAConfig, backend: str
) -> tuple[Tensor, Tensor | None]:
    """A_f (B,N,N) in which patches without finite logits attend to themselves and nobody to them.

    Returns:
        A_f, and which patches those are, (B,N) bool; None on the CPU where there are none.
    """
    feedback = partial(ops.feedback_attention, config=config, backend=backend)
    try:
        attention = feedback(patch_logits, uniform_logits)
        if attention.device.type == "cpu":
            return attention, None
        # Looking would wait for the device; there such patches have rows of NaN.
        lost = ~attention.diagonal(dim1=1, dim2=2).isfinite()
        itself = torch.eye(lost.shape[1], dtype=attention.dtype, device=attention.device)
        return torch.where(lost[:, :, None], itself, attention), lost
    except NotFiniteError:
        pass
    lost = ~(patch_logits - uniform_logits).isfinite().all(dim=-1)
    warnings.warn(
        f"{int(lost.sum())} of {lost.numel()} patches have logits of NaN or inf, as the published "
        "ProxyCLIP makes them where no other patch is similar enough; they attend to themselves",
        FSAWarning,
        stacklevel=3,
    )
    itself = torch.eye(lost.shape[1], dtype=patch_logits.dtype)
    attention = itself.expand(len(lost), -1, -1).clone()
    for image, kept in enumerate(~lost):
        (index,) = kept.nonzero(as_tuple=True)
        if len(index):
            uniform = uniform_logits[image, None]
            uniform = uniform[:, index] if uniform.shape[1] > 1 else uniform
            part = feedback(patch_logits[image, None, index], uniform)
            attention[image, index[:, None], index] = part[0]
    return attention, lost


def _missing(module: Any, parts: tuple[str, ...]) -> list[str]:
    """Which of the parts, named with dots, the module does not have."""

    def has(part: str) -> bool:
        found: Any = module
        for name in part.split("."):
            found = getattr(found, name, None)
        return found is not None

    return [part for part in parts if not has(part)]
