"""Registration of the ops with `torch.library`, so that compilers and exporters know them.

Each op is defined once, by its function under `_op`, whose annotations are the schema, and by the
shapes of its results. A call goes to the function directly where nothing observes it, and through
`torch.ops.fsa` where something does: a compiler, an exporter, a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree

import fsa_kernels
from fsa.config import FSAConfig
from fsa.ops import torch_backend
from fsa.ops.checks import autocast_off, check_finite, check_finite_product, out_of_memory
from fsa_kernels import Adaptations, Options, launch

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

# What a parameter of an op is in its schema. A tuple of plain values, such as `Options`, crosses as
# its fields.
_PLAIN: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
    tuple[Tensor, Tensor]: "(Tensor, Tensor)",
}


def op_options(config: FSAConfig) -> Options:
    """The fields of a configuration that the ops take."""
    # All of the distribution is kept for p = 1: a cumulative sum must not round past it.
    if config.confidence == 1 and config.pruning == "confidence":
        config = config.replace(pruning=None)
    return Options(*[getattr(config, name) for name in Options._fields])


def op_adaptations(config: FSAConfig) -> Adaptations:
    """The terms of a configuration that are averaged."""
    return Adaptations(*[name in config.adaptations for name in Adaptations._fields])


def _op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `fsa::` and its name, and returns what calls it.

    The function computes the results; it does not return or change its arguments. The op's schema
    follows from its annotations. What is returned calls it directly where nothing observes the
    call, and the registered op where something does.

    Args:
        fake: from the same arguments, empty results of the right shapes, types and strides.
    """

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        kinds = get_type_hints(implementation)
        result = kinds.pop("return")
        plain: dict[str, Any] = {}
        for parameter, kind in kinds.items():
            plain |= {parameter: kind} if kind in _PLAIN else get_type_hints(kind)

        def packed(values: Sequence[Any]) -> list[Any]:
            rest = iter(values)
            return [
                next(rest) if kind in _PLAIN else kind(*islice(rest, len(kind._fields)))
                for kind in kinds.values()
            ]

        name = implementation.__name__
        parameters = (f"{_PLAIN[kind]} {parameter}" for parameter, kind in plain.items())
        registered = torch.library.custom_op(
            f"fsa::{name}",
            lambda *values: implementation(*packed(values)),
            mutates_args=(),
            schema=f"({', '.join(parameters)}) -> {_PLAIN[result]}",
        )
        registered.register_fake(lambda *values: fake(*packed(values)))
        dispatched = getattr(torch.ops.fsa, name)

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or _is_observed(arguments):
                return dispatched(*_unpacked(arguments))
            # The dispatcher takes four to six times as long as what stands around it.
            return implementation(*arguments)

        return call

    return register


def _unpacked(arguments: tuple[Any, ...]) -> list[Any]:
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            values += argument
        else:
            values.append(argument)
    return values


