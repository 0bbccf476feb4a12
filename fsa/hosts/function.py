"""A user's function as the host: feedback for methods that are not hosts here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fsa.config import FSAConfig
from fsa.errors import InputError
from fsa.hosts.base import Host
from fsa.hosts.block import LastAttention, LastBlock
from fsa.ops.torch_backend import attention_applier

Attention = Tensor | LastAttention
AttentionFunction = Callable[[LastBlock], Attention]


class FunctionHost(Host):
    """A host whose attention is a function of the user's.

    Args:
        visual: a plain open_clip `VisionTransformer`.
        function: from a `LastBlock` to the attention between patches, where N is the number of
            patches of `block.grid`: a tensor (B,N,N) shared by the heads, or (B,H,N,N); rows need
            not sum to 1. Or, to change the values as well or to apply the attention without its
            matrix, a `LastAttention` with values (B,H,N,d).
        residual: whether the last block keeps its residual connection and feed-forward network;
            None drops them.
        backend: of the ops, "auto", "triton" or "torch".
    """

    published_residual = False

    def __init__(
        self,
        visual: nn.Module,
        function: AttentionFunction,
        *,
        residual: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(visual, residual=residual, backend=backend)
        self.function = function

    def attention(self, block: LastBlock, config: FSAConfig | None) -> LastAttention:
        result = self.function(block)
        value = block.value[:, :, block.prefix_tokens :]
        B, H, N, d = value.shape
        if isinstance(result, LastAttention):
            self._check_shape("value", result.value, ((B, H, N, d),))
            self._check_shape("attended", result.attended, ((B, H, N, d),))
            self._check_shape("mean_value", result.mean_value, ((B, H, 1, d),))
            return result
        self._check_shape("the attention", result, ((B, N, N), (B, H, N, N)))
        apply_matrix = attention_applier(result.to(value.dtype))

        def attend(values: Tensor) -> Tensor:
            return apply_matrix(values).to(value.dtype)

        return LastAttention(
            value=value,
            apply=attend,
            attended=attend(value),
            mean_value=value.mean(dim=2, keepdim=True),
        )

    def _check_shape(
        self, what: str, tensor: Tensor | None, accepted: tuple[tuple[int, ...], ...]
    ) -> None:
        if isinstance(tensor, Tensor) and tuple(tensor.shape) in accepted:
            return
        came = (
            f"shape {tuple(tensor.shape)}"
            if isinstance(tensor, Tensor)
            else f"a {type(tensor).__name__}"
        )
        name = getattr(self.function, "__name__", type(self.function).__name__)
        raise InputError(
            f"{what} returned by the function {name!r} must have shape "
            f"{' or '.join(map(str, accepted))}; it has {came}"
        )
