"""The public ops: checks, choice of backend, and registration with `torch.library`.

`feedback_attention` and `adapt` are feedback self-adaptive attention itself; `feedback_step` is
both, and keeps no N x N matrix where N is large. `proxy_attention` is the attention of ProxyCLIP,
which needs the same care. All are forward only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import fsa_kernels
from fsa import torch_backend
from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError, named_out_of_memory
from fsa_kernels import launch

BACKENDS = ("auto", "triton", "torch")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRITON_FLOATS = _FLOATS[:3]
_OLDEST_TENSOR_CORES = (8, 0)

# What A_f may take while it is made, at 4 bytes an entry, before `feedback_step` streams: N = 11585
# for one image, N = 1831 for 40. And what ProxyCLIP's attention may take, as a matrix.
_STORED_BYTES = 1 << 29


# --------------------------------------------------------------------------------------------------
# The public functions


def feedback_attention(
    patch_logits: Tensor,
    uniform_logits: Tensor | None = None,
    *,
    text_features: Tensor | None = None,
    config: FSAConfig | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention between patches by how similar their class predictions are (Eqs. 6 to 10).

    Args:
        patch_logits: (B,N,C), already scaled (20 x cosine in the published code); float16,
            bfloat16, float32 or float64. Any strides.
        uniform_logits: (B,1,C) or (B,N,C), already scaled (35 x cosine): the logits when every
            patch attends to all equally, subtracted for attention isolation (section 4.1). None,
            or `config.isolation=False`, subtracts nothing.
        text_features: (C,E) of unit length. With it, the first two are no logits but features in
            the space shared with text, of any length, with E in the place of C: their cosines
            with the texts are taken in float32 and scaled by the configuration, in the launch
            that goes on with them.
        config: default `FSAConfig()`.
        dtype: of the result; default that of `patch_logits`.
        backend: "auto", "triton" or "torch"; `fsa.explain` says what "auto" takes.

    Returns:
        A_f (B,N,N), computed in float32 (float64 for float64 inputs). Rows sum to 1; equal
        similarities are kept lowest patch index first; every image of the batch stands alone. By
        the kernels its rows are not contiguous: they lie where the similarities lay.

    Raises:
        InputError: wrong ranks, shapes, types, devices, backend; an input that requires grad
            while gradients are enabled; NaN or inf on the CPU. On a GPU, where looking would
            synchronise, a patch with such logits gets a row of NaN and no other row keeps it.
        OutOfMemoryError: the result or the work on it does not fit.
    """
    config = _checked_config(config)
    _check_logits(patch_logits, uniform_logits, text_features)
    dtype = patch_logits.dtype if dtype is None else dtype
    chosen = _choose(patch_logits.device, patch_logits.dtype, backend)
    _check_result_type(dtype, chosen.backend)
    return torch.ops.fsa.feedback_attention(
        patch_logits,
        uniform_logits if config.isolation else None,
        text_features,
        *_op_options(config),
        dtype,
        chosen.backend,
    )