def _is_observed(arguments: tuple[Any, ...]) -> bool:
    """Whether something besides the op itself has to see its call."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not _PLAIN_TYPES.issuperset(map(type, arguments))
    )


# Other tensors, such as fake ones, have a dispatch of their own. An int may stand for a float.
_PLAIN_TYPES = frozenset(
    {Tensor, torch.nn.Parameter, Options, Adaptations, torch.dtype}
    | {type(None), bool, int, float, str}
)


def _module(backend: str) -> ModuleType:
    return fsa_kernels if backend == "triton" else torch_backend


# --------------------------------------------------------------------------------------------------
# Predictions -> A_f


def _check_predictions(
    patch_logits: Tensor, uniform_logits: Tensor | None, text_features: Tensor | None
) -> None:
    """Looks for what is not finite where that costs nothing."""
    check_finite("patch_logits", patch_logits)
    if uniform_logits is not None:
        check_finite("uniform_logits", uniform_logits)
    if text_features is not None:
        check_finite("text_features", text_features)


def _fake_feedback_attention(
    patch_logits: Tensor,
    uniform_logits: Tensor | None,
    text_features: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    B, N, _ = patch_logits.shape
    if backend == "triton":
        strides = launch.result_strides(N, dtype)
        return patch_logits.new_empty_strided((B, N, N), strides, dtype=dtype)
    return patch_logits.new_empty((B, N, N), dtype=dtype)


@_op(_fake_feedback_attention)
def feedback_attention(
    patch_logits: Tensor,
    uniform_logits: Tensor | None,
    text_features: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """A_f (B,N,N)."""
    predictions = (patch_logits, uniform_logits, text_features)
    _check_predictions(*predictions)
    with autocast_off(patch_logits), out_of_memory("feedback attention", patch_logits):
        return _module(backend).feedback_attention(*predictions, options=options, dtype=dtype)


@_op(
    lambda patch_logits, uniform_logits, text_features, columns, *_: columns.new_empty(
        columns.shape
    )
)
def apply_feedback(
    patch_logits: Tensor,
    uniform_logits: Tensor | None,
    text_features: Tensor | None,
    columns: Tensor,
    options: Options,
    backend: str,
) -> Tensor:
    """A_f times columns (B,N,K), in their type."""
    predictions = (patch_logits, uniform_logits, text_features)
    _check_predictions(*predictions)
    with autocast_off(patch_logits), out_of_memory("applied feedback attention", patch_logits):
        return _module(backend).apply_feedback(*predictions, columns, options=options)


# --------------------------------------------------------------------------------------------------
# Adapted values


@_op(lambda value, *_: value.new_empty(value.shape))
def adapt(
    value: Tensor,
    feedback: Tensor,
    attention: Tensor,
    attended: Tensor | None,
    adaptations: Adaptations,
) -> Tensor:
    """The adapted values (B,H,N,d)."""
    apply_attention = torch_backend.attention_applier(attention)
    apply_feedback = partial(torch_backend.rows_times, feedback)
    with autocast_off(value), out_of_memory("adapted values", value):
        adapted = torch_backend.adapt(
            value, apply_feedback, apply_attention, attended, adaptations
        ).contiguous()
    inputs = {"value": value, "feedback": feedback, "attention": attention, "attended": attended}
    check_finite_product(adapted, inputs)
    return adapted


def _fake_gather(
    value: Tensor, attended: Tensor, adaptations: Adaptations, backend: str
) -> tuple[Tensor, Tensor]:
    B, H, N, d = attended.shape
    gathered, columns = map(value.new_empty, adaptations.gather_shapes(B, N, H * d))
    return gathered, columns


@_op(_fake_gather)
def gather(
    value: Tensor, attended: Tensor, adaptations: Adaptations, backend: str
) -> tuple[Tensor, Tensor]:
    """What a step takes of values (B,H,L,d) and attended values (B,H,N,d)."""
    with autocast_off(value), out_of_memory("attended values", value):
        return _module(backend).gather(value, attended, adaptations)


# --------------------------------------------------------------------------------------------------
# ProxyCLIP's attention


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


@_op(_fake_proxy_prepare)
def proxy_prepare(
    features: Tensor, shift: float, gain: float, stored: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """What the applications of one attention share, from features (B,N,F)."""
    check_finite("features", features)
    with autocast_off(features), out_of_memory("the affinity of features", features):
        if backend == "triton":
            return fsa_kernels.proxy_prepare(features, shift=shift, gain=gain, stored=stored)
        return torch_backend.proxy_prepare(features, shift=shift)


@_op(lambda first, second, value, *_: value.new_empty(value.shape))
def proxy_apply(
    first: Tensor, second: Tensor, value: Tensor, add: Tensor | None, gain: float, backend: str
) -> Tensor:
    """The attention applied to values (B,N,D), plus a tensor of their shape."""
    with autocast_off(value), out_of_memory("attended values", value):
        attended = _module(backend).proxy_apply((first, second), value, gain=gain, add=add)
    check_finite_product(attended, {"value": value})
    return attended


def _fake_proxy_gather(
    first: Tensor,
    second: Tensor,
    value: Tensor,
    gain: float,
    adaptations: Adaptations,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gathered, columns = map(value.new_empty, adaptations.gather_shapes(*value.shape))
    return gathered, columns


@_op(_fake_proxy_gather)
def proxy_gather(
    first: Tensor,
    second: Tensor,
    value: Tensor,
    gain: float,
    adaptations: Adaptations,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What a step takes of values (B,N,D) and of the attention applied to them."""
    with autocast_off(value), out_of_memory("attended values", value):
        gathered, columns = _module(backend).proxy_gather(
            (first, second), value, adaptations, gain=gain
        )
    check_finite_product(gathered, {"value": value})
    return gathered, columns
