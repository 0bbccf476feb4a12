"""What a segmentor's forward launches on a GPU, and that nothing in it waits for one."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.nn import functional

from bench.measure import launches
from bench.report import predicted, results_data
from bench.rows.pictures import clip_segmentor
from fsa import hosts
from fsa.models.guides import load_vfm
from fsa.models.timm_tower import tower_of
from tests.support.timm_models import FAMILIES, random_timm_model

if torch.__version__ < (2, 11):
    # Of torch 2.6 tensors that exist in name only look for a GPU, and Triton 3.2's interpreted
    # kernels cannot be told apart from others.
    pytest.skip("launches are counted with torch 2.11 or newer", allow_module_level=True)

SIDE = 32
# Launches of the baseline, and how many feedback adds.
COUNTS = {
    "clip": (137, 22),
    "maskclip": (136, 20),
    "sclip": (139, 24),
    "clearclip": (129, 12),
    "proxyclip": (263, 8),
    "naclip": (142, 12),
    "segearth": (146, 16),
    "pearl": (189, 12),
    "qk": (129, 12),
    "qq": (129, 12),
    "kk": (129, 12),
    "vv": (129, 12),
}


def tower() -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = VisionTransformer(
            image_size=SIDE, patch_size=8, width=24, layers=3, heads=3, mlp_ratio=2.0, output_dim=16
        )
    return visual.eval().requires_grad_(False)


def layer(visual: VisionTransformer, host: str):
    """CLIP's own features for ProxyCLIP; None for the others."""
    if not hosts.host_class(host).needs_vfm:
        return None
    return load_vfm("layer", tower=tower_of(visual), mean=(0.0,) * 3, std=(1.0,) * 3)


def counted(host, feedback: bool = True) -> Counter[str]:
    visual = tower()
    return launches.launches(host, visual, layer(visual, host), feedback, side=SIDE, C=5).counts


@pytest.mark.parametrize("host", hosts.names())
def test_a_forward_can_be_captured_and_feedback_adds_few_launches(host):
    visual, vfm = launches.models("ViT-B/16", host)
    # Raises where the forward would wait for the device.
    off, on = (
        launches.launches(host, visual, vfm, feedback, side=336).counts.total()
        for feedback in (False, True)
    )
    assert (off, on - off) == COUNTS[host]


