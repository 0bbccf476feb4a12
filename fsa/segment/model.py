"""What a segmentor computes of a batch of windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fsa import hosts
from fsa.config import FSAConfig
from fsa.errors import InputError
from fsa.models.guides import VFM
from fsa.models.loading import LoadedModel
from fsa.models.text import TextQueries
from fsa.ops.checks import autocast_off
from fsa.pictures.windows import GridMap, pad_to_multiple
from fsa.segment.graphs import GraphCache


class WindowModel:
    """A host on a CLIP model, with or without feedback, as a function of windows.

    Attributes:
        host: what computes the last block.
        loaded: the CLIP model.
        vfm: ProxyCLIP's other model, or None.
        config: how feedback is computed, or None for the baseline.
        graphs: the CUDA graphs of `forward`, or None where it runs eagerly.

    Raises:
        InputError: cuda_graph where the model is not on a CUDA device.
    """

    def __init__(
        self,
        host: hosts.Host,
        loaded: LoadedModel,
        vfm: VFM | None,
        config: FSAConfig | None,
        *,
        cuda_graph: bool = False,
    ) -> None:
        if cuda_graph and loaded.device.type != "cuda":
            raise InputError(
                f"cuda_graph=True needs a CUDA device; the model is on {loaded.device}"
            )
        self.graphs = GraphCache(self.forward) if cuda_graph else None
        self.host, self.loaded, self.vfm, self.config = host, loaded, vfm, config
        # Made once, on the device: a copy from the host would wait for it in every picture.
        self._mean, self._std = (
            torch.tensor(channels, device=loaded.device)[:, None, None]
            for channels in (loaded.mean, loaded.std)
        )

    @torch.no_grad()
    def forward(self, windows: Tensor, text_features: Tensor) -> Tensor:
        """The whole computation of one batch of windows, for `torch.compile` and the like.

        Args:
            windows: (B,3,H,W), normalised with the model's mean and deviation, in its type and on
                its device; H and W multiples of the patch sizes of the model and of the vfm.
            text_features: (Q,E) float32, of unit length.

        Returns:
            Cosines (B,Q,rows,columns) float32, on the host's grid.

        Raises:
            InputError: as `Host.features`.
        """
        # The model runs in its own type, which under torch.autocast would be lost on the way.
        with autocast_off(windows):
            vfm_features, tokens = self.vfm_features(windows)
            features = self.host.features(
                windows, text_features, vfm_features=vfm_features, tokens=tokens, config=self.config
            )
            unit = features.float()
            if not self.host.compared_as_they_are:
                unit = functional.normalize(unit, dim=-1)
            grid = self.host.grid(windows.shape[-2], windows.shape[-1], vfm_features)
            return (unit @ text_features.T).transpose(1, 2).unflatten(2, grid)

    def normalise(self, image: Tensor) -> Tensor:
        """A picture (3,h,w) in [0, 1] as CLIP takes it, by its mean and deviation."""
        return (image - self._mean.to(image.device)) / self._std.to(image.device)

    def window_cosines(self, crops: Tensor, queries: TextQueries) -> list[GridMap]:
        """Cosines of each of the windows (B,3,h,w), on the grid of their patches.

        Args:
            crops: normalised, on the model's device; they may be of several pictures.
            queries: from `encode`.
        """
        padded, corner = self.padded(crops)
        forward = self.forward if self.graphs is None else self.graphs
        cosines = forward(padded, queries.features)
        whole, size = (padded.shape[-2], padded.shape[-1]), (crops.shape[-2], crops.shape[-1])
        return [GridMap(maps, whole, corner, size) for maps in cosines]

    def vfm_features(self, windows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the vfm makes of windows, and CLIP's tokens where they come with it."""
        return self.vfm.with_trunk(windows, self.host.tower) if self.vfm else (None, None)

    def padded(self, crops: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Windows padded to whole patches, in the model's type, and where they begin in that."""
        of_vfm = self.vfm.multiple if self.vfm else 1
        rows, columns = (math.lcm(side, of_vfm) for side in self.host.tower.patch_size)
        padded, corner = pad_to_multiple(crops, (rows, columns))
        return padded.to(self.loaded.dtype), corner
