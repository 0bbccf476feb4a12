"""ProxyCLIP: the attention is the affinity of another vision model's features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import interpolate

from fsa import ops
from fsa.arguments import finite_number
from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError
from fsa.hosts.base import Host
from fsa.hosts.block import LastAttention, LastBlock


def affinity_attention(
    vfm_features: Tensor | None,
    value: Tensor,
    grid: tuple[int, int],
    shift: float,
    gain: float,
    backend: str,
    config: FSAConfig | None,
) -> LastAttention:
    """ProxyCLIP's attention on the grid of the other model.

    Args:
        vfm_features: (B,F,gh,gw).
        value: V (B,H,N,d) of CLIP's patches, on their own grid.
        grid: rows and columns of `value`.
        shift, gain: see `fsa.ProxyAttention`.
        backend: of the ops.
        config: of the feedback that will follow, or None.
    """
    assert vfm_features is not None
    value = _resize(value, grid, (vfm_features.shape[-2], vfm_features.shape[-1]))
    features = vfm_features.flatten(2).transpose(1, 2).to(value.dtype)
    attention = ops.ProxyAttention(features, shift=shift, gain=gain, backend=backend)
    if config is None:
        attended = attention(ops.heads_side_by_side(value))
        return LastAttention(value, None, ops.heads_apart(attended, value.shape[1]), None)
    return LastAttention.of_step(value, ops.ProxyStep(attention, value, config))


def _resize(value: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Values (B,H,N,d) from one grid of patches to another."""
    if grid == new_grid:
        return value
    heads = value.shape[1]
    maps = value.transpose(2, 3).flatten(1, 2).unflatten(-1, grid)
    resized = interpolate(maps, size=new_grid, mode="bilinear", align_corners=False)
    return resized.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


class ProxyCLIP(Host):
    """ProxyCLIP (Lan et al., ECCV 2024), without residual and feed-forward network.

    CLIP's values are resized bilinearly to the grid of the other model's features, which is the
    grid of the output. The class token takes no part.

    Args:
        shift, gain: of the affinity, s <- (s - shift * mean(s)) * gain; the paper's beta and gamma.

    Raises:
        InputError: a shift that is not a finite number, or a gain that is not one above 0.
    """

    published_residual = False
    needs_vfm = True

    def __init__(
        self,
        visual: nn.Module,
        *,
        shift: float = PROXY_SHIFT,
        gain: float = PROXY_GAIN,
        backend: str = "auto",
    ) -> None:
        super().__init__(visual, backend=backend)
        self.shift = finite_number("shift", shift)
        self.gain = finite_number("gain", gain, positive=True)

    def grid(self, height: int, width: int, vfm_features: Tensor | None = None) -> tuple[int, int]:
        if vfm_features is None:
            raise InputError("the grid of ProxyCLIP is that of vfm_features, which were not given")
        return vfm_features.shape[-2], vfm_features.shape[-1]

    def attention(self, block: LastBlock, config: FSAConfig | None) -> LastAttention:
        value = self.tower.project(block.patch_tokens, "v")["v"]
        return affinity_attention(
            block.vfm_features, value, block.grid, self.shift, self.gain, self.backend, config
        )

    def _check(
        self,
        images: Tensor,
        text_features: Tensor,
        vfm_features: Tensor | None,
        config: FSAConfig | None,
    ) -> None:
        super()._check(images, text_features, vfm_features, config)
        assert vfm_features is not None
        if vfm_features.ndim != 4 or vfm_features.shape[0] != images.shape[0]:
            raise InputError(
                f"vfm_features must be (B, F, gh, gw) with B = {images.shape[0]}; they have shape "
                f"{tuple(vfm_features.shape)}"
            )
        if vfm_features.device != images.device:
            raise InputError(
                f"vfm_features are on {vfm_features.device} and images on {images.device}: "
                "they must be the same"
            )
