"""Memory handed out filled with NaN, so that an entry nobody wrote shows in the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_FUNCTIONS = ("empty", "empty_like", "empty_strided")
_METHODS = ("new_empty", "new_empty_strided")


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Whatever Python code allocates uninitialised is filled: floats with NaN, integers with the
    lowest of their type.

    Memory that PyTorch's own operators allocate inside is not concerned; they write all of it.
    """
    with mock.patch.multiple(torch, **{name: _filled(getattr(torch, name)) for name in _FUNCTIONS}):
        methods = {name: _filled(getattr(Tensor, name)) for name in _METHODS}
        with mock.patch.multiple(Tensor, **methods):
            yield


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_filled(*args: Any, **options: Any) -> Tensor:
        tensor = allocate(*args, **options)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        if tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return allocate_filled
