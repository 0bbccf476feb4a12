"""From merged cosines to labels at the picture's own size: probabilities, background."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fsa.arguments import as_integer, number_within
from fsa.classes import checked_name
from fsa.config import SEGMENTATION_SCALE
from fsa.errors import InputError, NotFiniteError
from fsa.models.text import TextQueries
from fsa.segment.cosines import WholeCosines, full_size_strips

_BACKGROUND = "background"
# Entries of one strip of full-size logits: on the CPU 4 MiB in float32, which stay in its caches;
# on a GPU 256 MiB, so that launches are few.
_STRIP_ENTRIES = 1 << 20
_STRIP_ENTRIES_GPU = 1 << 26


def named_background(
    classes: tuple[tuple[str, ...], ...], prob_thd: float, background: str | int | None
) -> tuple[tuple[str, ...], int | None]:
    """The classes' names with the background among them, and its index or None for none."""
    names = tuple(synonyms[0] for synonyms in classes)
    prob_thd = number_within("prob_thd", prob_thd, 0, 1)
    number = as_integer(background)
    if number is not None:
        if not 0 <= number < len(names):
            raise InputError(
                f"background={background} is not the number of a class: there are {len(names)}"
            )
        index = number
    elif background is None or (isinstance(background, str) and background.strip()):
        name = checked_name(background or _BACKGROUND, "background")
        known = {
            synonym.casefold(): number
            for number, synonyms in enumerate(classes)
            for synonym in synonyms
        }
        index = known.get(name.casefold(), len(names))
        if index == len(names) and prob_thd > 0:
            names = (*names, name)
    else:
        raise InputError(f"background={background!r} must be the name or the number of a class")
    return names, index if prob_thd > 0 else None


def class_probabilities(
    cosines: Tensor, queries: TextQueries, scale: float = SEGMENTATION_SCALE
) -> Tensor:
    """Probabilities (C,h,w): softmax over queries (Q,h,w), the best of a class's names."""
    probabilities = (cosines * scale).softmax(dim=0)
    if len(queries.names) == len(queries.class_index):
        return probabilities
    index = queries.class_index.to(cosines.device)[:, None, None].expand_as(probabilities)
    best = probabilities.new_zeros((len(queries.names), *probabilities.shape[1:]))
    return best.scatter_reduce(0, index, probabilities, "amax", include_self=True)


def require_finite(cosines: Tensor) -> None:
    """Waits for the device; to be called where labels were brought to the host already.

    Raises:
        NotFiniteError: cosines with NaN or inf, whose labels mean nothing.
    """
    # Both propagate NaN; to look at each cosine would need memory for as many again.
    if not bool(torch.stack(cosines.aminmax()).isfinite().all()):
        raise NotFiniteError("the cosines hold NaN or inf")


def label_map(
    cosines: Tensor,
    queries: TextQueries,
    size: tuple[int, int],
    prob_thd: float,
    background_index: int | None,
    *,
    scale: float = SEGMENTATION_SCALE,
    area_thd: float = 0.0,
) -> Tensor:
    """Labels (H,W) int32 at the picture's own size.

    Without a background the softmax, which keeps the order, is left out: the label is the
    class of the largest cosine, the first of equal ones. (The softmax may round cosines to equal
    probabilities that differ in their last digits; here the larger cosine counts.)

    Args:
        cosines: (Q,h,w), merged over the windows of a picture.
        queries: what they are cosines with.
        size: (H,W) of the picture.
        prob_thd: pixels whose best class has a lower probability become `background_index`.
        background_index: a class, or None to leave them.
        scale: of the cosines before the softmax over queries.
        area_thd: classes other than the background whose share of the foreground is not larger are
            given up in favour of the others (SCLIP's published protocol); 0 keeps all.
    """
    choice = Choice(queries, prob_thd, background_index, scale)
    if area_thd > 0 and background_index is not None:
        first = label_map(cosines, queries, size, 0.0, None, scale=scale)
        areas = torch.bincount(first.flatten(), minlength=len(queries.names))
        areas[background_index] = 0
        dropped = areas <= area_thd * areas.sum()
        dropped[background_index] = False
        choice = replace(choice, dropped=dropped)
    return choice.label_map(cosines, size)


def strip_entries(on_gpu: bool) -> int:
    """How many entries a strip of full-size cosines may have."""
    return _STRIP_ENTRIES_GPU if on_gpu else _STRIP_ENTRIES


@dataclass(frozen=True)
class Choice:
    """How a pixel gets its label.

    Attributes:
        queries, prob_thd, background_index, scale: as `label_map` takes them.
        dropped: (C,) bool, classes that are given up in favour of the others, or None.
    """

    queries: TextQueries
    prob_thd: float
    background_index: int | None
    scale: float
    dropped: Tensor | None = None

    def labels(self, maps: Tensor) -> Tensor:
        """Labels (h,w) int32 of cosines (Q,h,w)."""
        if self.background_index is None:
            return self.queries.class_index[maps.max(dim=0).indices].int()
        probabilities = class_probabilities(maps, self.queries, self.scale)
        if self.dropped is not None:
            probabilities.masked_fill_(self.dropped[:, None, None], 0)
        best, index = probabilities.max(dim=0)
        return index.masked_fill(best < self.prob_thd, self.background_index).int()

    def label_map(self, cosines: Tensor, size: tuple[int, int]) -> Tensor:
        """Labels (H,W) int32 at a picture's own size, of cosines (Q,h,w) at its working size.

        The cosines are upsampled in strips of rows, so that memory does not grow with classes times
        pixels.
        """
        labels = torch.empty(size, dtype=torch.int32, device=cosines.device)
        for strip, maps in full_size_strips(
            WholeCosines(cosines), size, slice(0, size[0]), strip_entries(cosines.is_cuda)
        ):
            labels[strip] = self.labels(maps)
        return labels