def adapt(
    value: Tensor,
    feedback: Tensor,
    attention: Tensor | Callable[[Tensor], Tensor] | None,
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
            (B,H,N,d) -> (B,H,N,d) that applies it, which spares building the matrix. None is the
            identity, with which the three terms are one.
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
    B, _, N, _ = value.shape
    _check_shape("feedback", feedback, (B, N, N), "value", value)
    _check_same("feedback", feedback, "value", value)
    _check_attention(value, attention, attended)
    _choose(value.device, value.dtype, backend)
    if attention is not None and not callable(attention):
        return torch.ops.fsa.adapt(
            value, feedback, attention, attended, ",".join(config.adaptations)
        )
    return _adapt_by(
        partial(torch_backend.rows_times, feedback),
        value,
        attention,
        attended,
        config,
        {"feedback": feedback},
    )


def feedback_step(
    value: Tensor,
    patch_logits: Tensor,
    uniform_logits: Tensor | None,
    attention: Tensor | Callable[[Tensor], Tensor] | None,
    *,
    text_features: Tensor | None = None,
    attended: Tensor | None = None,
    step: AttentionStep | None = None,
    config: FSAConfig | None = None,
    backend: str = "auto",
    stream: bool | None = None,
) -> Tensor:
    """The whole step from first logits to adapted values: `feedback_attention`, then `adapt`.

    Where A_f would be large, above 512 MiB while it is made, it is never kept: blocks of its rows
    are multiplied as they are made.

    Args:
        value: V (B,H,N,d).
        patch_logits, uniform_logits, text_features: as `feedback_attention` takes them; their type
            may be another than that of `value`.
        attention, attended: as `adapt` takes them.
        step: what has gathered all that is needed of `attention` and `attended`, which are not
            looked at then.
        config: default `FSAConfig()`.
        backend: "auto", "triton" or "torch".
        stream: True never keeps A_f, False always does; None goes by its size.

    Returns:
        (B,H,N,d) in the type of `value`.

    Raises:
        InputError: as `feedback_attention`.
    """
    config = _checked_config(config)
    _check_tensor("value", value, "(B, H, N, d)")
    _check_logits(patch_logits, uniform_logits, text_features)
    B, _, N, _ = value.shape
    if patch_logits.shape[:2] != (B, N) or patch_logits.device != value.device:
        raise InputError(
            f"patch_logits has shape {tuple(patch_logits.shape)} on {patch_logits.device} and "
            f"value {tuple(value.shape)} on {value.device}: images, patches and device must agree"
        )
    if stream is None:
        stream = 4 * B * N * N > _STORED_BYTES
    if not stream:
        feedback = feedback_attention(
            patch_logits,
            uniform_logits,
            text_features=text_features,
            config=config,
            dtype=value.dtype,
            backend=backend,
        )
        if step is None:
            return adapt(
                value, feedback, attention, attended=attended, config=config, backend=backend
            )
        apply_feedback = partial(torch_backend.rows_times, feedback)
    else:
        chosen = _choose(patch_logits.device, patch_logits.dtype, backend)
        _check_result_type(value.dtype, chosen.backend)
        uniform_logits = uniform_logits if config.isolation else None
        predictions = (patch_logits, uniform_logits, text_features)

        def apply_feedback(columns: Tensor) -> Tensor:
            return torch.ops.fsa.apply_feedback(
                *predictions, columns, *_op_options(config), chosen.backend
            )

    if step is not None:
        return step.adapted(apply_feedback)
    _check_attention(value, attention, attended)
    inputs = {}
    if attention is not None and not callable(attention):
        inputs["attention"] = attention
        attention = torch_backend.attention_applier(attention)
    return _adapt_by(apply_feedback, value, attention, attended, config, inputs)


def _adapt_by(
    apply_feedback: Callable[[Tensor], Tensor],
    value: Tensor,
    attention: Callable[[Tensor], Tensor] | None,
    attended: Tensor | None,
    config: FSAConfig,
    inputs: dict[str, Tensor],
) -> Tensor:
    """`adapt` with both attentions given as what applies them; None is the identity.

    `inputs` are looked at for what is not finite, besides the values.
    """
    if attention is None:
        adapted = torch_backend.adapt(value, apply_feedback, _identity, None, ("only",))
    else:
        adapted = torch_backend.adapt(
            value,
            apply_feedback,
            lambda x: attention(x.to(value.dtype)),
            attended,
            config.adaptations,
        )
    if not torch.compiler.is_compiling():
        _check_finite_product(adapted, inputs | {"value": value, "attended": attended})
    return adapted


def _identity(values: Tensor) -> Tensor:
    return values


def proxy_attention(
    features: Tensor,
    value: Tensor,
    *,
    shift: float = PROXY_SHIFT,
    gain: float = PROXY_GAIN,
    backend: str = "auto",
) -> Tensor:
    """ProxyCLIP's attention, by the affinity of another model's features, applied to values.

    `ProxyAttention(features, ...)(value)`.

    Args:
        features: (B,N,F), of any length; normalised here.
        value: (B,N,D), all heads side by side.
        shift, gain, backend: as `ProxyAttention` takes them.

    Returns:
        (B,N,D) in the type of `value`.

    Raises:
        InputError: as `feedback_attention`. On a GPU, NaN and inf make their own image NaN.
        OutOfMemoryError: the result or the work on it does not fit.
    """
    return ProxyAttention(features, shift=shift, gain=gain, backend=backend)(value)


class ProxyAttention:
    """ProxyCLIP's attention, prepared for more than one application.

    s = cosine of the features; s <- (s - shift * mean(s)) * gain; negative s are masked; softmax
    over the rest. The mean is taken per image. A patch with nothing left attends to itself.
    (Lan et al., "ProxyCLIP", ECCV 2024, section 3.3.)

    On a GPU the matrix is made once and kept, one entry in the type of the features for each pair
    of patches, up to 512 MiB; beyond, and on the CPU, blocks of its rows are made for every
    application.

    Args:
        features: (B,N,F), of any length; normalised here.
        shift, gain: ProxyCLIP's constants (its beta and gamma).
        backend: "auto", "triton" or "torch".

    Raises:
        InputError: as `feedback_attention`.
        OutOfMemoryError: the work on it does not fit.
    """

    def __init__(
        self,
        features: Tensor,
        *,
        shift: float = PROXY_SHIFT,
        gain: float = PROXY_GAIN,
        backend: str = "auto",
    ) -> None:
        _check_tensor("features", features, "(B, N, F)")
        # Written with comparisons, which torch.compile traces; NaN fails them.
        if not (abs(shift) < math.inf and 0 < gain < math.inf):
            raise InputError(
                f"shift={shift!r} and gain={gain!r} are not accepted: they must be finite, gain > 0"
            )
        self.backend = _choose(features.device, features.dtype, backend).backend
        self.gain = gain
        self._features = features
        B, N, _ = features.shape
        stored = self.backend == "triton" and features.dtype.itemsize * B * N * N <= _STORED_BYTES
        self._state = torch.ops.fsa.proxy_prepare(features, shift, gain, stored, self.backend)

    def __call__(self, value: Tensor, *, add: Tensor | None = None) -> Tensor:
        """The attention applied to values (B,N,D), plus a tensor of their shape.

        Returns:
            (B,N,D) in the type of `value`.
        """
        self._check_value(value)
        return torch.ops.fsa.proxy_apply(*self._state, value, add, self.gain, self.backend)

    def gather(self, value: Tensor, config: FSAConfig) -> tuple[Tensor, Tensor]:
        """The attention applied to values V (B,N,D), and what a feedback step goes on with.

        Returns:
            A V, and after its last row the mean of V, (B,N+1,D); and columns (B,N,D) or (B,N,2D):
            the sum of A V with the adaptation "after" and V with "only", and beside it V with
            "before"; divided by the number of adaptations.
        """
        self._check_value(value)
        return torch.ops.fsa.proxy_gather(
            *self._state, value, self.gain, *_terms(config), self.backend
        )

    def _check_value(self, value: Tensor) -> None:
        features = self._features
        _check_tensor("value", value, "(B, N, D)")
        if features.shape[:2] != value.shape[:2]:
            raise InputError(
                f"features has shape {tuple(features.shape)} and value {tuple(value.shape)}: "
                "the first two sizes, images and patches, must agree"
            )
        _check_same("features", features, "value", value)


class AttentionStep:
    """A host's attention in a feedback step: applied to the values before, and once more to A_f V.

    What a step takes besides, the mean of the values and the columns that A_f is multiplied with,
    is laid out in one launch.

    Attributes:
        gathered: (B,H,N+1,d): A V, and after the last row V under uniform attention.

    Args:
        apply: from values (B,H,N,d) of the patches, and the scale of those of all else that the
            host attends to, to (B,H,N,d): applies the host's attention A.
        value: V (B,H,L,d) of everything the host attends to, the patches' last.
        attended: A V (B,H,N,d) of the patches.
        config: only `adaptations` matters here.
        backend: "auto", "triton" or "torch".
    """

    def __init__(
        self,
        apply: Callable[[Tensor, float], Tensor],
        value: Tensor,
        attended: Tensor,
        config: FSAConfig,
        backend: str = "auto",
    ) -> None:
        backend = _choose(value.device, value.dtype, backend).backend
        gathered, columns = torch.ops.fsa.gather(value, attended, *_terms(config), backend)
        self._apply = apply
        self._hold(gathered, columns, value.shape[1], config)

    def __call__(self, value: Tensor) -> Tensor:
        """The attention applied to other values (B,H,N,d)."""
        return self._apply(value, 1.0)

    def adapted(self, apply_feedback: Callable[[Tensor], Tensor]) -> Tensor:
        """The adapted values (B,H,N,d), given what multiplies columns (B,N,K) with A_f."""
        dtype = self._columns.dtype
        product = apply_feedback(self._columns)
        if "before" not in self._adaptations:
            return heads_apart(product.to(dtype), self._heads)
        width = self.gathered.shape[1] * self.gathered.shape[-1]
        others = product[..., :width] if len(self._adaptations) > 1 else None
        return self._apply_and_add(product[..., -width:].to(dtype), others).to(dtype)

    def _hold(self, gathered: Tensor, columns: Tensor, heads: int, config: FSAConfig) -> None:
        self.gathered = heads_apart(gathered, heads)
        self._columns = columns
        self._heads = heads
        self._adaptations = config.adaptations

    def _apply_and_add(self, value: Tensor, others: Tensor | None) -> Tensor:
        # The terms come scaled, so that their sum is their mean.
        total = self._apply(heads_apart(value, self._heads), 1 / len(self._adaptations))
        return total if others is None else total + heads_apart(others, self._heads)


class ProxyStep(AttentionStep):
    """The same of ProxyCLIP's, whose applications lay out the columns and add the terms themselves.

    Args:
        attention: of the images.
        value: V (B,H,N,d).
        config: only `adaptations` matters here.
    """

    def __init__(self, attention: ProxyAttention, value: Tensor, config: FSAConfig) -> None:
        self._attention = attention
        self._hold(*attention.gather(heads_side_by_side(value), config), value.shape[1], config)

    def __call__(self, value: Tensor) -> Tensor:
        """The attention applied to other values (B,H,N,d)."""
        return heads_apart(self._attention(heads_side_by_side(value)), self._heads)

    def _apply_and_add(self, value: Tensor, others: Tensor | None) -> Tensor:
        return heads_apart(self._attention(value, add=others), self._heads)


def _terms(config: FSAConfig) -> tuple[Any, ...]:
    """Which of "after", "before" and "only" are averaged, and the scale of each."""
    wanted = (name in config.adaptations for name in ("after", "before", "only"))
    return *wanted, 1 / len(config.adaptations)


def heads_side_by_side(value: Tensor) -> Tensor:
    """Values of heads (B,H,N,d) as (B,N,D)."""
    return value.transpose(1, 2).flatten(2)


def heads_apart(value: Tensor, heads: int) -> Tensor:
    """Values (B,N,D) as those of heads (B,H,N,d)."""
    return value.unflatten(-1, (heads, -1)).transpose(1, 2)


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
    accepted = ranks or (layout.partition(")")[0].count(",") + 1,)
    if tensor.ndim not in accepted:
        raise InputError(f"{name} must be {layout}; it has shape {tuple(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
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


def _check_logits(
    patch_logits: Tensor, uniform_logits: Tensor | None, text_features: Tensor | None
) -> None:
    _check_tensor("patch_logits", patch_logits, "(B, N, C)")
    B, N, C = patch_logits.shape
    if text_features is not None:
        _check_tensor("text_features", text_features, "(C, E)")
        if text_features.shape[1] != C or text_features.device != patch_logits.device:
            raise InputError(
                f"text_features has shape {tuple(text_features.shape)} on {text_features.device} "
                f"and patch_logits, which are features then, {tuple(patch_logits.shape)} on "
                f"{patch_logits.device}: width and device must agree"
            )
    if uniform_logits is None:
        return
    _check_tensor("uniform_logits", uniform_logits, "(B, 1, C) or (B, N, C)")
    if uniform_logits.shape not in ((B, 1, C), (B, N, C)):
        raise InputError(
            f"uniform_logits has shape {tuple(uniform_logits.shape)}; with patch_logits of "
            f"shape {(B, N, C)} it must be {(B, 1, C)} or {(B, N, C)}"
        )
    _check_same("uniform_logits", uniform_logits, "patch_logits", patch_logits)


def _check_attention(
    value: Tensor,
    attention: Tensor | Callable[[Tensor], Tensor] | None,
    attended: Tensor | None,
) -> None:
    """The host's attention, and what it gathered, against the values (B,H,N,d)."""
    B, H, N, _ = value.shape
    if attended is not None:
        _check_tensor("attended", attended, "(B, H, N, d)")
        _check_shape("attended", attended, tuple(value.shape), "value", value)
        _check_same("attended", attended, "value", value)
    if attention is None or callable(attention):
        return
    if not isinstance(attention, Tensor):
        raise InputError(
            f"attention must be a tensor, a callable or None, not {type(attention).__name__}"
        )
    _check_tensor("attention", attention, "(B, N, N) or (B, H, N, N)", ranks=(3, 4))
    shape = (B, N, N) if attention.ndim == 3 else (B, H, N, N)
    _check_shape("attention", attention, shape, "value", value)
    _check_same("attention", attention, "value", value)


def _check_result_type(dtype: torch.dtype, backend: str) -> None:
    accepted = _TRITON_FLOATS if backend == "triton" else _FLOATS
    if dtype not in accepted:
        raise InputError(
            f"dtype={dtype} is not accepted for the result of backend {backend!r}: it must be one "
            f"of {', '.join(map(str, accepted))}"
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
# Registration with torch.library and torch.export

# torch.export takes a configuration among a host's inputs as a constant: it has no leaves. There is
# no public way yet to register a constant that can be saved with the program.
_pytree.register_pytree_node(
    FSAConfig,
    lambda config: ([], config),
    lambda _, config: config,
    serialized_type_name="fsa.FSAConfig",
    flatten_with_keys_fn=lambda config: ([], config),
    to_dumpable_context=FSAConfig.to_dict,
    from_dumpable_context=lambda fields: FSAConfig(**fields),
)


# torch.export loads a saved program's configuration again.
torch.serialization.add_safe_globals([FSAConfig])


_OPTIONS = (
    "float beta, float confidence, float logit_scale, float uniform_logit_scale, "
    "str similarity, str? pruning, float ratio, float threshold, bool scaling, str precision"
)
_OPTION_NAMES = tuple(option.split()[1] for option in _OPTIONS.split(", "))


def _op_options(config: FSAConfig) -> tuple[Any, ...]:
    """The fields of a configuration that the ops take, in the order of `_OPTIONS`."""
    # All of the distribution is kept for p = 1: a cumulative sum must not round past it.
    if config.confidence == 1 and config.pruning == "confidence":
        config = config.replace(pruning=None)
    return tuple([getattr(config, name) for name in _OPTION_NAMES])


def _checked_options(
    predictions: tuple[Tensor, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    backend: str,
) -> dict[str, Any]:
    """The options by name, for a backend; predictions are looked at where that costs nothing."""
    names = ("patch_logits", "uniform_logits", "text_features")
    for name, tensor in zip(names, predictions, strict=True):
        if tensor is not None:
            _check_finite(name, tensor)
    named = dict(zip(_OPTION_NAMES, options, strict=True))
    if backend == "torch":
        del named["precision"]
    return named


_PREDICTIONS = "Tensor patch_logits, Tensor? uniform_logits, Tensor? text_features"


@torch.library.custom_op(
    "fsa::feedback_attention",
    mutates_args=(),
    schema=f"({_PREDICTIONS}, {_OPTIONS}, ScalarType dtype, str backend) -> Tensor",
)
def _feedback_attention(patch_logits, uniform_logits, text_features, *arguments):
    *options, dtype, backend = arguments
    predictions = (patch_logits, uniform_logits, text_features)
    options = _checked_options(predictions, options, backend)
    module = fsa_kernels if backend == "triton" else torch_backend
    with _out_of_memory("feedback attention", patch_logits):
        return module.feedback_attention(*predictions, dtype=dtype, **options)


@_feedback_attention.register_fake
def _(patch_logits, uniform_logits, text_features, *arguments):
    *_, dtype, backend = arguments
    B, N, _ = patch_logits.shape
    if backend == "triton":
        strides = launch.result_strides(N, dtype)
        return patch_logits.new_empty_strided((B, N, N), strides, dtype=dtype)
    return patch_logits.new_empty((B, N, N), dtype=dtype)


@torch.library.custom_op(
    "fsa::apply_feedback",
    mutates_args=(),
    schema=f"({_PREDICTIONS}, Tensor columns, {_OPTIONS}, str backend) -> Tensor",
)
def _apply_feedback(patch_logits, uniform_logits, text_features, columns, *arguments):
    *options, backend = arguments
    predictions = (patch_logits, uniform_logits, text_features)
    options = _checked_options(predictions, options, backend)
    module = fsa_kernels if backend == "triton" else torch_backend
    with _out_of_memory("applied feedback attention", patch_logits):
        return module.apply_feedback(*predictions, columns, **options)


@_apply_feedback.register_fake
def _(patch_logits, uniform_logits, text_features, columns, *_):
    return torch.empty(columns.shape, dtype=columns.dtype, device=columns.device)


@torch.library.custom_op(
    "fsa::adapt",
    mutates_args=(),
    schema="(Tensor value, Tensor feedback, Tensor attention, Tensor? attended, str adaptations) "
    "-> Tensor",
)
def _adapt(value, feedback, attention, attended, adaptations):
    apply_attention = torch_backend.attention_applier(attention)
    apply_feedback = partial(torch_backend.rows_times, feedback)
    with _out_of_memory("adapted values", value):
        adapted = torch_backend.adapt(
            value, apply_feedback, apply_attention, attended, tuple(adaptations.split(","))
        ).contiguous()
    inputs = {"value": value, "feedback": feedback, "attention": attention, "attended": attended}
    _check_finite_product(adapted, inputs)
    return adapted


@_adapt.register_fake
def _(value, *_):
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


@torch.library.custom_op(
    "fsa::gather",
    mutates_args=(),
    schema="(Tensor value, Tensor attended, bool after, bool before, bool only, float scale, "
    "str backend) -> (Tensor, Tensor)",
)
def _gather(value, attended, after, before, only, scale, backend):
    module = fsa_kernels if backend == "triton" else torch_backend
    with _out_of_memory("attended values", value):
        return module.gather(value, attended, after=after, before=before, only=only, scale=scale)


@_gather.register_fake
def _(value, attended, after, before, only, *_):
    B, H, N, d = attended.shape
    shapes = launch.gather_shapes(B, N, H * d, after=after, before=before, only=only)
    return tuple(value.new_empty(shape) for shape in shapes)


@torch.library.custom_op(
    "fsa::proxy_prepare",
    mutates_args=(),
    schema="(Tensor features, float shift, float gain, bool stored, str backend) "
    "-> (Tensor, Tensor)",
)
def _proxy_prepare(features, shift, gain, stored, backend):
    _check_finite("features", features)
    with _out_of_memory("the affinity of features", features):
        if backend == "triton":
            return fsa_kernels.proxy_prepare(features, shift=shift, gain=gain, stored=stored)
        return torch_backend.proxy_prepare(features, shift=shift)


@_proxy_prepare.register_fake
def _(features, shift, gain, stored, backend):
    B, N, F = features.shape
    if backend == "torch":
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        return features.new_empty((B, N, F), dtype=dtype), features.new_empty((B,), dtype=dtype)
    shapes = launch.proxy_state(B, N, F, features.dtype, stored)
    return tuple(features.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


@torch.library.custom_op(
    "fsa::proxy_apply",
    mutates_args=(),
    schema="(Tensor first, Tensor second, Tensor value, Tensor? add, float gain, str backend) "
    "-> Tensor",
)
def _proxy_apply(first, second, value, add, gain, backend):
    module = fsa_kernels if backend == "triton" else torch_backend
    with _out_of_memory("attended values", value):
        attended = module.proxy_apply((first, second), value, gain=gain, add=add)
    _check_finite_product(attended, {"value": value})
    return attended


@_proxy_apply.register_fake
def _(first, second, value, *_):
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


@torch.library.custom_op(
    "fsa::proxy_gather",
    mutates_args=(),
    schema="(Tensor first, Tensor second, Tensor value, float gain, bool after, bool before, "
    "bool only, float scale, str backend) -> (Tensor, Tensor)",
)
def _proxy_gather(first, second, value, gain, after, before, only, scale, backend):
    module = fsa_kernels if backend == "triton" else torch_backend
    with _out_of_memory("attended values", value):
        gathered, columns = module.proxy_gather(
            (first, second),
            value,
            gain=gain,
            after=after,
            before=before,
            only=only,
            scale=scale,
        )
    _check_finite_product(gathered, {"value": value})
    return gathered, columns


@_proxy_gather.register_fake
def _(first, second, value, gain, after, before, only, *_):
    shapes = launch.gather_shapes(*value.shape, after=after, before=before, only=only)
    return tuple(value.new_empty(shape) for shape in shapes)
