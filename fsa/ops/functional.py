"""The public ops: what a user calls.

`feedback_attention` and `adapt` are feedback self-adaptive attention itself; `feedback_step` is
both, and keeps no N x N matrix where N is large. `proxy_attention` is the attention of ProxyCLIP,
which needs the same care. All are forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError
from fsa.ops import library, torch_backend
from fsa.ops.checks import (
    check_attention,
    check_finite_product,
    check_logits,
    check_result_type,
    check_same,
    check_shape,
    check_tensor,
    checked_config,
)
from fsa.ops.dispatch import choose
from fsa.ops.steps import AttentionStep, ProxyAttention
from fsa_kernels import Adaptations

# What A_f may take while it is made, at 4 bytes an entry, before `feedback_step` streams: N = 11585
# for one image, N = 1831 for 40.
_STORED_BYTES = 1 << 29


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
        text_features: (C,E) of unit length. If given, `patch_logits` and `uniform_logits` hold
            features in the space shared with text, of any length, with E instead of C as their last
            size. Their cosines with the texts are computed in float32, and scaled by `logit_scale`
            and `uniform_logit_scale` of the configuration.
        config: default `FSAConfig()`.
        dtype: of the result; default that of `patch_logits`.
        backend: "auto", "triton" or "torch"; `fsa.explain` says what "auto" takes.

    Returns:
        A_f (B,N,N), computed in float32 (float64 for float64 inputs). Rows sum to 1. Similarities
        that are computed equal are kept lowest patch index first. Every image of a batch has the
        result that it has by itself. From the Triton kernels, the rows of a half-precision result
        are not contiguous: each lies in the memory of its similarities.

    Raises:
        InputError: wrong ranks, shapes, types, devices, backend; an input that requires grad
            while gradients are enabled; NaN or inf on the CPU. On a GPU, where looking would
            synchronise, a patch with such logits gets a row of NaN and no other row keeps it.
        OutOfMemoryError: the result or the work on it does not fit.
    """
    config = checked_config(config)
    check_logits(patch_logits, uniform_logits, text_features)
    predictions = (patch_logits, uniform_logits, text_features)
    dtype = patch_logits.dtype if dtype is None else dtype
    return _feedback(predictions, config, dtype, backend)


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
    config = checked_config(config)
    check_tensor("value", value, "(B, H, N, d)")
    check_tensor("feedback", feedback, "(B, N, N)")
    B, _, N, _ = value.shape
    check_shape("feedback", feedback, (B, N, N), "value", value)
    check_same("feedback", feedback, "value", value)
    check_attention(value, attention, attended)
    choose(value.device, value.dtype, backend)
    return _adapt(value, feedback, attention, attended, config)


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
        step: an `AttentionStep`, which stands for `attention` and `attended`; these two are then
            ignored.
        config: default `FSAConfig()`.
        backend: "auto", "triton" or "torch".
        stream: True computes A_f in blocks that are not kept, False keeps all of A_f; None chooses
            by size.

    Returns:
        (B,H,N,d) in the type of `value`.

    Raises:
        InputError: as `feedback_attention`.
    """
    config = checked_config(config)
    check_tensor("value", value, "(B, H, N, d)")
    check_logits(patch_logits, uniform_logits, text_features)
    B, _, N, _ = value.shape
    if patch_logits.shape[:2] != (B, N) or patch_logits.device != value.device:
        raise InputError(
            f"patch_logits has shape {tuple(patch_logits.shape)} on {patch_logits.device} and "
            f"value {tuple(value.shape)} on {value.device}: images, patches and device must agree"
        )
    if stream is None:
        stream = 4 * B * N * N > _STORED_BYTES
    predictions = (patch_logits, uniform_logits, text_features)
    if step is None:
        check_attention(value, attention, attended)
    if stream:
        apply_feedback = _streamed(predictions, config, value.dtype, backend)
    else:
        feedback = _feedback(predictions, config, value.dtype, backend)
        if step is None:
            return _adapt(value, feedback, attention, attended, config)
        apply_feedback = partial(torch_backend.rows_times, feedback)
    if step is not None:
        return step.adapted(apply_feedback)
    inputs: dict[str, Tensor | None] = {}
    if attention is not None and not callable(attention):
        inputs["attention"] = attention
        attention = torch_backend.attention_applier(attention)
    return _adapt_by(apply_feedback, value, attention, attended, config, inputs)


_Predictions = tuple[Tensor, Tensor | None, Tensor | None]


def _feedback(
    predictions: _Predictions, config: FSAConfig, dtype: torch.dtype, backend: str
) -> Tensor:
    """A_f (B,N,N) of checked predictions."""
    logits, uniform, texts = predictions
    chosen = choose(logits.device, logits.dtype, backend).backend
    check_result_type(dtype, chosen)
    uniform = uniform if config.isolation else None
    return library.feedback_attention(
        logits, uniform, texts, library.op_options(config), dtype, chosen
    )


def _streamed(
    predictions: _Predictions, config: FSAConfig, dtype: torch.dtype, backend: str
) -> Callable[[Tensor], Tensor]:
    """What multiplies columns (B,N,K) in `dtype` with A_f of checked predictions, by its rows."""
    logits, uniform, texts = predictions
    chosen = choose(logits.device, logits.dtype, backend).backend
    check_result_type(dtype, chosen)
    uniform = uniform if config.isolation else None
    options = library.op_options(config)
    return lambda columns: library.apply_feedback(logits, uniform, texts, columns, options, chosen)


def _adapt(
    value: Tensor,
    feedback: Tensor,
    attention: Tensor | Callable[[Tensor], Tensor] | None,
    attended: Tensor | None,
    config: FSAConfig,
) -> Tensor:
    """`adapt` of checked inputs."""
    if attention is not None and not callable(attention):
        return library.adapt(value, feedback, attention, attended, library.op_adaptations(config))
    apply_feedback = partial(torch_backend.rows_times, feedback)
    inputs: dict[str, Tensor | None] = {"feedback": feedback}
    return _adapt_by(apply_feedback, value, attention, attended, config, inputs)


def _adapt_by(
    apply_feedback: Callable[[Tensor], Tensor],
    value: Tensor,
    attention: Callable[[Tensor], Tensor] | None,
    attended: Tensor | None,
    config: FSAConfig,
    inputs: dict[str, Tensor | None],
) -> Tensor:
    """`adapt` with both attentions given as what applies them; None is the identity.

    `inputs` are looked at for what is not finite, besides the values.
    """
    if attention is None:
        adapted = torch_backend.adapt(value, apply_feedback, _identity, None, _ONE_TERM)
    else:
        adapted = torch_backend.adapt(
            value,
            apply_feedback,
            lambda x: attention(x.to(value.dtype)),
            attended,
            library.op_adaptations(config),
        )
    if not torch.compiler.is_compiling():
        check_finite_product(adapted, inputs | {"value": value, "attended": attended})
    return adapted


# Under the identity the three terms are one.
_ONE_TERM = Adaptations(after=False, before=False, only=True)


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
