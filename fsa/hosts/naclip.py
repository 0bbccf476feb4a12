"""NACLIP: key-key attention that prefers a patch's neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa.arguments import finite_number
from fsa.config import NACLIP_STD
from fsa.hosts.block import LastBlock
from fsa.hosts.self_attention import SelfAttentionHost


class NACLIP(SelfAttentionHost):
    """NACLIP (Hajimiri et al., WACV 2025), without residual and feed-forward network.

    softmax(k k^T / sqrt(d) + omega), where omega_ij = exp(-|i - j|^2 / (2 std^2)) for two patches
    with their places i and j on the grid, and 0 between a patch and the class token. One N x N
    matrix, shared by images and heads, is built per picture size.

    Args:
        std: of the Gaussian, in patches.

    Raises:
        InputError: a deviation that is not a finite number above 0.
    """

    pairs = ("kk",)
    published_residual = False

    def __init__(
        self,
        visual: nn.Module,
        *,
        std: float = NACLIP_STD,
        residual: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(visual, residual=residual, backend=backend)
        self.std = finite_number("std", std, positive=True)

    def bias(self, block: LastBlock) -> Tensor:
        rows, columns = (self._neighbourhood(length, block.tokens.device) for length in block.grid)
        # The Gaussian of a distance on the grid is that of the rows times that of the columns.
        window = rows[:, None, :, None] * columns[None, :, None, :]
        bias = functional.pad(window.flatten(2).flatten(0, 1), (block.prefix_tokens, 0))
        return bias.to(block.tokens.dtype)

    def _neighbourhood(self, length: int, device: torch.device) -> Tensor:
        """exp(-(i - j)^2 / (2 std^2)) along one axis of the grid, (length,length) in float64."""
        place = torch.arange(length, dtype=torch.float64, device=device)
        return torch.exp((place[:, None] - place).square() / (-2 * self.std**2))
