"""What the ops accept. Inputs are checked once, where they come in."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fsa.config import FSAConfig
from fsa.errors import InputError, NotFiniteError, named_out_of_memory

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = DTYPES[:3]
_DEFAULT_CONFIG = FSAConfig()
_NOTHING = nullcontext()


def checked_config(config: FSAConfig | None) -> FSAConfig:
    if config is None:
        return _DEFAULT_CONFIG
    if not isinstance(config, FSAConfig):
        raise InputError(f"config must be an FSAConfig or None, not {type(config).__name__}")
    return config


def check_tensor(name: str, tensor: Any, layout: str, ranks: tuple[int, ...] | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a tensor {layout}, not {type(tensor).__name__}")
    if tensor.ndim not in (ranks or (layout.count(",") + 1,)):
        raise InputError(f"{name} must be {layout}; it has shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{name} has dtype {tensor.dtype}; accepted are float16, bfloat16, float32 and float64"
        )
    if tensor.numel() == 0:
        raise InputError(f"{name} is empty: it has shape {tuple(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} requires grad, and feedback attention has no backward pass: "
            "call it under torch.no_grad() or detach the tensor"
        )


def check_logits(
    patch_logits: Tensor, uniform_logits: Tensor | None, text_features: Tensor | None
) -> None:
    check_tensor("patch_logits", patch_logits, "(B, N, C)")
    B, N, C = patch_logits.shape
    if text_features is not None:
        check_tensor("text_features", text_features, "(C, E)")
        if text_features.shape[1] != C or text_features.device != patch_logits.device:
            raise InputError(
                f"text_features has shape {tuple(text_features.shape)} on {text_features.device} "
                f"and patch_logits, which are features then, {tuple(patch_logits.shape)} on "
                f"{patch_logits.device}: width and device must agree"
            )
    if uniform_logits is None:
        return
    check_tensor("uniform_logits", uniform_logits, "(B, 1, C) or (B, N, C)", ranks=(3,))
    if uniform_logits.shape not in ((B, 1, C), (B, N, C)):
        raise InputError(
            f"uniform_logits has shape {tuple(uniform_logits.shape)}; with patch_logits of "
            f"shape {(B, N, C)} it must be {(B, 1, C)} or {(B, N, C)}"
        )
    check_same("uniform_logits", uniform_logits, "patch_logits", patch_logits)


def check_attention(
    value: Tensor,
    attention: Tensor | Callable[[Tensor], Tensor] | None,
    attended: Tensor | None,
) -> None:
    """The host's attention, and what it gathered, against the values (B,H,N,d)."""
    B, H, N, _ = value.shape
    if attended is not None:
        check_tensor("attended", attended, "(B, H, N, d)")
        check_shape("attended", attended, tuple(value.shape), "value", value)
        check_same("attended", attended, "value", value)
    if attention is None or callable(attention):
        return
    if not isinstance(attention, Tensor):
        raise InputError(
            f"attention must be a tensor, a callable or None, not {type(attention).__name__}"
        )
    check_tensor("attention", attention, "(B, N, N) or (B, H, N, N)", ranks=(3, 4))
    shape = (B, N, N) if attention.ndim == 3 else (B, H, N, N)
    check_shape("attention", attention, shape, "value", value)
    check_same("attention", attention, "value", value)


def check_result_type(dtype: torch.dtype, backend: str) -> None:
    accepted = KERNEL_DTYPES if backend == "triton" else DTYPES
    if dtype not in accepted:
        raise InputError(
            f"dtype={dtype} is not accepted for the result of backend {backend!r}: it must be one "
            f"of {', '.join(map(str, accepted))}"
        )


def check_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor
) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}; with {other_name} of shape "
            f"{tuple(other.shape)} it must be {shape}"
        )


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for what in ("device", "dtype"):
        if getattr(tensor, what) != getattr(other, what):
            raise InputError(
                f"{name} has {what} {getattr(tensor, what)} and {other_name} has "
                f"{getattr(other, what)}: they must be the same"
            )


def check_finite(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and not _is_finite(tensor):
        raise NotFiniteError(f"{name} holds NaN or inf")


def check_finite_product(result: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """The same for products, whose inputs are large: NaN and inf show in the small result."""
    if result.device.type == "cpu" and not _is_finite(result):
        for name, tensor in inputs.items():
            if tensor is not None:
                check_finite(name, tensor)


def _is_finite(tensor: Tensor) -> bool:
    # One pass that stores nothing, where `isfinite` makes four tensors. A single NaN makes both the
    # minimum and the maximum NaN.
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def out_of_memory(what: str, of: Tensor) -> AbstractContextManager[None]:
    return named_out_of_memory(
        lambda: f"{what} for an input of shape {tuple(of.shape)} on {of.device}",
        "take fewer images at once, or fewer patches",
    )


def autocast_off(tensor: Tensor) -> AbstractContextManager[None]:
    """Where `torch.autocast` is on, turns it off: the ops state their own precision."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING
