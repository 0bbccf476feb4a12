"""CUDA graphs of the segmentor's forward; capturing itself needs a GPU.

Without one, a stand-in for PyTorch's graphs writes down the ops of a capture and does them again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fsa
from bench.rows.pictures import clip_segmentor
from fsa import InputError, hosts
from fsa.models.guides import load_vfm
from fsa.models.timm_tower import tower_of
from fsa.segment import graphs
from tests.support.timm_models import FAMILIES, random_timm_model

needs_gpu = pytest.mark.gpu


def test_graphs_are_for_gpus():
    with pytest.raises(InputError, match="cuda_graph=True needs a CUDA device"):
        fsa.load_segmentor(device="cpu", cuda_graph=True)


class Recorder(TorchDispatchMode):
    """Takes the place of a CUDA graph, on the CPU: the same ops on the same memory, again."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = []
        self.captures = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, places in self.ops:
            again = func(*args, **kwargs)
            for place, tensor in zip(tree_leaves(places), tree_leaves(again), strict=True):
                # Views lie where they lay.
                if tensor.untyped_storage()._cdata != place.untyped_storage()._cdata:
                    with torch.inference_mode():
                        place.copy_(tensor)

    def pool(self):
        return id(self)


class Pretended:
    """The current stream, and the pools that captures were asked to share."""

    def __init__(self) -> None:
        self.stream = SimpleNamespace(wait_stream=lambda other: self.waits.append(other))
        self.waits = []
        self.pools = []

    def set_stream(self, stream):
        self.stream = stream

    def graph(self, recorder, *, pool, stream, capture_error_mode):
        self.pools.append(pool)
        return CapturingStream(self, recorder, stream)


class CapturingStream:
    """As PyTorch's: where the capture fails, its stream stays the current one."""

    def __init__(self, pretended, recorder, stream):
        self.pretended, self.recorder, self.stream = pretended, recorder, stream

    def __enter__(self):
        self.before = self.pretended.stream
        self.pretended.stream = self.stream
        self.recorder.__enter__()

    def __exit__(self, kind, error, trace):
        self.recorder.__exit__(kind, error, trace)
        if kind is RuntimeError:
            raise RuntimeError("capture was invalidated")
        self.pretended.stream = self.before


@pytest.fixture
def pretended(monkeypatch):
    pretended = Pretended()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", pretended.graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pretended.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", pretended.set_stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    return pretended


def add(a, b):
    return a.sum() + b.sum()


def test_one_graph_for_each_combination_of_shapes_and_the_oldest_goes(pretended):
    calls = []

    def function(a, b):
        calls.append((len(a), len(b)))
        return add(a, b)

    run = graphs.GraphCache(function, capacity=2)
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(4)
    assert run(a, b) == 5
    assert run(2 * a, b) == 7
    assert set(calls) == {(2, 3)}
    run(b, a)
    run(a, b)  # Used again: now (b, a) is the oldest.
    run(c, a)
    run(a, b)
    assert len(pretended.pools) == 3
    run(b, a)
    assert len(pretended.pools) == 4
    assert len(run) == 2


def test_a_result_is_not_overwritten_by_the_next_call(pretended):
    run = graphs.GraphCache(torch.neg)
    first = run(torch.ones(3))
    run(torch.zeros(3))
    assert torch.equal(first, -torch.ones(3))


def test_types_and_devices_have_graphs_of_their_own(pretended):
    run = graphs.GraphCache(torch.neg)
    for tensor in (torch.ones(3), torch.ones(3).double(), torch.ones(3, device="meta")):
        result = run(tensor)
        assert (result.dtype, result.device) == (tensor.dtype, tensor.device)
    assert len(run) == 3
    # Memory is shared on one device only.
    assert [pool is None for pool in pretended.pools] == [True, False, True]


def test_a_graph_made_in_inference_mode_is_of_use_outside(pretended):
    run = graphs.GraphCache(torch.neg)
    with torch.inference_mode():
        run(torch.ones(3))
    assert torch.equal(run(2 * torch.ones(3)), -2 * torch.ones(3))
    with torch.inference_mode():
        assert torch.equal(run(3 * torch.ones(3)), -3 * torch.ones(3))


