"""From merged cosines to labels at the picture's own size: probabilities, background."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fsa.arguments import as_integer, number_within
from fsa.classes import checked_name
from fsa.config import SEGMENTATION_SCALE
from fsa.errors import InputError, NotFiniteError
from fsa.models.text import TextQueries

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

    The logits are upsampled in strips of rows, so that memory does not grow with classes times
    pixels. Without a background the softmax, which keeps the order, is left out: the label is the
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
    if area_thd > 0 and background_index is not None:
        first = label_map(cosines, queries, size, 0.0, None, scale=scale)
        areas = torch.bincount(first.flatten(), minlength=len(queries.names))
        areas[background_index] = 0
        dropped = areas <= area_thd * areas.sum()
        dropped[background_index] = False
    else:
        dropped = None
    height, width = size
    labels = torch.empty(size, dtype=torch.int32, device=cosines.device)
    entries = _STRIP_ENTRIES_GPU if cosines.is_cuda else _STRIP_ENTRIES
    rows = max(1, entries // (len(cosines) * max(width, cosines.shape[2])))
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height))
        maps = _upsampled_rows(cosines, size, strip)
        if background_index is None:
            labels[strip] = queries.class_index[maps.max(dim=0).indices].int()
            continue
        probabilities = class_probabilities(maps, queries, scale)
        if dropped is not None:
            probabilities.masked_fill_(dropped[:, None, None], 0)
        best, index = probabilities.max(dim=0)
        labels[strip] = index.masked_fill(best < prob_thd, background_index).int()
    return labels


def _upsampled_rows(maps: Tensor, size: tuple[int, int], strip: slice) -> Tensor:
    """Rows `strip` of maps (Q,h,w) resized bilinearly to `size`."""
    height, width = size
    if strip == slice(0, height):
        return functional.interpolate(maps[None], size=size, mode="bilinear")[0]
    # Where output rows fall between input rows, as bilinear resizing has it.
    centre = (torch.arange(strip.start, strip.stop, device=maps.device) + 0.5) * (
        maps.shape[1] / height
    ) - 0.5
    centre = centre.clamp(0, maps.shape[1] - 1)
    upper = centre.floor().long()
    lower = (upper + 1).clamp(max=maps.shape[1] - 1)
    weight = (centre - upper).to(maps.dtype)[:, None]
    mixed = maps[:, upper] * (1 - weight) + maps[:, lower] * weight
    return functional.interpolate(mixed[None], size=(len(centre), width), mode="bilinear")[0]
