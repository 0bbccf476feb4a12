"""How good labels are against a mask."""

from __future__ import annotations

import numpy as np

IGNORE = 255


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
    """Intersection over union of each class; NaN for one in neither labels nor mask."""
    intersection = np.diag(confusion_matrix).astype(np.float64)
    union = confusion_matrix.sum(axis=0) + confusion_matrix.sum(axis=1) - intersection
    return np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)


def mean_iou(confusion_matrix: np.ndarray) -> float:
    """Mean over the classes that occur."""
    return float(np.nanmean(iou(confusion_matrix)))
