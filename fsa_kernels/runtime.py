"""What the kernels run on, and how they are launched. Imports without Triton and without a GPU."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fsa_kernels.launch import Launch

# Looked for once: a compiler that traces `available` cannot follow the search.
_INSTALLED = importlib.util.find_spec("triton") is not None


def available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """A tensor's strides, that of a single image as 0.

    It multiplies nothing but 0, and whether it is a multiple of 16 would be compiled for.
    """
    return (0, *tensor.stride()[1:]) if tensor.shape[0] == 1 else tensor.stride()


# The releases of Triton in which `launch` may pass by the binder: those whose compiled kernels were
# seen to take all of a kernel's arguments, the compile-time constants among them.
_OLDEST_DIRECT, _NEWEST_DIRECT = (3, 6), (3, 9)

# What each specialisation compiled to, with its constants in the order of the parameters.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
# Sizes are part of the key. At this many entries the cache is emptied, so that a process that meets
# ever new sizes does not grow.
_MOST_COMPILED = 4096


@lru_cache(maxsize=1)
def _launches_directly() -> bool:
    if interpreting():
        return False
    release = tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    return _OLDEST_DIRECT <= release <= _NEWEST_DIRECT


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    plan: Launch,
    **flags: Any,
) -> None:
    """`kernel[grid](*tensors, *numbers, **flags, **plan.arguments())`, on the tensors' GPU, with
    less Python in it from the second time on.

    Triton looks at every argument of every launch to find what it compiled for arguments like
    these, which takes longer than the launch. This finds it by the numbers themselves and the rest
    of what Triton tells apart: the type of a tensor, whether its address is a multiple of 16, the
    device, all constants.

    Args:
        kernel: a function under `triton.jit` whose constants are its last parameters.
        grid: how many programs there are.
        tensors: of one device.
        numbers: each of one type, int or float, at every call of the kernel.
        plan: of the launch table, which returns the same object for the same sizes.
        flags: the compile-time constants that the plan does not hold, always in one order.
    """
    device = tensors[0].get_device()
    # Triton launches on the current GPU.
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, plan, **flags)
        return
    if not _launches_directly():
        kernel[grid](*tensors, *numbers, **flags, **plan.arguments())
        return
    traits: list[Any] = [id(kernel), device, plan, numbers, *flags.values()]
    for tensor in tensors:
        traits += (tensor.dtype, tensor.data_ptr() % 16 == 0)
    key = tuple(traits)
    found = _compiled.get(key)
    if found is None or _hooked():
        constants = {**flags, **plan.arguments()}
        compiled = kernel[grid](*tensors, *numbers, **constants)
        # A hook of Triton's may have kept it from compiling.
        if compiled is not None:
            if len(_compiled) >= _MOST_COMPILED:
                _compiled.clear()
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            _compiled[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, values = found
    stream = _triton().runtime.driver.active.get_current_stream(device)
    # The three that are None are for hooks.
    compiled.run(
        *grid,
        stream,
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *tensors,
        *numbers,
        *values,
    )


@lru_cache(maxsize=1)
def _triton() -> Any:
    import triton

    return triton


def _hooked() -> bool:
    """Whether something, such as a profiler, has asked Triton to be called at launches."""
    hooks = _triton().knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)
