"""What the kernels run on, and how they are launched. Imports without Triton and without a GPU."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch

# Looked for once: a compiler that traces `available` cannot follow the search.
_INSTALLED = importlib.util.find_spec("triton") is not None


def available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one; Triton launches on the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


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


@lru_cache(maxsize=1)
def _launches_directly() -> bool:
    if interpreting():
        return False
    release = tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    return _OLDEST_DIRECT <= release <= _NEWEST_DIRECT


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` with less Python in it from the second time on.

    Triton looks at every argument of every launch to find what it compiled for arguments like
    these, which takes longer than the launch. This finds it by a key that tells apart at least what
    Triton tells apart: the types of arguments; whether an integer is 1, a multiple of 16 or wider
    than 32 bits; whether a pointer is aligned to 16 bytes; the current device; all constants.

    Args:
        kernel: a function under `triton.jit` whose constants are its last parameters.
        grid: how many programs there are in each of three dimensions.
        arguments: tensors, integers and floats, in the order of the parameters.
        constants: the compile-time constants, and options such as num_warps.
    """
    if not _launches_directly():
        kernel[grid](*arguments, **constants)
        return
    key: list[Any] = [id(kernel), torch.cuda.current_device()]
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            if argument == 1:
                key.append(1)
            else:
                key.append((argument % 16 == 0, -(2**31) <= argument < 2**31))
        elif kind is float:
            key.append(kind)
        else:
            key.append((argument.dtype, argument.data_ptr() % 16 == 0))
    key.extend(constants.values())
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        # A hook of Triton's may have kept it from compiling.
        if compiled is not None:
            names = kernel.arg_names[len(arguments) :]
            _compiled[tuple(key)] = compiled, tuple(constants[name] for name in names)
        return
    compiled, values = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *values)
