"""Models made without drawing their random weights, which a checkpoint overwrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LEFT_OUT: frozenset[Callable[..., Any]] = frozenset(
    {
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.xavier_uniform_,
        nn.init.xavier_normal_,
        nn.init.kaiming_uniform_,
        nn.init.kaiming_normal_,
    }
)
_DRAWN: frozenset[Callable[..., Any]] = frozenset({Tensor.uniform_, Tensor.normal_})
_BLOCK = 1 << 14


class without_random_weights(TorchFunctionMode):
    """Around what makes a model of which a file will overwrite every weight.

    To draw the weights takes longer than to load them. Functions of `torch.nn.init` that draw leave
    a tensor as it is. What others draw repeats itself every 16384 entries: it is still random,
    because there are functions that draw until they are content.

    The file must then fill every parameter: call `load_state_dict`, and refuse missing keys.
    Buffers that are no part of a state_dict, such as masks, are not random and are made as always.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        if function in _LEFT_OUT:
            return arguments[0] if arguments else options["tensor"]
        if function in _DRAWN and arguments[0].numel() > _BLOCK and arguments[0].is_contiguous():
            tensor, *distribution = arguments
            flat = tensor.view(-1)
            function(flat[:_BLOCK], *distribution, **options)
            tail = flat.numel() % _BLOCK
            flat[_BLOCK : flat.numel() - tail].view(-1, _BLOCK).copy_(flat[:_BLOCK])
            flat[flat.numel() - tail :].copy_(flat[:tail])
            return tensor
        return function(*arguments, **options)