@pytest.mark.parametrize("more", [0, 2], ids=["trained grid", "larger grid"])
@pytest.mark.parametrize("host", ["clip", "clearclip", "proxyclip", "segearth", "pearl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_of_every_family_of_timm_can_be_captured(family, host, more):
    visual = random_timm_model(family)
    side = FAMILIES[family].side + more * FAMILIES[family].patch
    for feedback in (False, True):
        vfm = layer(visual, host)
        # Raises where the forward would wait for the device.
        found = launches.launches(host, visual, vfm, feedback, side=side, C=5)
        # A product is an op each, two in every block and those around the last attention.
        assert found.counts["aten::addmm"] + found.counts["aten::mm"] > 2 * tower_of(visual).layers


@pytest.mark.parametrize("feedback", [False, True], ids=["host", "host + FSA"])
@pytest.mark.parametrize("host", hosts.names())
def test_the_kernels_counted_are_those_that_run(host, feedback, monkeypatch):
    visual = tower()
    text = functional.normalize(torch.randn(5, 16), dim=-1)
    built = hosts.build(host, visual, backend="triton")
    segmentor = clip_segmentor(host, visual, text, layer(visual, host), feedback)
    monkeypatch.setattr(segmentor, "host", built)
    ran = Counter()
    with launches.triton_launches(lambda name, _: ran.update([name]), run=True):
        segmentor.forward(torch.randn(1, 3, SIDE, SIDE), text)
    kernels = Counter()
    for name, count in counted(host, feedback).items():
        if name.endswith("_kernel"):
            kernels[name.rpartition(" ")[2]] += count
    assert kernels == ran
    assert bool(ran) == (feedback or host == "proxyclip")


def reads_a_number(block):
    return block.query.new_ones(()).item()


def asks_where(block):
    return block.query.nonzero()


def selects_by_mask(block):
    return block.query[block.query > 0]


def copies_to_the_host(block):
    return block.query.cpu()


def makes_a_tensor_on_the_host(block):
    return torch.tensor([1.0, 2.0], device=block.query.device)


def takes_a_constant_of_the_host(block):
    return block.query + torch.zeros(()).to(block.query)


@pytest.mark.parametrize(
    "function",
    [
        reads_a_number,
        asks_where,
        selects_by_mask,
        copies_to_the_host,
        makes_a_tensor_on_the_host,
        takes_a_constant_of_the_host,
    ],
    ids=lambda function: function.__name__,
)
def test_what_waits_for_the_device_is_found(function):
    def attention(block):
        function(block)
        query, key = (t[:, :, block.prefix_tokens :] for t in (block.query, block.key))
        return (query @ key.transpose(2, 3)).softmax(dim=-1)

    with pytest.raises(launches.Synchronises):
        counted(attention)


def test_views_and_memory_set_aside_are_no_launches():
    def attention(block):
        query, key = (t[:, :, block.prefix_tokens :] for t in (block.query, block.key))
        for tensor in (query, key):
            tensor.transpose(1, 2).unflatten(3, (-1, 2)).expand(1, -1, -1, -1, 4, 2)
            torch.empty_like(tensor).permute(3, 2, 1, 0)[None, ..., ::2]
        return (query @ key.transpose(2, 3)).softmax(dim=-1)

    def plain(block):
        query, key = (t[:, :, block.prefix_tokens :] for t in (block.query, block.key))
        return (query @ key.transpose(2, 3)).softmax(dim=-1)

    assert counted(attention) == counted(plain)


def test_what_feedback_adds_is_said_op_by_op():
    off, on = Counter({"a": 2, "b": 1}), Counter({"a": 3, "c": 2})
    assert launches.added(off, on) == {"a": 1, "b": -1, "c": 2}
    text = launches.report({"someclip": (off, on)})
    assert text.splitlines()[1].split() == ["someclip", "3", "5", "2"]
    assert "   -1 b" in text


def test_the_committed_counts_are_the_present_ones():
    committed = results_data.load("launches")["backbones"]["ViT-B/16"]
    assert {
        host: tuple(sum(modes[mode]["launches"].values()) for mode in ("off", "on"))
        for host, modes in committed.items()
    } == {host: (off, off + added) for host, (off, added) in COUNTS.items()}


def test_work_is_counted_from_shapes():
    visual, C, N, E = tower(), 5, 16, 16
    found = launches.launches("proxyclip", visual, layer(visual, "proxyclip"), True, side=SIDE, C=C)
    work = {one.name: one for one in found.work}
    ours = work["fsa::feedback_attention"]
    # Three products of halves for the similarity, two for the predictions.
    assert ours.products == 6 * N * N * C + 4 * N * E * C
    assert ours.operations == launches.OPERATIONS_AN_ENTRY * N * N
    assert work["fsa::proxy_prepare"].products == 2 * N * N * 24
    assert work["fsa::proxy_apply"].products == work["fsa::proxy_gather"].products == 2 * N * N * 24
    # Similarities are written, and read and written again; besides them there is little.
    assert ours.bytes > 3 * 4 * N * N
    products = {one.name: count * one.products for one, count in found.work.items()}
    assert products["aten::convolution"] == 2 * N * 24 * 3 * 8 * 8
    # The product of A_f with V and A V beside each other, and its result.
    (product,) = (one for one in found.work if one.products == 2 * N * N * 48)
    assert product.name == "aten::bmm"
    assert product.bytes == 2 * (N * N + 2 * N * 48)
    attention = torch.ops.aten._native_multi_head_attention.default
    tokens = torch.empty(2, 7, 10)
    by_hand = 2 * (4 * 2 * 7 * 10 * 10 + 2 * 2 * 7 * 7 * 10)
    assert launches._products(attention, (tokens, tokens, tokens, 10, 2), {}, tokens) == by_hand
    # Each launch is somebody's, and this library's ops count once for all of theirs.
    kernels = sum(count for name, count in found.counts.items() if name.startswith("fsa::"))
    assert found.work.total() == found.counts.total() - kernels + 4


def test_an_op_of_ours_whose_work_is_unknown_is_named():
    with pytest.raises(LookupError, match="fsa::other"):
        launches._our_work("fsa::other", ())


def test_predictions_come_from_counts():
    def forward(launched, *work):
        return {"launches": {"a": launched}, "work": [["a", *work]]}

    # 2 launches that move 4.3 MB each take 1 us each; 790 MFLOP take 1 us.
    off, on = forward(2, 2, 4_300_000, 1, 0), forward(3, 1, 8_600_000, 3_160_000_000, 0)
    record = {"backbones": {"ViT-B/16": {"clearclip": {"off": off, "on": on}}}}
    (one,) = predicted.predictions(record)
    assert (one.host, one.backbone) == ("clearclip", "ViT-B/16")
    assert one.off.floor == pytest.approx(2e-6)
    assert one.on.floor == pytest.approx(4e-6)
    assert one.overhead(0) == pytest.approx(100)
    assert one.overhead(1e-6) == pytest.approx(75)
    assert predicted.predictions(None) == []


def test_an_op_that_cannot_be_opened_is_named(monkeypatch):
    monkeypatch.setattr(launches, "_maybe_get_opdef", lambda op: None)
    with pytest.raises(LookupError, match=r"fsa\.gather"):
        counted("clearclip")


def test_the_models_that_are_counted_are_no_copies():
    """Their weights are replaced, so that a tower that is used elsewhere must be copied first."""
    visual = tower()
    spare = copy.deepcopy(visual)
    launches.launches("clearclip", visual, None, False, side=SIDE, C=5)
    assert visual.conv1.weight.device.type == "cuda"
    assert spare.conv1.weight.device.type == "cpu"
