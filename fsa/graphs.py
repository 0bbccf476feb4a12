"""CUDA graphs: a whole forward as one launch, for inputs of shapes that come again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

_WARMUPS = 2


class GraphCache:
    """A function of tensors, captured once for each combination of shapes and replayed after.

    Args:
        function: from tensors on one CUDA device to a tensor; it must not synchronise.
        capacity: how many graphs are kept; the one that was not used for longest goes first.
    """

    def __init__(self, function: Callable[..., Tensor], capacity: int = 8) -> None:
        self._function = function
        self._capacity = capacity
        self._graphs: OrderedDict[tuple, Callable[..., Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's result, in memory of its own."""
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if key not in self._graphs:
            while len(self._graphs) >= self._capacity:
                self._graphs.popitem(last=False)
            self._graphs[key] = capture(self._function, tensors)
        self._graphs.move_to_end(key)
        return self._graphs[key](*tensors)


def capture(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The function as a CUDA graph for inputs of these shapes."""
    inputs = [tensor.clone() for tensor in tensors]
    # Outside of the capture, on a stream of its own: kernels are compiled and libraries set up.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUPS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*inputs)

    def replay(*tensors: Tensor) -> Tensor:
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result.clone()

    return replay