def test_a_segmentor_is_the_same_from_a_graph(pretended, monkeypatch):
    # The CPU looks for NaN, and reads a number for it; a GPU's forward does not.
    monkeypatch.setattr("fsa.ops.library.check_finite_product", lambda *_: None)
    segmentor = fsa.load_segmentor(device="cpu")
    graphed = segmentor.with_feedback(True)
    graphed.graphs = graphs.GraphCache(graphed.forward)
    for seed in range(3):
        picture = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(seed))
        eager, replayed = (
            one.segment(picture, ["cat", "dog"], short_side=64, window=64, stride=32)
            for one in (segmentor, graphed)
        )
        assert np.array_equal(replayed.scores, eager.scores)
    assert len(pretended.pools) == 1


def tower_of_timm(family, host="clearclip", device="cpu", dtype=torch.float32):
    """A segmentor on a small tower with random weights, texts, and windows of two grids."""
    visual = random_timm_model(family, dtype).to(device)
    tower = tower_of(visual)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(5, tower.output_dim, generator=generator)
    text = torch.nn.functional.normalize(text, dim=-1).to(device)
    guide = None
    if hosts.host_class(host).needs_vfm:
        guide = load_vfm("layer:1", tower=tower, mean=(0.0,) * 3, std=(1.0,) * 3)
    segmentor = clip_segmentor(host, visual, text, guide, feedback=True)
    sides = [FAMILIES[family].side + more * FAMILIES[family].patch for more in (0, 2)]
    windows = [torch.randn(2, 3, side, side, generator=generator) for side in sides for _ in "ab"]
    return segmentor, text, [window.to(device, dtype) for window in windows]


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_of_timm_are_the_same_from_a_graph(family, pretended, monkeypatch):
    monkeypatch.setattr("fsa.ops.library.check_finite_product", lambda *_: None)
    segmentor, text, windows = tower_of_timm(family)
    run = graphs.GraphCache(segmentor.forward)
    for window in windows:
        assert torch.equal(run(window, text), segmentor.forward(window, text))
    assert len(run) == 2


@needs_gpu
@pytest.mark.parametrize("host", ["clearclip", "proxyclip", "segearth", "pearl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_towers_of_timm_give_the_same_from_graphs(family, host):
    segmentor, text, windows = tower_of_timm(family, host, "cuda", torch.float16)
    run = graphs.GraphCache(segmentor.forward)
    for window in windows:
        eager, replayed = segmentor.forward(window, text), run(window, text)
        assert eager.isfinite().all()
        assert (replayed.argmax(dim=1) == eager.argmax(dim=1)).float().mean() > 0.99
    assert len(run) == 2


def test_what_cannot_be_captured_is_said_and_leaves_the_stream_as_it_was(pretended):
    before = pretended.stream
    run = graphs.GraphCache(lambda a: a * (a.sum().item() if len(a) == 2 else 1))
    run(torch.ones(3))
    with pytest.raises(InputError, match="not permitted when stream is capturing"):
        run(torch.ones(2))
    assert pretended.stream is before
    # What shared its memory with that capture is made anew.
    assert torch.equal(run(torch.ones(3)), torch.ones(3))
    assert pretended.pools[-1] is None


def test_memory_that_runs_out_during_a_capture_is_called_that(pretended):
    def full(a):
        if pretended.pools:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return a

    with pytest.raises(torch.OutOfMemoryError):
        graphs.GraphCache(full)(torch.ones(2))


def test_another_stream_waits_for_the_one_before(pretended):
    run = graphs.GraphCache(torch.neg)
    run(torch.ones(2))
    first = pretended.stream
    run(torch.ones(2))
    assert first not in pretended.waits
    pretended.stream = SimpleNamespace(wait_stream=pretended.waits.append)
    run(torch.ones(2))
    assert pretended.waits[-1] is first


def test_threads_take_turns(pretended):
    run = graphs.GraphCache(lambda a: a * 2 + 1)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda i: run(torch.full((1000,), float(i))), range(64))
        assert all(torch.equal(r, torch.full((1000,), 2.0 * i + 1)) for i, r in enumerate(results))


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
