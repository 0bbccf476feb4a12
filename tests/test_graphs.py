"""CUDA graphs of the segmentor's forward; capturing itself needs a GPU."""

from __future__ import annotations

import pytest
import torch

import fsa
from fsa import InputError, graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="capturing needs a GPU")


def test_graphs_are_for_gpus():
    with pytest.raises(InputError, match="cuda_graph=True needs a CUDA device"):
        fsa.load_segmentor(device="cpu", cuda_graph=True)


def test_one_graph_for_each_combination_of_shapes_and_the_oldest_goes(monkeypatch):
    captured = []

    def capture(function, tensors):
        captured.append([tuple(tensor.shape) for tensor in tensors])
        return function

    monkeypatch.setattr(graphs, "capture", capture)
    run = graphs.GraphCache(lambda a, b: a.sum() + b.sum(), capacity=2)
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(4)
    assert run(a, b) == 5
    assert run(a, b) == run(2 * a, b) - 2
    assert captured == [[(2,), (3,)]]
    run(b, a)
    run(a, b)  # Used again: now (b, a) is the oldest.
    run(c, a)
    run(a, b)
    assert len(captured) == 3
    run(b, a)
    assert len(captured) == 4
    assert len(run) == 2


@needs_gpu
@pytest.mark.parametrize("host", ["maskclip", "sclip", "clearclip", "proxyclip"])
def test_a_segmentor_gives_the_same_from_graphs(host):
    picture = torch.randint(0, 256, (3, 200, 260), dtype=torch.uint8)
    classes = ["cat", "dog", "grass"]
    plain = fsa.load_segmentor(host=host).segment(picture, classes)
    segmentor = fsa.load_segmentor(host=host, cuda_graph=True)
    for _ in range(2):
        result = segmentor.segment(picture, classes)
        assert (result.labels == plain.labels).mean() > 0.999
    # A full batch of windows, and what is left over.
    assert len(segmentor.graphs) <= 2
