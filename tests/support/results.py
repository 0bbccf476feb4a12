"""Segmentations made by hand."""

from __future__ import annotations

import numpy as np
import torch

from fsa.models.text import TextQueries
from fsa.pictures.reading import Picture
from fsa.segment.cosines import WholeCosines
from fsa.segment.probabilities import ClassMaps
from fsa.segment.result import Segmentation


def made_result(labels: np.ndarray, names: list[str], picture: Picture) -> Segmentation:
    """A result with these labels, and cosines of 1 with the class of a pixel and 0 with others."""
    classes = torch.arange(len(names))
    queries = TextQueries(torch.eye(len(names)), classes, tuple(names))
    cosines = torch.from_numpy(labels)[None] == classes[:, None, None]
    maps = ClassMaps(WholeCosines(cosines.float()), queries, 40.0, labels.shape)
    return Segmentation(torch.from_numpy(labels), maps, names, {}, picture)
