"""The public ops: checks, choice of backend, and registration with `torch.library`.

`feedback_attention` and `adapt` are feedback self-adaptive attention itself; `proxy_attention` is
the attention of ProxyCLIP, which needs the same care (no N x N matrix). All are forward only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fsa_kernels
from fsa import torch_backend
from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError, named_out_of_memory

BACKENDS = ("auto", "triton", "torch")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRITON_FLOATS = _FLOATS[:3]
_OLDEST_TENSOR_CORES = (8, 0)


# --------------------------------------------------------------------------------------------------
# The public functions


def feedback_attention(
    patch_logits: Tensor,
    uniform_logits: Tensor | None = None,
    *,
    config: FSAConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention between patches by how similar their class predictions are (Eqs. 6 to 10).

    Args:
        patch_logits: (B,N,C), already scaled (20 x cosine in the published code); float16,
            bfloat16, float32 or float64. Any strides.
        uniform_logits: (B,1,C) or (B,N,C), already scaled (35 x cosine): the logits when every
            patch attends to all equally, subtracted for attention isolation (section 4.1). None,
            or `config.isolation=False`, subtracts nothing.
        config: default `FSAConfig()`.
        backend: "auto", "triton" or "torch"; `fsa.explain` says what "auto" takes.

    Returns:
        A_f (B,N,N) in the type of `patch_logits`, computed in float32 (float64 for float64
        inputs). Rows sum to 1; equal similarities are kept lowest patch index first; every image
        of the batch stands alone.

    Raises:
        InputError: wrong ranks, shapes, types, devices, backend; an input that requires grad
            while gradients are enabled; NaN or inf on the CPU. On a GPU, where looking would
            synchronise, a patch with such logits gets a row of NaN and no other row keeps it.
        OutOfMemoryError: the result or the work on it does not fit.
    """
    config = _checked_config(config)
    _check_tensor("patch_logits", patch_logits, "(B, N, C)")
    if uniform_logits is not None:
        _check_tensor("uniform_logits", uniform_logits, "(B, 1, C) or (B, N, C)")
        B, N, C = patch_logits.shape
        if uniform_logits.shape not in ((B, 1, C), (B, N, C)):
            raise InputError(
                f"uniform_logits has shape {tuple(uniform_logits.shape)}; with patch_logits of "
                f"shape {(B, N, C)} it must be {(B, 1, C)} or {(B, N, C)}"
            )
        _check_same("uniform_logits", uniform_logits, "patch_logits", patch_logits)
    chosen = _choose(patch_logits.device, patch_logits.dtype, backend)
    # The whole distribution is kept for p = 1: a cumulative sum must not round past it.
    pruning = None if config.confidence == 1 and config.pruning == "confidence" else config.pruning
    return torch.ops.fsa.feedback_attention(
        patch_logits,
        uniform_logits if config.isolation else None,
        config.beta,
        config.confidence,
        config.similarity,
        pruning,
        config.ratio,
        config.threshold,
        config.scaling,
        config.precision,
        chosen.backend,
    )


def adapt(
    value: Tensor,
    feedback: Tensor,
    attention: Tensor | Callable[[Tensor], Tensor],
    *,
    attended: Tensor | None = None,
    config: FSAConfig | None = None,
    backend: str = "auto",
) -> Tensor:
    """The values under the adapted attention: mean of A_f A V, A A_f V and A_f V (Eqs. 11 to 14).

    Args:
        value: V (B,H,N,d).
        feedback: A_f (B,N,N), the same for all heads.
        attention: the host's attention A: (B,N,N) shared by the heads, (B,H,N,N), or a callable
            (B,H,N,d) -> (B,H,N,d) that applies it, which spares building the matrix.
        attended: A V (B,H,N,d) where the caller has it; spares one application of A.
        config: only `adaptations` matters here; default `FSAConfig()`.
        backend: "auto", "triton" or "torch". These products are the vendor's matrix library in
            every backend.

    Returns:
        (B,H,N,d) in the type of `value`. No product of two N x N matrices is computed and A_f is
        not repeated per head.

    Raises:
        InputError: as `feedback_attention`. On a GPU, NaN and inf spread as in any product.
        OutOfMemoryError: the result or the work on it does not fit.
    """
    config = _checked_config(config)
    _check_tensor("value", value, "(B, H, N, d)")
    _check_tensor("feedback", feedback, "(B, N, N)")
    B, H, N, _ = value.shape
    _check_shape("feedback", feedback, (B, N, N), "value", value)
    _check_same("feedback", feedback, "value", value)
    if attended is not None:
        _check_tensor("attended", attended, "(B, H, N, d)")
        _check_shape("attended", attended, tuple(value.shape), "value", value)
        _check_same("attended", attended, "value", value)
    _choose(value.device, value.dtype, backend)
    if not isinstance(attention, Tensor):
        if not callable(attention):
            raise InputError(
                f"attention must be a tensor or a callable, not {type(attention).__name__}"
            )
        adapted = torch_backend.adapt(
            value,
            feedback,
            lambda x: attention(x.to(value.dtype)),
            attended,
            config.adaptations,
        )
        if not torch.compiler.is_compiling():
            inputs = {"value": value, "feedback": feedback, "attended": attended}
            _check_finite_product(adapted, inputs)
        return adapted
    _check_tensor("attention", attention, "(B, N, N) or (B, H, N, N)", ranks=(3, 4))
    shape = (B, N, N) if attention.ndim == 3 else (B, H, N, N)
    _check_shape("attention", attention, shape, "value", value)
    _check_same("attention", attention, "value", value)
    return torch.ops.fsa.adapt(value, feedback, attention, attended, ",".join(config.adaptations))


