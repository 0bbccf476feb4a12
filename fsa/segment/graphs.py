"""CUDA graphs: a whole forward as one launch, for inputs of shapes that come again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fsa.errors import InputError

_WARMUPS = 2


class GraphCache:
    """A function of tensors, captured once for each combination of shapes and replayed after.

    A graph reads the weights where they lay when it was captured: take another cache after moving
    or loading them. The graphs of a device share the memory that they work in, so that eight take
    little more than the largest. Threads and streams may share a cache; their calls take turns.

    Args:
        function: from tensors on one CUDA device to a tensor; it must not synchronise.
        capacity: how many graphs are kept; the one that was not used for longest goes first.
    """

    def __init__(self, function: Callable[..., Tensor], capacity: int = 8) -> None:
        self._function = function
        self._capacity = capacity
        self._graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self._turn = threading.Lock()
        self._last_stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The function without its graphs, which are of this process and of where weights lie."""
        return {"_function": self._function, "_capacity": self._capacity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        GraphCache.__init__(self, state["_function"], state["_capacity"])

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's result, in memory of its own.

        Raises:
            InputError: the function cannot be captured.
        """
        device = tensors[0].device
        key = (device, *((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
        with self._turn, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            # The graphs' memory is one: the call before must have been done with it.
            if self._last_stream is not None and self._last_stream != stream:
                stream.wait_stream(self._last_stream)
            self._last_stream = stream
            if key not in self._graphs:
                while len(self._graphs) >= self._capacity:
                    self._graphs.popitem(last=False)
                self._graphs[key] = self._captured(tensors)
            self._graphs.move_to_end(key)
            return self._graphs[key](*tensors)

    def _captured(self, tensors: tuple[Tensor, ...]) -> Captured:
        device = tensors[0].device
        beside = (graph for key, graph in self._graphs.items() if key[0] == device)
        try:
            return Captured(self._function, tensors, next(beside, None))
        except InputError:
            # The allocator takes the shared memory to be in use by that capture for ever.
            self._graphs.clear()
            raise


class Captured:
    """A function as a CUDA graph for inputs of some shapes, on the current device.

    Args:
        function: as `GraphCache` takes it.
        tensors: inputs of these shapes.
        beside: another graph of the same device, whose working memory is shared.

    Raises:
        InputError: the function cannot be captured.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        tensors: tuple[Tensor, ...],
        beside: Captured | None = None,
    ) -> None:
        # Written to in either mode later, which tensors made in inference mode are not.
        with torch.inference_mode(False):
            self._inputs = [torch.empty_like(tensor) for tensor in tensors]
        for place, tensor in zip(self._inputs, tensors, strict=True):
            place.copy_(tensor)
        self._graph = torch.cuda.CUDAGraph()
        # Memory is shared by captures of one stream only.
        self._stream: torch.cuda.Stream = torch.cuda.Stream() if beside is None else beside._stream
        pool = None if beside is None else beside._graph.pool()
        with _current_stream_restored() as before:
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                # Outside of the capture: kernels are compiled and libraries set up.
                for _ in range(_WARMUPS):
                    function(*self._inputs)
            before.wait_stream(self._stream)
            try:
                # Other threads may go on with work of their own meanwhile.
                with torch.cuda.graph(
                    self._graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._result = function(*self._inputs)
            except RuntimeError as error:
                # Ending the capture complains too, after what made it fail.
                cause = error.__context__ or error
                if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
                    raise cause from None
                raise InputError(
                    "cuda_graph=True is not accepted here, because the forward cannot be captured: "
                    f"{type(cause).__name__}: {cause}"
                ) from error

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's result for other tensors, in memory of its own."""
        for place, tensor in zip(self._inputs, tensors, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._result.clone()


@contextmanager
def _current_stream_restored() -> Iterator[torch.cuda.Stream]:
    """A capture that fails may leave its own stream behind as the current one."""
    before = torch.cuda.current_stream()
    try:
        yield before
    finally:
        torch.cuda.set_stream(before)
