"""Registration of the ops with `torch.library`, so that compilers and exporters know them.

Each op is defined once, by `_define`, from its schema, its implementation and the shapes of its
results. What `_define` returns calls the implementation directly where nothing observes the call,
and goes through `torch.ops.fsa` where something does: a compiler, an exporter, a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import fsa_kernels
from fsa.config import FSAConfig
from fsa.ops import torch_backend
from fsa.ops.checks import autocast_off, check_finite, check_finite_product, out_of_memory
from fsa_kernels import launch

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

_PREDICTIONS = "Tensor patch_logits, Tensor? uniform_logits, Tensor? text_features"
_OPTIONS = (
    "float beta, float confidence, float logit_scale, float uniform_logit_scale, "
    "str similarity, str? pruning, float ratio, float threshold, bool scaling, str precision"
)
_OPTION_NAMES = tuple(option.split()[1] for option in _OPTIONS.split(", "))
_TERMS = "bool after, bool before, bool only, float scale"


def op_options(config: FSAConfig) -> tuple[Any, ...]:
    """The fields of a configuration that the ops take, in the order of `_OPTIONS`."""
    # All of the distribution is kept for p = 1: a cumulative sum must not round past it.
    if config.confidence == 1 and config.pruning == "confidence":
        config = config.replace(pruning=None)
    return tuple([getattr(config, name) for name in _OPTION_NAMES])


def _define(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers `fsa::name` and returns what calls it.

    Args:
        name: of the op.
        schema: its arguments and results.
        implementation: computes the results; it does not return or change its arguments.
        fake: empty results of the right shapes, types and strides.
    """
    registered = torch.library.custom_op(
        f"fsa::{name}", implementation, mutates_args=(), schema=schema
    )
    registered.register_fake(fake)
    dispatched = getattr(torch.ops.fsa, name)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_observed(arguments):
            return dispatched(*arguments)
        # The dispatcher takes four to six times as long as what stands around it.
        return implementation(*arguments)

    return call