def proxy_attention(
    features: Tensor,
    value: Tensor,
    *,
    shift: float = PROXY_SHIFT,
    gain: float = PROXY_GAIN,
    backend: str = "auto",
) -> Tensor:
    """ProxyCLIP's attention, by the affinity of another model's features, applied to values.

    s = cosine of the features; s <- (s - shift * mean(s)) * gain; negative s are masked; softmax
    over the rest. The mean is taken per image. A patch with nothing left attends to itself.
    (Lan et al., "ProxyCLIP", ECCV 2024, section 3.3.)

    Args:
        features: (B,N,F), of any length; normalised here.
        value: (B,N,D), all heads side by side.
        shift, gain: ProxyCLIP's constants (its beta and gamma).
        backend: "auto", "triton" or "torch".

    Returns:
        (B,N,D) in the type of `value`. No N x N matrix is kept.

    Raises:
        InputError: as `feedback_attention`. On a GPU, NaN and inf make their own image NaN.
        OutOfMemoryError: the result or the work on it does not fit.
    """
    _check_tensor("features", features, "(B, N, F)")
    _check_tensor("value", value, "(B, N, D)")
    if features.shape[:2] != value.shape[:2]:
        raise InputError(
            f"features has shape {tuple(features.shape)} and value {tuple(value.shape)}: "
            "the first two sizes, images and patches, must agree"
        )
    _check_same("features", features, "value", value)
    if not (math.isfinite(shift) and math.isfinite(gain) and gain > 0):
        raise InputError(
            f"shift={shift!r} and gain={gain!r} are not accepted: they must be finite, gain > 0"
        )
    chosen = _choose(value.device, value.dtype, backend)
    return torch.ops.fsa.proxy_attention(features, value, shift, gain, chosen.backend)


# --------------------------------------------------------------------------------------------------
# Choice of backend


@dataclass(frozen=True)
class Explanation:
    """Which backend runs, and why; prints as one sentence."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def explain(
    tensor: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend would run, and why, for a tensor or for a device and a type.

    Args:
        tensor: any input of the ops; gives device and type.
        device: where there is no tensor; default: the GPU if there is one, else the CPU.
        dtype: where there is no tensor; default float32.
        backend: as the ops take it.

    Raises:
        InputError: a backend that cannot run there; the message says why.
    """
    if tensor is not None:
        device, dtype = tensor.device, tensor.dtype
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _choose(torch.device(device), dtype or torch.float32, backend)


def _choose(device: torch.device, dtype: torch.dtype, backend: str) -> Explanation:
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r} is not known: it must be one of {BACKENDS}")
    obstacle = _obstacle_to_triton(device, dtype)
    if backend == "triton" and obstacle is not None:
        raise InputError(f"backend='triton' cannot run here: {obstacle}")
    if backend == "torch":
        return Explanation("torch", "asked for by name")
    if backend == "triton":
        return Explanation("triton", "asked for by name")
    if device.type == "cpu":
        # Also where Triton's interpreter is on: it exists to test, and is slow.
        return Explanation("torch", "the tensors are on the CPU")
    if obstacle is not None:
        return Explanation("torch", obstacle)
    return Explanation("triton", f"fused kernels on {device} for {dtype}")


