"""How good labels are against masks: confusion matrices in whole numbers, and IoU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fsa.evaluation.layouts import IGNORE


def confusion(labels: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """(count,count) int64: entry [t, p] is how many pixels of class t were labelled p.

    Args:
        labels: predicted, integers in 0 to count - 1.
        mask: true, the same shape; pixels of 255 are left out.
        count: number of classes.
    """
    counted = mask != IGNORE
    pairs = mask[counted].astype(np.int64) * count + labels[counted].astype(np.int64)
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def iou(confusion_matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of each class; NaN for a class that occurs neither in the labels nor
    in the mask."""
    intersection = np.diag(confusion_matrix).astype(np.float64)
    union = confusion_matrix.sum(axis=0) + confusion_matrix.sum(axis=1) - intersection
    return np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)


def mean_iou(confusion_matrix: np.ndarray) -> float:
    """Mean over the classes that occur."""
    return float(np.nanmean(iou(confusion_matrix)))


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
