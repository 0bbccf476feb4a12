"""A user's function as the host: feedback for methods that are not hosts here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fsa.config import FSAConfig
from fsa.errors import InputError
from fsa.hosts.base import Host, LastAttention
from fsa.ops.torch_backend import attention_applier


@dataclass(frozen=True)
class LastBlock:
    """What a read-out is given of the last block.

    Attributes:
        images: (B,3,H,W), as they came in: normalised with CLIP's mean and deviation.
        tokens: (B,L,D), as they enter the block; the first `prefix_tokens` of the L belong to no
            patch, the others are the grid row by row.
        query, key, value: (B,H,L,d), projected from the normalised tokens.
        prefix_tokens: 1 for CLIP, its class token.
        grid: rows and columns of patches.
    """

    images: Tensor
    tokens: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    prefix_tokens: int
    grid: tuple[int, int]


Attention = Tensor | LastAttention
AttentionFunction = Callable[[LastBlock], Attention]


class FunctionHost(Host):
    """A host whose attention is a function of the user's.

    Args:
        visual: a plain open_clip `VisionTransformer`.
        read_out: from a `LastBlock` to the attention between patches, where N is the number of
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
        read_out: AttentionFunction,
        *,
        residual: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(visual, residual=residual, backend=backend)
        self.read_out = read_out

    def attention(
        self,
        tokens: Tensor,
        images: Tensor,
        vfm_features: Tensor | None,
        config: FSAConfig | None,
    ) -> LastAttention:
        prefix = self.tower.prefix_tokens
        projected = self.tower.project(tokens, "qkv", self.tower.grid(*images.shape[-2:]))
        block = LastBlock(
            images=images,
            tokens=tokens,
            query=projected["q"],
            key=projected["k"],
            value=projected["v"],
            prefix_tokens=prefix,
            grid=self.tower.grid(*images.shape[-2:]),
        )
        result = self.read_out(block)
        value = block.value[:, :, prefix:]
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
        self, what: str, tensor: Tensor, accepted: tuple[tuple[int, ...], ...]
    ) -> None:
        if isinstance(tensor, Tensor) and tuple(tensor.shape) in accepted:
            return
        came = (
            f"shape {tuple(tensor.shape)}"
            if isinstance(tensor, Tensor)
            else f"a {type(tensor).__name__}"
        )
        name = getattr(self.read_out, "__name__", type(self.read_out).__name__)
        raise InputError(
            f"{what} returned by the read-out {name!r} must have shape "
            f"{' or '.join(map(str, accepted))}; it has {came}"
        )