def _obstacle_to_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run, in words, or None where they can."""
    if not fsa_kernels.available():
        return "triton is not installed"
    if dtype not in _TRITON_FLOATS:
        return f"the kernels take float16, bfloat16 and float32, not {dtype}"
    if device.type == "cpu":
        if fsa_kernels.interpreting():
            return None
        return (
            "the tensors are on the CPU; move them to a CUDA device, or set TRITON_INTERPRET=1 "
            "before the first import to run the kernels in Triton's interpreter"
        )
    if device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are written for and tested on NVIDIA GPUs, and this is a ROCm build"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_TENSOR_CORES:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; "
            "the kernels need 8.0 or newer"
        )
    return None


# --------------------------------------------------------------------------------------------------
# Checks


def _checked_config(config: FSAConfig | None) -> FSAConfig:
    if config is None:
        return FSAConfig()
    if not isinstance(config, FSAConfig):
        raise InputError(f"config must be an FSAConfig or None, not {type(config).__name__}")
    return config


def _check_tensor(
    name: str, tensor: Any, layout: str, ranks: tuple[int, ...] | None = None
) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a tensor {layout}, not {type(tensor).__name__}")
    accepted = ranks or (layout.split(")")[0].count(",") + 1,)
    if tensor.ndim not in accepted:
        raise InputError(f"{name} must be {layout}; it has shape {tuple(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise InputError(
            f"{name} has dtype {tensor.dtype}; accepted are float16, bfloat16, float32 and float64"
        )
    if any(size == 0 for size in tensor.shape):
        raise InputError(f"{name} is empty: it has shape {tuple(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} requires grad, and feedback attention has no backward pass: "
            "call it under torch.no_grad() or detach the tensor"
        )


def _check_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor
) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}; with {other_name} of shape "
            f"{tuple(other.shape)} it must be {shape}"
        )


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for what in ("device", "dtype"):
        if getattr(tensor, what) != getattr(other, what):
            raise InputError(
                f"{name} has {what} {getattr(tensor, what)} and {other_name} has "
                f"{getattr(other, what)}: they must be the same"
            )


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and not bool(tensor.isfinite().all()):
        raise InputError(f"{name} holds NaN or inf")


def _check_finite_product(result: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """The same for products, whose inputs are large: NaN and inf show in the small result."""
    if result.device.type == "cpu" and not bool(result.isfinite().all()):
        for name, tensor in inputs.items():
            if tensor is not None:
                _check_finite(name, tensor)


def _out_of_memory(what: str, of: Tensor) -> AbstractContextManager[None]:
    sizes = f"{what} for an input of shape {tuple(of.shape)} on {of.device}"
    return named_out_of_memory(sizes, "take fewer images at once, or fewer patches")


# --------------------------------------------------------------------------------------------------
# Registration with torch.library


@torch.library.custom_op(
    "fsa::feedback_attention",
    mutates_args=(),
    schema="(Tensor patch_logits, Tensor? uniform_logits, float beta, float confidence, "
    "str similarity, str? pruning, float ratio, float threshold, bool scaling, str precision, "
    "str backend) -> Tensor",
)
def _feedback_attention(
    patch_logits,
    uniform_logits,
    beta,
    confidence,
    similarity,
    pruning,
    ratio,
    threshold,
    scaling,
    precision,
    backend,
):
    _check_finite("patch_logits", patch_logits)
    if uniform_logits is not None:
        _check_finite("uniform_logits", uniform_logits)
    options = {
        "beta": beta,
        "confidence": confidence,
        "similarity": similarity,
        "pruning": pruning,
        "ratio": ratio,
        "threshold": threshold,
        "scaling": scaling,
    }
    with _out_of_memory("feedback attention", patch_logits):
        if backend == "triton":
            return fsa_kernels.feedback_attention(
                patch_logits, uniform_logits, precision=precision, **options
            )
        return torch_backend.feedback_attention(patch_logits, uniform_logits, **options)


@_feedback_attention.register_fake
def _(patch_logits, *_):
    B, N, _ = patch_logits.shape
    return patch_logits.new_empty((B, N, N))


@torch.library.custom_op(
    "fsa::adapt",
    mutates_args=(),
    schema="(Tensor value, Tensor feedback, Tensor attention, Tensor? attended, str adaptations) "
    "-> Tensor",
)
def _adapt(value, feedback, attention, attended, adaptations):
    apply_attention = torch_backend.attention_applier(attention)
    with _out_of_memory("adapted values", value):
        adapted = torch_backend.adapt(
            value, feedback, apply_attention, attended, tuple(adaptations.split(","))
        ).contiguous()
    inputs = {"value": value, "feedback": feedback, "attention": attention, "attended": attended}
    _check_finite_product(adapted, inputs)
    return adapted


@_adapt.register_fake
def _(value, *_):
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


@torch.library.custom_op(
    "fsa::proxy_attention",
    mutates_args=(),
    schema="(Tensor features, Tensor value, float shift, float gain, str backend) -> Tensor",
)
def _proxy_attention(features, value, shift, gain, backend):
    op = fsa_kernels.proxy_attention if backend == "triton" else torch_backend.proxy_attention
    _check_finite("features", features)
    with _out_of_memory("attended values", value):
        attended = op(features, value, shift=shift, gain=gain)
    _check_finite_product(attended, {"value": value})
    return attended


@_proxy_attention.register_fake
def _(features, value, *_):
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)
