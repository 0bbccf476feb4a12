from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fsa
from fsa.errors import NotFiniteError
from fsa.models.text import TextQueries
from fsa.pictures.resizing import upsampled_rows
from fsa.segment import labels
from fsa.segment.labels import class_probabilities, label_map, require_finite

# The class of each query: one name a class, synonyms, and names that are not in order.
INDICES = {
    "names": list(range(9)),
    "synonyms": [0, 0, 1, 2, 2, 2, 3, 4, 4],
    "mixed": [3, 0, 1, 0, 2, 4, 3, 1, 0],
}


def queries_of(index):
    return TextQueries(
        features=torch.zeros(len(index), 4),
        class_index=torch.tensor(index),
        names=tuple(f"class {number}" for number in range(max(index) + 1)),
    )


def cosines_of(count, height, width, seed=0):
    return torch.randn(count, height, width, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("size", [(13, 17), (50, 31), (7, 9), (301, 200)])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("scale", [10.0, 40.0, 1000.0])
def test_labels_without_a_softmax_are_those_with_it(index, size, scale, monkeypatch):
    queries, cosines = queries_of(index), cosines_of(9, 13, 17)
    maps = upsampled_rows(cosines.double(), size, slice(0, size[0]))
    best, second = class_probabilities(maps, queries, scale).topk(2, dim=0).values
    expected = class_probabilities(maps, queries, scale).argmax(dim=0)
    found = label_map(cosines, queries, size, 0.0, None, scale=scale)
    assert found.dtype == torch.int32
    # Nothing but what float32 cannot tell apart may differ, and of that there is next to nothing.
    differing = found != expected
    assert (best - second)[differing].lt(1e-4).all()
    assert differing.double().mean() < 1e-3
    monkeypatch.setattr(labels, "_STRIP_ENTRIES", 9 * size[1] * 2)
    strips = label_map(cosines, queries, size, 0.0, None, scale=scale)
    assert (strips != found).double().mean() < 1e-3


@pytest.mark.parametrize("index", [INDICES["names"], INDICES["synonyms"]])
def test_of_equal_cosines_the_first_class_counts_as_with_a_softmax(index):
    cosines = (cosines_of(9, 60, 70) * 16).round() / 16
    queries = queries_of(index)
    probabilities = class_probabilities(cosines, queries)
    ties = (probabilities == probabilities.amax(dim=0)).sum(dim=0) > 1
    assert ties.double().mean() > 0.1
    found = label_map(cosines, queries, (60, 70), 0.0, None)
    assert torch.equal(found.long(), probabilities.max(dim=0).indices)


def test_a_background_is_still_a_matter_of_probabilities():
    cosines, queries = cosines_of(9, 13, 17), queries_of(INDICES["synonyms"])
    best, index = class_probabilities(cosines, queries).max(dim=0)
    expected = torch.where(best < 0.5, 3, index)
    assert 0.1 < (best < 0.5).double().mean() < 0.9
    assert torch.equal(label_map(cosines, queries, (13, 17), 0.5, 3).long(), expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the entries of the largest tensor that any operation makes, views left aside."""

    def __init__(self, given):
        super().__init__()
        self.entries = 0
        self.given = given.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if tensor.untyped_storage().data_ptr() != self.given:
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("background", [None, 0])
@pytest.mark.parametrize("size", [(30000, 64), (64, 30000), (16, 4)])
def test_memory_is_bounded_whatever_the_shape(size, background):
    height, width = (max(2, side // 20) for side in size)
    # The last picture is smaller than its map of cosines.
    height, width = (300, 100) if size == (16, 4) else (height, width)
    cosines = cosines_of(200, height, width)
    queries = queries_of(list(range(200)))
    with LargestTensor(cosines) as largest:
        label_map(cosines, queries, size, 0.3, background)
    one_row = 200 * max(size[1], width)
    assert largest.entries <= max(2 * labels._STRIP_ENTRIES, 2 * one_row, size[0] * size[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_single_cosine_that_is_not_finite_is_an_error(value):
    cosines = cosines_of(3, 5, 7)
    require_finite(cosines)
    cosines[1, 4, 2] = value
    with pytest.raises(NotFiniteError):
        require_finite(cosines)


def test_scores_are_computed_when_they_are_asked_for(monkeypatch):
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return class_probabilities(*arguments)

    monkeypatch.setattr("fsa.segment.probabilities.class_probabilities", counting)
    segmentor = fsa.load_segmentor(device="cpu")
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    result = segmentor.segment(picture, [["cat", "hound"], "dog"], short_side=48, window=48)
    result.areas()
    assert calls == []
    scores = result.scores
    assert scores.shape == (2, 48, 72)
    assert scores.dtype == np.float32
    assert (scores.sum(axis=0) <= 1 + 1e-6).all()
    assert result.scores is scores
    assert len(calls) == 1


def test_a_result_can_be_pickled():
    segmentor = fsa.load_segmentor(device="cpu")
    result = segmentor.segment(np.zeros((32, 32, 3), np.uint8), ["cat", "dog"])
    again = pickle.loads(pickle.dumps(result))
    assert np.array_equal(again.labels, result.labels)
    assert np.array_equal(again.scores, result.scores)