def _is_observed(arguments: tuple[Any, ...]) -> bool:
    """Whether something besides the op itself has to see its call."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(a, Tensor) and type(a) not in _PLAIN_TENSORS for a in arguments)
    )


# Others, such as fake tensors, have a dispatch of their own.
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def _module(backend: str) -> ModuleType:
    return fsa_kernels if backend == "triton" else torch_backend


def _checked_options(
    predictions: tuple[Tensor | None, ...], options: tuple[Any, ...], backend: str
) -> dict[str, Any]:
    """The options by name, for a backend; predictions are looked at where that costs nothing."""
    names = ("patch_logits", "uniform_logits", "text_features")
    for name, tensor in zip(names, predictions, strict=True):
        if tensor is not None:
            check_finite(name, tensor)
    named = dict(zip(_OPTION_NAMES, options, strict=True))
    if backend == "torch":
        del named["precision"]
    return named


# --------------------------------------------------------------------------------------------------
# Predictions -> A_f


def _feedback_attention(
    patch_logits: Tensor,
    uniform_logits: Tensor | None,
    text_features: Tensor | None,
    *arguments: Any,
) -> Tensor:
    *options, dtype, backend = arguments
    predictions = (patch_logits, uniform_logits, text_features)
    named = _checked_options(predictions, tuple(options), backend)
    with autocast_off(patch_logits), out_of_memory("feedback attention", patch_logits):
        return _module(backend).feedback_attention(*predictions, dtype=dtype, **named)


def _fake_feedback_attention(
    patch_logits: Tensor,
    uniform_logits: Tensor | None,
    text_features: Tensor | None,
    *arguments: Any,
) -> Tensor:
    *_, dtype, backend = arguments
    B, N, _ = patch_logits.shape
    if backend == "triton":
        strides = launch.result_strides(N, dtype)
        return patch_logits.new_empty_strided((B, N, N), strides, dtype=dtype)
    return patch_logits.new_empty((B, N, N), dtype=dtype)


feedback_attention = _define(
    "feedback_attention",
    f"({_PREDICTIONS}, {_OPTIONS}, ScalarType dtype, str backend) -> Tensor",
    _feedback_attention,
    _fake_feedback_attention,
)


def _apply_feedback(
    patch_logits: Tensor,
    uniform_logits: Tensor | None,
    text_features: Tensor | None,
    columns: Tensor,
    *arguments: Any,
) -> Tensor:
    *options, backend = arguments
    predictions = (patch_logits, uniform_logits, text_features)
    named = _checked_options(predictions, tuple(options), backend)
    with autocast_off(patch_logits), out_of_memory("applied feedback attention", patch_logits):
        return _module(backend).apply_feedback(*predictions, columns, **named)


apply_feedback = _define(
    "apply_feedback",
    f"({_PREDICTIONS}, Tensor columns, {_OPTIONS}, str backend) -> Tensor",
    _apply_feedback,
    lambda patch_logits, uniform_logits, text_features, columns, *_: columns.new_empty(
        columns.shape
    ),
)


# --------------------------------------------------------------------------------------------------
# Adapted values


def _adapt(
    value: Tensor, feedback: Tensor, attention: Tensor, attended: Tensor | None, adaptations: str
) -> Tensor:
    apply_attention = torch_backend.attention_applier(attention)
    apply_feedback = partial(torch_backend.rows_times, feedback)
    with autocast_off(value), out_of_memory("adapted values", value):
        adapted = torch_backend.adapt(
            value, apply_feedback, apply_attention, attended, tuple(adaptations.split(","))
        ).contiguous()
    inputs = {"value": value, "feedback": feedback, "attention": attention, "attended": attended}
    check_finite_product(adapted, inputs)
    return adapted


adapt = _define(
    "adapt",
    "(Tensor value, Tensor feedback, Tensor attention, Tensor? attended, str adaptations) "
    "-> Tensor",
    _adapt,
    lambda value, *_: value.new_empty(value.shape),
)


def _gather(
    value: Tensor,
    attended: Tensor,
    after: bool,
    before: bool,
    only: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    terms = {"after": after, "before": before, "only": only}
    with autocast_off(value), out_of_memory("attended values", value):
        return _module(backend).gather(value, attended, scale=scale, **terms)


def _fake_gather(
    value: Tensor, attended: Tensor, after: bool, before: bool, only: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    B, H, N, d = attended.shape
    shapes = launch.gather_shapes(B, N, H * d, after=after, before=before, only=only)
    gathered, columns = (value.new_empty(shape) for shape in shapes)
    return gathered, columns


gather = _define(
    "gather",
    f"(Tensor value, Tensor attended, {_TERMS}, str backend) -> (Tensor, Tensor)",
    _gather,
    _fake_gather,
)


# --------------------------------------------------------------------------------------------------
# ProxyCLIP's attention


def _proxy_prepare(
    features: Tensor, shift: float, gain: float, stored: bool, backend: str
) -> tuple[Tensor, Tensor]:
    check_finite("features", features)
    with autocast_off(features), out_of_memory("the affinity of features", features):
        if backend == "triton":
            return fsa_kernels.proxy_prepare(features, shift=shift, gain=gain, stored=stored)
        return torch_backend.proxy_prepare(features, shift=shift)


def _fake_proxy_prepare(
    features: Tensor, shift: float, gain: float, stored: bool, backend: str
) -> tuple[Tensor, Tensor]:
    B, N, F = features.shape
    if backend == "torch":
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        return features.new_empty((B, N, F), dtype=dtype), features.new_empty((B,), dtype=dtype)
    shapes = launch.proxy_state(B, N, F, features.dtype, stored)
    first, second = (features.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return first, second


proxy_prepare = _define(
    "proxy_prepare",
    "(Tensor features, float shift, float gain, bool stored, str backend) -> (Tensor, Tensor)",
    _proxy_prepare,
    _fake_proxy_prepare,
)


def _proxy_apply(
    first: Tensor, second: Tensor, value: Tensor, add: Tensor | None, gain: float, backend: str
) -> Tensor:
    with autocast_off(value), out_of_memory("attended values", value):
        attended = _module(backend).proxy_apply((first, second), value, gain=gain, add=add)
    check_finite_product(attended, {"value": value})
    return attended


proxy_apply = _define(
    "proxy_apply",
    "(Tensor first, Tensor second, Tensor value, Tensor? add, float gain, str backend) -> Tensor",
    _proxy_apply,
    lambda first, second, value, *_: value.new_empty(value.shape),
)


def _proxy_gather(
    first: Tensor,
    second: Tensor,
    value: Tensor,
    gain: float,
    after: bool,
    before: bool,
    only: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    terms = {"after": after, "before": before, "only": only}
    with autocast_off(value), out_of_memory("attended values", value):
        gathered, columns = _module(backend).proxy_gather(
            (first, second), value, gain=gain, scale=scale, **terms
        )
    check_finite_product(gathered, {"value": value})
    return gathered, columns


def _fake_proxy_gather(
    first: Tensor,
    second: Tensor,
    value: Tensor,
    gain: float,
    after: bool,
    before: bool,
    only: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    shapes = launch.gather_shapes(*value.shape, after=after, before=before, only=only)
    gathered, columns = (value.new_empty(shape) for shape in shapes)
    return gathered, columns


proxy_gather = _define(
    "proxy_gather",
    f"(Tensor first, Tensor second, Tensor value, float gain, {_TERMS}, str backend) "
    "-> (Tensor, Tensor)",
    _proxy_gather,
    _fake_proxy_gather,
)
