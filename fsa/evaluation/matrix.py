"""One confusion matrix on the device that labels, in whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, labelled class) in int64, so that no order of adding matters.

    Args:
        classes: how many.
        device: where labels and masks are.
    """

    def __init__(self, classes: int, device: torch.device | str) -> None:
        self.classes = classes
        # One more entry takes the pixels that are not counted: no data-dependent shape.
        self._counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=device)

    def add(self, labels: Tensor, mask: Tensor) -> None:
        """Counts a picture.

        Args:
            labels: (H,W) predicted, integers from 0 to classes - 1.
            mask: (H,W) true, the same; negative where a pixel is not counted.
        """
        mask = mask.long()
        pairs = torch.where(mask < 0, self.classes**2, mask * self.classes + labels.long())
        pairs = pairs.flatten()
        self._counts.scatter_add_(0, pairs, torch.ones_like(pairs))

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of another."""
        self._counts += other._counts

    def counts(self) -> Tensor:
        """(C,C) int64 on the CPU: entry [t, p] is how many pixels of class t were labelled p."""
        return self._counts[:-1].view(self.classes, self.classes).cpu()
