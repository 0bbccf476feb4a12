"""How probable the classes are in a picture, computed when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fsa.errors import InputError
from fsa.models.text import TextQueries
from fsa.segment.cosines import Cosines, full_size_strips
from fsa.segment.labels import class_probabilities, strip_entries


@dataclass(frozen=True)
class ClassMaps:
    """Probabilities of the classes in a picture.

    Attributes:
        cosines: at the working size, or None where they were too large to be kept.
        queries: what they are cosines with.
        scale: of the cosines before the softmax over queries.
        size: (H,W) of the picture itself.
    """

    cosines: Cosines | None
    queries: TextQueries
    scale: float
    size: tuple[int, int]

    @property
    def working_size(self) -> tuple[int, int]:
        """(h,w)."""
        return self._kept().shape[1:]

    @torch.inference_mode()
    def scores(self) -> Tensor:
        """Probabilities (C,h,w) float32 at the working size."""
        cosines = self._kept()
        return class_probabilities(cosines.rows(0, cosines.shape[1]), self.queries, self.scale)

    @torch.inference_mode()
    def of_class(self, index: int) -> Tensor:
        """Probabilities (H,W) float32 of one class at the picture's own size."""
        found: Tensor | None = None
        for strip, probabilities in self._strips():
            if found is None:
                found = torch.empty(self.size, device=probabilities.device)
            found[strip] = probabilities[index]
        assert found is not None
        return found

    @torch.inference_mode()
    def mean_by_label(self, labels: Tensor) -> Tensor:
        """(C,) float64, the mean probability of a class over the pixels (H,W) that it labels.

        Those of other labels, such as a background that was added, count nowhere; 0 where a class
        labels nothing.
        """
        count = len(self.queries.names)
        sums, pixels = torch.zeros(count, dtype=torch.float64), torch.zeros(count)
        for strip, probabilities in self._strips():
            own = labels[strip].to(probabilities.device).long()
            named = own < count
            chosen = probabilities.gather(0, own.clamp(max=count - 1)[None])[0][named]
            sums += torch.bincount(own[named], chosen.double(), minlength=count).cpu()
            pixels += torch.bincount(own[named], minlength=count).cpu()
        return sums / pixels.clamp(min=1)

    def to(self, device: torch.device | str) -> ClassMaps:
        """The same on a device."""
        features, index = (x.to(device) for x in (self.queries.features, self.queries.class_index))
        queries = replace(self.queries, features=features, class_index=index)
        cosines = None if self.cosines is None else self.cosines.to(device)
        return replace(self, cosines=cosines, queries=queries)

    def _strips(self) -> Iterator[tuple[slice, Tensor]]:
        cosines = self._kept()
        on_gpu = self.queries.features.device.type == "cuda"
        rows = slice(0, self.size[0])
        for strip, maps in full_size_strips(cosines, self.size, rows, strip_entries(on_gpu)):
            yield strip, class_probabilities(maps, self.queries, self.scale)

    def _kept(self) -> Cosines:
        if self.cosines is None:
            raise InputError(
                "the probabilities of this picture would take more than 1 GiB and were not kept: "
                "choose a smaller short_side, a larger stride or fewer classes"
            )
        return self.cosines
