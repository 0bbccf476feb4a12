"""ProxyCLIP: the attention is the affinity of another vision model's features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import interpolate

from fsa import ops
from fsa.config import PROXY_GAIN, PROXY_SHIFT, FSAConfig
from fsa.errors import InputError
from fsa.hosts.base import Host, LastAttention


class ProxyCLIP(Host):
    """ProxyCLIP (Lan et al., ECCV 2024), without residual and feed-forward network.

    CLIP's values are resized bilinearly to the grid of the other model's features, which is the
    grid of the output. The class token takes no part.

    Args:
        shift, gain: of the affinity, s <- (s - shift * mean(s)) * gain.
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
        self.shift = shift
        self.gain = gain

    def grid(self, height: int, width: int, vfm_features: Tensor | None = None) -> tuple[int, int]:
        if vfm_features is None:
            raise InputError("the grid of ProxyCLIP is that of vfm_features, which were not given")
        return tuple(vfm_features.shape[-2:])

    def attention(
        self, tokens: Tensor, grid: tuple[int, int], vfm_features: Tensor | None
    ) -> LastAttention:
        value = self.tower.project(tokens[:, 1:], "v")["v"]
        value = self._resize(value, grid, tuple(vfm_features.shape[-2:]))
        features = vfm_features.flatten(2).transpose(1, 2).to(value.dtype)

        def attend(values: Tensor) -> Tensor:
            columns = values.transpose(1, 2).flatten(2)
            attended = ops.proxy_attention(
                features, columns, shift=self.shift, gain=self.gain, backend=self.backend
            )
            return attended.unflatten(-1, (self.tower.heads, -1)).transpose(1, 2)

        return LastAttention(
            value=value,
            apply=attend,
            attended=attend(value),
            mean_value=value.mean(dim=2, keepdim=True),
        )

    def _resize(self, value: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
        """Values (B,H,N,d) from one grid of patches to another."""
        if grid == new_grid:
            return value
        maps = value.transpose(2, 3).flatten(1, 2).unflatten(-1, grid)
        resized = interpolate(maps, size=new_grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).unflatten(1, (self.tower.heads, -1)).transpose(2, 3)

    def _check(
        self,
        images: Tensor,
        text_features: Tensor,
        vfm_features: Tensor | None,
        config: FSAConfig | None,
    ) -> None:
        super()._check(images, text_features, vfm_features, config)
        if vfm_features.ndim != 4 or len(vfm_features) != len(images):
            raise InputError(
                f"vfm_features must be (B, F, gh, gw) with B = {len(images)}; they have shape "
                f"{tuple(vfm_features.shape)}"
            )
        if vfm_features.device != images.device:
            raise InputError(
                f"vfm_features are on {vfm_features.device} and images on {images.device}: "
                "they must be the same"
            )
