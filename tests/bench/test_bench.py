"""Rows of every kind run and are recorded, whatever happens; contenders compute the same thing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch.nn import functional

import fsa
from bench import RESULTS, ROOT, environment
from bench.__main__ import COMMANDS
from bench.measure import memory, numerics, rehearsal, runner, timing
from bench.measure.worker import DeviceLost, Worker, measure
from bench.report import marks, paper, plots, results_data, tables
from bench.rows import algebra, contenders, dtypes, published, registry
from bench.rows import op as rows
from bench.rows.contenders import DoesNotFit, Job, Row
from bench.rows.hosts import HostRow
from bench.rows.op import OpRow
from bench.rows.pictures import PictureRow
from bench.rows.published_hosts import PublishedHost
from fsa import FSAConfig, hosts, reference, tiny
from fsa.ops import torch_backend
from tests.support.accuracy import (
    MODEL_VECTORS,
    RELATIVE_ERROR,
    relative_error,
    unexplained_decisions,
    vector,
)

CPU = torch.device("cpu")
FLOAT = torch.float32
TOY_BACKBONE = "ViT-S-16-alt"
HOSTS = ("maskclip", "sclip", "clearclip", "proxyclip")


def toy(job: Job) -> dict:
    return measure(job, CPU, FLOAT)[0]


# --------------------------------------------------------------------------------------------------
# Contenders


@pytest.mark.parametrize("kind", ["op", "step"])
def test_all_contenders_agree_with_the_definition(kind):
    row = OpRow(kind, 2, 60, 9)
    inputs = rows.make_inputs(row, CPU, torch.float64)
    exact = reference.feedback_attention(inputs.patch_logits, inputs.uniform_logits)
    if kind == "step":
        exact = reference.adapt(inputs.value, exact, inputs.attention)
    builds = row.contenders(CPU, torch.float64, inputs)
    assert set(builds) == {"published", "algebra", "fsa torch"}
    for name, build in builds.items():
        # The plain algebra computes in float32.
        limit = RELATIVE_ERROR[torch.float32 if name == "algebra" else torch.float64]
        assert relative_error(build()(), exact) < limit, name


def test_the_compiled_contender_is_the_algebra_in_one_graph(monkeypatch):
    # Without a compiler for C++, which not every machine has.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    row = OpRow("step", 1, 40, 5, compiled=True)
    inputs = rows.make_inputs(row, CPU, FLOAT)
    builds = row.contenders(CPU, FLOAT, inputs)
    with torch.no_grad():
        difference = relative_error(builds["torch.compile"]()(), builds["algebra"]()())
    assert difference < RELATIVE_ERROR[FLOAT]


def test_flashinfers_search_keeps_one_patch_more_in_each_row(monkeypatch):
    def top_p_renorm_probs(probabilities, p):
        """What FlashInfer documents: all from a threshold on, together at least p, renormalised."""
        ordered, order = probabilities.sort(dim=-1, descending=True)
        kept = ordered.cumsum(dim=-1) - ordered < p
        kept = torch.zeros_like(kept).scatter(-1, order, kept)
        masked = probabilities * kept
        return masked / masked.sum(dim=-1, keepdim=True)

    missing = dict.fromkeys(("flashinfer", "flashinfer.sampling"))
    row = OpRow("op", 2, 60, 9, compiled=True)
    inputs = rows.make_inputs(row, CPU, FLOAT)
    for name, module in missing.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(contenders.NotInstalled, match="flashinfer-python"):
        rows._flashinfer(row, inputs)()
    module = SimpleNamespace(top_p_renorm_probs=top_p_renorm_probs)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(sampling=module))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", module)
    more = rows._flashinfer(row, inputs)() > 0
    sorted_out = algebra.feedback_attention(inputs.patch_logits, inputs.uniform_logits) > 0
    assert (more.sum(dim=-1) == sorted_out.sum(dim=-1) + 1).all()
    assert (more >= sorted_out).all()
    assert "flashinfer" in row.contenders(torch.device("cuda"), FLOAT, inputs)
    assert "flashinfer" not in row.contenders(CPU, FLOAT, inputs)


def test_published_adapt_takes_the_scaled_similarity():
    generator = torch.Generator().manual_seed(0)
    scaled = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    attention = torch.randn(8, 6, 6, generator=generator, dtype=torch.float64)
    value = torch.randn(8, 6, 3, generator=generator, dtype=torch.float64)
    adapted = published.adapt(value, scaled, attention)
    exact = reference.adapt(
        value.unflatten(0, (2, 4)), scaled.softmax(dim=-1), attention.unflatten(0, (2, 4))
    )
    assert relative_error(adapted.unflatten(0, (2, 4)), exact) < RELATIVE_ERROR[torch.float64]


def test_published_and_algebra_agree():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 30, 4, generator=generator)
    uniform = torch.randn(1, 1, 4, generator=generator)
    plain = published.feedback_attention(logits, uniform)
    assert relative_error(algebra.feedback_attention(logits, uniform), plain) < 1e-4


def test_logits_are_realistic():
    row = OpRow("op", 1, 441, 60)
    inputs = rows.make_inputs(row, CPU, torch.float64)
    probabilities = reference.isolated_probabilities(inputs.patch_logits, inputs.uniform_logits)
    kl = reference.divergence(probabilities)[0]
    off_diagonal = kl[~torch.eye(441, dtype=torch.bool)]
    low, high = off_diagonal.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64))
    assert 1e-3 < low < high < 5
    kept = reference.kept_patches(1 / (1 + kl[None]), FSAConfig())
    assert 0.2 < kept.double().mean() < 0.5


# --------------------------------------------------------------------------------------------------
# Published hosts


@pytest.mark.parametrize("feedback", [False, True], ids=["host", "host + FSA"])
@pytest.mark.parametrize("name", HOSTS)
def test_published_hosts_are_ours_to_rounding(name, feedback):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = VisionTransformer(
            image_size=32, patch_size=8, width=24, layers=3, heads=3, mlp_ratio=2.0, output_dim=16
        )
    visual = visual.eval().requires_grad_(False).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, 32, 40, generator=generator, dtype=torch.float64)
    text = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    text = functional.normalize(text, dim=-1)
    vfm = None
    if name == "proxyclip":
        vfm = torch.randn(1, 10, 5, 6, generator=generator, dtype=torch.float64)
    config = FSAConfig(beta=2.3) if feedback else None
    ours = hosts.build(name, visual).features(images, text, vfm_features=vfm, config=config)
    theirs = PublishedHost(name, visual)(
        images, text, vfm_features=vfm, feedback=feedback, beta=2.3
    )
    assert relative_error(theirs, ours) < 1e-10


@pytest.mark.parametrize("feedback", [False, True], ids=["host", "host + FSA"])
@pytest.mark.parametrize("name", MODEL_VECTORS)
def test_published_proxyclip_gives_the_published_outputs(name, feedback):
    data = vector(name)
    sizes = ("image_size", "patch_size", "width", "layers", "heads", "output_dim")
    visual = VisionTransformer(**{key: int(data[key]) for key in sizes}, mlp_ratio=4.0).eval()
    prefix = "state/"
    state = {key[len(prefix) :]: data[key] for key in data if key.startswith(prefix)}
    visual.load_state_dict(state)
    features = PublishedHost("proxyclip", visual.double())(
        data["image"],
        data["text_features"],
        vfm_features=data["vfm_features"],
        feedback=feedback,
        beta=float(data["beta"]),
    )
    expected = data["features_proxy_fsa" if feedback else "features_proxy"]
    assert relative_error(features, expected) < 1e-12


# --------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (OpRow("op", 2, 16, 3), {"published", "algebra", "fsa torch"}),
        (OpRow("step", 1, 16, 3), {"published", "algebra", "fsa torch"}),
        (HostRow("clearclip", TOY_BACKBONE, side=64, C=3), set(tables.MODES)),
        (HostRow("proxyclip", TOY_BACKBONE, side=32, C=3), set(tables.MODES)),
        (PictureRow("sclip", TOY_BACKBONE, 112, 144, 112, 56, 3), set(tables.MODES)),
    ],
    ids=lambda value: value.name if isinstance(value, Row) else "",
)
def test_a_row_of_every_kind_is_timed(row, names, monkeypatch):
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    record = toy(Job(row, ("time",)))
    assert set(record["contenders"]) == names
    for name, entry in record["contenders"].items():
        assert 0 < entry["series"]["p20"] <= entry["series"]["median"] <= entry["series"]["p80"], (
            name
        )
    assert record["name"] == row.name


def test_memory_of_both_ways_of_the_step_is_measured(monkeypatch):
    taken = []
    monkeypatch.setattr(
        memory, "peak_extra_bytes_cpu", lambda row, name, dtype: taken.append(name) or 1
    )
    record = toy(Job(OpRow("step", 1, 8192, 171, ways=True), ("memory",)))
    assert {"fsa stored", "fsa streamed"} <= set(taken) == set(record["contenders"])
    assert not {"fsa stored", "fsa streamed"} & set(OpRow("step", 1, 64, 3).contenders(CPU, FLOAT))


def test_both_ways_of_the_step_are_the_same():
    row = OpRow("step", 1, 80, 5, ways=True)
    inputs = row.inputs(CPU, FLOAT)
    builds = row.contenders(CPU, FLOAT, inputs)
    stored = builds["fsa stored"]()()
    assert relative_error(builds["fsa streamed"]()(), stored) < RELATIVE_ERROR[FLOAT]


@pytest.mark.parametrize("kind", ["op", "step"])
def test_numerics_are_recorded_and_within_the_limits(kind):
    record = toy(Job(OpRow(kind, 3, 50, 7), ("numerics",)))
    for name, entry in record["contenders"].items():
        found = entry["numerics"]
        assert found["relative_error"] < RELATIVE_ERROR[FLOAT], name
        assert ("decisions_that_differ" in found) == (kind == "op")
        assert not numerics.beyond_limits(name, found, FLOAT)


@pytest.mark.parametrize("judged", [8, 50], ids=["some rows", "all rows"])
@pytest.mark.parametrize("kind", ["op", "step"])
def test_what_is_judged_by_is_the_definition(kind, judged, monkeypatch):
    monkeypatch.setattr(numerics, "_JUDGED_WHOLE", 40 if judged == 8 else 50)
    monkeypatch.setattr(numerics, "_JUDGED_ROWS", 8)
    row = OpRow(kind, 3, 50, 7)
    inputs = row.inputs(CPU, torch.float64)
    against = numerics.exact(row, inputs)
    definition = reference.feedback_attention(inputs.patch_logits, inputs.uniform_logits)
    if kind == "step":
        definition = reference.adapt(inputs.value, definition, inputs.attention)
    assert against.images == [0, 2]
    assert len(against.patches) == judged
    assert {0, 49} <= set(against.patches.tolist())
    expected = definition[against.images].index_select(-2, against.patches)
    assert relative_error(against.result, expected) < 1e-10
    found = numerics.judge(definition, against)
    assert found["relative_error"] < 1e-10
    assert found.get("judged_rows", 50) == judged
    # An error in a row that is judged is seen.
    spoilt = definition.clone()
    spoilt[2].select(-2, 49).zero_()
    assert numerics.judge(spoilt, against)["relative_error"] > 1e-3


@pytest.mark.parametrize("host", ["clearclip", "proxyclip"])
def test_a_host_may_err_twice_as_much_as_plain_pytorch(host):
    row = HostRow(host, TOY_BACKBONE, side=64, C=3)
    record = toy(Job(row, ("numerics",)))
    assert set(record["contenders"]) == set(tables.MODES)
    for name, entry in record["contenders"].items():
        assert entry["numerics"]["relative_error"] < entry["numerics"]["limit"], name
    assert runner.complaints({"rows": [record]}) == []
    inputs = row.inputs(CPU, FLOAT)
    judge = numerics.judge_for(row, inputs)
    features = row.contenders(CPU, FLOAT, inputs)["fsa on"]()()
    assert not numerics.beyond_limits("fsa on", judge("fsa on", features), FLOAT)
    for wrong in (features * 1.001, features * float("nan"), features.roll(1, dims=1)):
        assert numerics.beyond_limits("fsa on", judge("fsa on", wrong), FLOAT)
    # Without feedback is another result.
    assert numerics.beyond_limits("fsa off", judge("fsa off", features), FLOAT)


def test_an_entry_that_rounds_to_zero_is_no_decision():
    exact = torch.tensor([[[0.7, 0.3, 1e-12], [0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]]).double()
    # What is kept follows from the similarities: two of three in the first row and so on.
    against = numerics.Exact([0], torch.arange(3), exact, torch.rand(1, 3, 3).double())
    half = exact.half()
    assert half[0, 0, 2] == 0
    assert numerics.judge(half, against)["decisions_that_differ"] == 0
    half[0, 1, 0] = 0
    assert numerics.judge(half, against)["decisions_that_differ"] == pytest.approx(1 / 9)


def test_only_near_ties_at_the_rows_threshold_may_be_decided_by_rounding():
    row = torch.linspace(0.9, 0.1, 12, dtype=torch.float64)
    kept = reference.kept_patches(row[None, None], FSAConfig())[0, 0]
    lowest = int(kept.sum()) - 1

    def unexplained(gap: float) -> int:
        similarities = row.clone()
        similarities[lowest + 1] = similarities[lowest] - gap
        swapped = kept.clone()
        swapped[[lowest, lowest + 1]] = swapped[[lowest + 1, lowest]]
        return unexplained_decisions(swapped[None, None], similarities[None, None], FSAConfig())

    assert unexplained(1e-7) == 0
    assert unexplained(1e-3) == 2


def test_limits_hold_for_this_library_only():
    bad = {"relative_error": 0.1, "unexplained_decisions": 2}
    assert len(numerics.beyond_limits("fsa triton", bad, FLOAT)) == 2
    assert numerics.beyond_limits("fsa torch", {"relative_error": float("nan")}, FLOAT)
    assert numerics.beyond_limits("published", bad, FLOAT) == []


def test_memory_of_the_torch_path_stays_below_four_matrices():
    N = 2048
    taken = memory.peak_extra_bytes_cpu(OpRow("op", 1, N, 171), "fsa torch")
    # The result alone is one matrix; less would mean that nothing was measured.
    assert 0.9 * N * N * 4 < taken < 4 * N * N * 4


def test_memory_of_what_does_not_fit_is_refused_in_words():
    with pytest.raises(DoesNotFit, match="GiB"):
        memory.peak_extra_bytes_cpu(OpRow("op", 1, 100_000, 2), "published")


# --------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Mishaps(Row):
    """Contenders that fail in every way."""

    kind: str = "op"
    name: str = "mishaps"

    def small(self):
        return self

    def contenders(self, device, dtype):
        def raises():
            raise ValueError("no such luck")

        def full():
            raise DoesNotFit("needs 9 GiB")

        return {
            "fine": lambda: lambda: torch.ones(1),
            "cannot be built": raises,
            "raises": lambda: raises,
            "does not fit": full,
            "ends the process": lambda: lambda: os._exit(3),
            "never ends": lambda: lambda: time.sleep(600),
        }


@pytest.mark.slow
def test_a_crash_is_recorded_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(runner._PATIENCE, "cpu", 10.0)
    after = OpRow("op", 1, 16, 3)
    runner.run(
        [Job(Mishaps(), ("time",)), Job(after, ("time",)), Job(after, ("numerics",))],
        tmp_path / "cpu.json",
        device=CPU,
        dtype=FLOAT,
        budget=300,
    )
    record = results_data.load("cpu", tmp_path)
    first, second = results_data.rows(record, "op")
    entries = first["contenders"]
    assert entries["fine"]["series"]["median"] > 0
    assert "no such luck" in entries["cannot be built"]["error"]
    assert "no such luck" in entries["raises"]["error"]
    assert "9 GiB" in entries["does not fit"]["does_not_fit"]
    assert "exit code 3" in entries["ends the process"]["error"]
    assert "no sign of life" in entries["never ends"]["error"]
    assert {"series", "numerics"} <= set(second["contenders"]["fsa torch"])
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb"
    text = tables.fill(text, {"x": tables.speed_table(record)})
    assert "old" not in text
    assert f"| {after.name} |" in text
    assert text.endswith("<!-- end -->\nb")


def test_what_the_budget_interrupts_is_no_failure():
    working = Worker(CPU, FLOAT, patience=60)
    try:
        record = working.do(Job(OpRow("op", 1, 16, 3), ("time",)), deadline=time.monotonic() + 0.01)
    finally:
        working.stop()
    assert record["not_finished"]
    assert runner.complaints({"rows": [record]}) == []


REPLAY_SECONDS, drawing, StandIn = (
    rehearsal.REPLAY_SECONDS,
    rehearsal.drawing,
    rehearsal.StandIn,
)


@pytest.fixture
def pretended_gpu(monkeypatch):
    for owner, name, value in rehearsal.gpu_replacements():
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    return torch.device("cuda")


def test_on_a_gpu_there_are_three_figures_launches_and_memory(pretended_gpu):
    calls = {"a": lambda: torch.ones(3), "b": lambda: torch.zeros(3)}
    figures, spoilt = timing.time_calls(calls, pretended_gpu, graphs=True)
    assert not spoilt
    for entry in figures.values():
        assert {"series", "one_call", "graph", "launches"} == set(entry)
        assert entry["launches"] == 3
        assert entry["series"]["median"] > 0
        # Of one of the ten calls that a replay does.
        assert 1000 * REPLAY_SECONDS / 10 <= entry["graph"]["median"] < 1000 * REPLAY_SECONDS
    assert memory.peak_extra_bytes_cuda(calls["a"], pretended_gpu) == 64
    figures, _ = timing.time_calls(calls, pretended_gpu, graphs=False)
    assert "graph" not in figures["a"]
    figures, _ = timing.time_calls(calls, pretended_gpu, graphs=True, uncaptured=["a"])
    assert "graph" not in figures["a"]
    assert "graph" in figures["b"]


def test_long_calls_are_captured_alone(pretended_gpu):
    def slow():
        time.sleep(0.002)
        return torch.ones(1)

    figures, _ = timing.time_calls({"slow": slow}, pretended_gpu, graphs=True)
    assert figures["slow"]["launches"] == 30
    assert figures["slow"]["graph"]["median"] >= 1000 * REPLAY_SECONDS


@pytest.mark.parametrize(
    ("drawn", "count"),
    [
        (drawing(2), 2),
        ('"graph_1_node_0"[style="solid" shape="record" label="{\nMEMCPY\n| {{ID | node}}"];', 1),
        ('"graph_1_node_0"[style="solid" shape="record" label="{\nMEMSET\n| {{ID | node}}"];', 1),
        (drawing(0), None),
        ("another format", None),
    ],
)
def test_launches_are_the_kernels_copies_and_fills_of_a_drawing(drawn, count):
    class Graph:
        def debug_dump(self, path):
            Path(path).write_text(drawn)

    assert timing._launches(Graph()) == count


def test_without_a_drawing_the_profiler_counts(pretended_gpu, monkeypatch):
    class Profiler:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            kinds = (timing.DeviceType.CUDA,) * 4 + (timing.DeviceType.CPU,)
            return [SimpleNamespace(device_type=kind) for kind in kinds]

    def broken(activities):
        raise RuntimeError("CUPTI cannot be initialised")

    monkeypatch.setattr(StandIn, "debug_dump", lambda self, path: None)
    for profiler, count in ((Profiler, 4), (broken, None)):
        monkeypatch.setattr(timing, "profile", profiler)
        figures, _ = timing.time_calls({"a": lambda: torch.ones(3)}, pretended_gpu, graphs=True)
        assert figures["a"]["launches"] == count
        assert figures["a"]["graph"]["median"] > 0


def test_the_profiler_runs_a_call():
    calls = []
    assert timing.profiled_launches(lambda: calls.append(torch.ones(2) + 1), CPU) is None
    assert len(calls) == 1


def test_captures_that_keep_failing_are_not_tried_again(monkeypatch):
    sent = []

    class Connection:
        def send(self, content):
            sent.append(content)

        def poll(self, seconds):
            return True

        def recv(self):
            failed = {"graph": {"error": "not permitted"}}
            fine = {"graph": {"median": 1.0}}
            skip = sent[-1][2]
            entries = {"bad": {} if "bad" in skip else failed, "good": fine}
            return "done", ({"contenders": entries}, "bad" not in skip)

    monkeypatch.setattr(Worker, "_started", lambda self: Connection())
    working = Worker(CPU, FLOAT, patience=60)
    for _ in range(3):
        working.do(Job(OpRow("op", 1, 16, 3), ("time",)), deadline=time.monotonic() + 60)
    working.do(Job(OpRow("step", 1, 16, 3), ("time",)), deadline=time.monotonic() + 60)
    assert [uncaptured for _, _, uncaptured in sent] == [set(), set(), {"bad"}, set()]


@pytest.mark.parametrize("usable", [True, False])
def test_a_failed_capture_retires_the_process_only_where_it_is_spoilt(
    usable, pretended_gpu, monkeypatch
):
    real = timing.capture

    def refuse_some(call, device, calls):
        if call is refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return real(call, device, calls)

    def randn(size, device):
        if not usable:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly")
        return torch.ones(size)

    refused = torch.ones(3).sum
    monkeypatch.setattr(timing, "capture", refuse_some)
    monkeypatch.setattr(torch, "randn", randn)
    calls = {"a": refused, "b": torch.ones(3).max}
    figures, spoilt = timing.time_calls(calls, pretended_gpu, graphs=True)
    assert spoilt is not usable
    assert "not permitted" in figures["a"]["graph"]["error"]
    assert figures["a"]["series"]["median"] > 0
    assert figures["b"]["graph"]["median"] > 0


def test_a_lost_device_is_said_and_the_row_done_again(pretended_gpu, monkeypatch):
    def gone(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        measure(Job(Mishaps(), ("time",)), pretended_gpu, FLOAT)


class HereAndNow:
    """Does jobs in this process; takes the place of a worker."""

    def __init__(self, device, dtype, patience, prepare=None):
        self.device, self.dtype = device, dtype

    def do(self, job, deadline):
        record, spoilt = measure(job, self.device, self.dtype)
        assert not spoilt
        return record

    def stop(self):
        pass


@pytest.fixture
def toy_inputs(monkeypatch):
    """Every row computes a toy of its kind on the CPU, under its own name."""
    # By PyTorch: hundreds of times, the interpreter takes too long.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for owner, name, value in rehearsal.toy_replacements():
        monkeypatch.setattr(owner, name, value)
    # Hundreds of times in a process that holds a whole test suite.
    monkeypatch.setattr(contenders.gc, "collect", lambda *_: 0)


@pytest.mark.slow
def test_the_whole_run_on_a_gpu_from_rows_to_plots(
    pretended_gpu, toy_inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "Worker", HereAndNow)
    jobs = [*registry.MARKS_GPU, Job(OpRow("op", 8, 441, 21), ("time", "numerics", "memory"))]
    record = runner.run(
        jobs, tmp_path / "gpu.json", device=pretended_gpu, dtype=FLOAT, budget=600, commit="abc"
    )
    assert runner.complaints(record) == []
    assert [row["name"] for row in record["rows"]] == [job.row.name for job in jobs]
    measured = {"time": {"series", "one_call"}, "numerics": {"numerics"}, "memory": {"memory"}}
    for job, row in zip(jobs, record["rows"], strict=True):
        wanted = set().union(*(measured[measure] for measure in job.measures))
        wanted |= {"graph", "launches"} if job.row.graphs else set()
        for name, entry in row["contenders"].items():
            assert "not_installed" in entry or wanted <= set(entry), (row["name"], name, entry)
    of_steps = record["rows"][jobs.index(Job(jobs[7].row, jobs[-1].measures))]["contenders"]
    assert {*tables._ORDER, *tables._WAYS} - {"flashinfer"} == set(of_steps)
    assert set(record["rows"][0]["contenders"]) == set(tables._ORDER)

    record = results_data.load("gpu", tmp_path)
    assert all(mark.value is not None and mark.verdict for mark in marks.marks(record))
    made = tables.tables(None, record, *map(results_data.load, ("launches", "dtypes")))
    about_gpu = {name: text for name, text in made.items() if "cpu" not in name}
    assert [name for name, text in about_gpu.items() if text == tables.NOT_MEASURED] == []
    assert "failed" not in "".join(about_gpu.values())
    plots.draw(None, record, tmp_path / "cost.png")


def test_failures_and_inexactness_of_ours_are_complaints():
    record = toy(Job(OpRow("op", 1, 16, 3), ("numerics",)))
    assert runner.complaints({"rows": [record]}) == []
    entry = record["contenders"]["fsa torch"]
    entry["numerics"]["relative_error"] = 0.5
    entry["beyond_limits"] = runner._beyond(record, FLOAT)["fsa torch"]
    (complaint,) = runner.complaints({"rows": [record]})
    assert "relative error 5.0e-01" in complaint
    del entry["beyond_limits"]
    entry["error"] = "it broke"
    record["contenders"]["published"]["error"] = "it broke too"
    assert runner.complaints({"rows": [record]}) == ["op B=1 N=16 C=3, fsa torch: it broke"]
    entry["error"] = "it broke"
    entry["graph"] = {"error": "not captured"}
    record |= {"error": "no model", "exact": {"error": "no judge"}}
    assert runner.complaints({"rows": [record]}) == [
        "op B=1 N=16 C=3: no model",
        "op B=1 N=16 C=3, in float64: no judge",
        "op B=1 N=16 C=3, fsa torch: it broke; not captured",
    ]


def test_rows_beyond_the_budget_are_named_not_estimated(tmp_path):
    jobs = [Job(OpRow("op", 1, 16, 3), ("time",))]
    record = runner.run(
        jobs, tmp_path / "run.json", device=CPU, dtype=FLOAT, budget=-1, commit="abc"
    )
    assert record["environment"]["commit"] == "abc"
    assert record["not_begun"] == ["op B=1 N=16 C=3: time"]
    assert record["rows"] == []


def test_only_chooses_rows_and_measures():
    jobs = [
        Job(OpRow("op", 1, 16, 3), ("time", "numerics", "memory")),
        Job(OpRow("step", 1, 16, 3), ("time",)),
        Job(HostRow("sclip", "ViT-B/16"), ("time", "memory")),
    ]
    assert runner.narrowed(jobs, runner.ONLY) == jobs
    assert runner.narrowed(jobs, ["op"]) == jobs[:1]
    assert runner.narrowed(jobs, ["op", "step"]) == jobs[:2]
    assert runner.narrowed(jobs, ["op", "host", "memory"]) == [
        Job(jobs[0].row, ("time", "memory")),
        jobs[2],
    ]
    assert runner.narrowed(jobs, ["memory"]) == [
        Job(jobs[0].row, ("memory",)),
        Job(jobs[2].row, ("memory",)),
    ]


def test_results_without_git_and_without_proc(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(environment.subprocess, "run", missing)
    monkeypatch.setattr("pathlib.Path.read_text", missing)
    found = environment.environment(CPU)
    assert found["commit"] == "unknown"
    assert found["processor"]
    assert contenders.bytes_free(CPU) > 0


def test_a_session_is_what_contributors_are_told():
    commands = runner.session()
    assert commands == [
        "python -m pytest -n 0 tests/kernels tests/ops tests/segment/test_graphs.py",
        "python -m bench gpu --only op,step,memory,numerics",
        "python -m bench gpu --only host,picture",
        "python -m bench tables",
    ]
    assert "\n".join(commands) in (ROOT / "CONTRIBUTING.md").read_text()


def test_a_session_runs_every_test_that_needs_a_gpu():
    files = [str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")]
    need_one = [file for file in files if "pytest.mark." + "gpu" in (ROOT / file).read_text()]
    assert len(need_one) >= 3
    assert [file for file in need_one if not file.startswith(runner.GPU_TESTS)] == []


FILES_OF_TESTS = {
    "test_one.py": "import pytest\n@pytest.mark.slow\ndef test_a(): assert 0\n"
    "def test_b(): pass\ndef test_c(): assert 0\n",
    "test_two.py": "def test_d(): pass\ndef test_e(): assert 0\n",
}


def test_a_rehearsal_runs_the_first_test_of_each_file(tmp_path):
    for name, content in FILES_OF_TESTS.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow")
    options = ["-v", "-m", "not slow", "-p", "bench.measure.first_tests"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert re.findall(r"::(test_\w) PASSED", result.stdout) == ["test_b", "test_d"]


@pytest.mark.rehearsal
def test_a_session_is_rehearsed_from_end_to_end(tmp_path):
    before = {file: file.read_bytes() for file in RESULTS.iterdir()}
    result = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--rehearse", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["rehearsal"]
    assert {row["kind"] for row in record["rows"]} == {"op", "step", "host", "picture"}
    assert "**it is a rehearsal" in (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "cost.png").exists()
    assert {file: file.read_bytes() for file in RESULTS.iterdir()} == before


def test_a_rehearsal_cannot_become_a_result(monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: "abc1234")
    jobs = [Job(OpRow("op", 1, 16, 3), ("time",))]
    options = {"device": CPU, "dtype": FLOAT, "budget": -1}
    with pytest.raises(SystemExit, match="rehearsal"):
        runner.run(jobs, RESULTS / "toy.json", rehearsed=rehearsal.pretend, **options)
    assert not (RESULTS / "toy.json").exists()


def test_what_is_not_a_number_is_written_as_null(tmp_path):
    runner.write({"a": [float("nan"), 1.0]}, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": [None, 1.0]}


def test_the_registry_covers_what_is_asked_for():
    gpu = {job.row.name for job in registry.GPU}
    for kind in ("op", "step"):
        for N in (196, 441, 784, 1024, 1764, 4096, 8192):
            for C in (21, 150, 171, 847):
                assert {f"{kind} B={B} N={N} C={C}" for B in (1, 8, 40)} <= gpu
    for host, backbone in paper.LATENCY_MS:
        assert f"{host} {backbone} 336" in gpu
    cpu = {(job.row.name, measure) for job in registry.CPU for measure in job.measures}
    assert ("op B=1 N=16384 C=171", "memory") in cpu
    for N in (196, 784, 1764):
        for C in (21, 60, 150, 171):
            assert (f"step B=1 N={N} C={C}", "time") in cpu
    assert len({(job.row.name, job.measures) for job in registry.GPU}) == len(registry.GPU)


@pytest.mark.parametrize("name", sorted(set(COMMANDS)))
def test_every_command_is_there(name):
    module = __import__(COMMANDS[name], fromlist=["main"])
    assert callable(module.main)


TYPED = {
    "window": ("fsa off", "fsa on", "trunk"),
    "step": ("fsa step", "fsa step without", "products"),
}


@pytest.mark.parametrize(
    ("row", "part"),
    [(dtypes.WindowRow(TOY_BACKBONE, 32), "window"), (dtypes.TypedStepRow(32, 5), "step")],
    ids=["window", "step"],
)
def test_types_are_timed_beside_each_other(row, part, monkeypatch):
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    record = toy(Job(row, ("time",)))
    assert record["kind"] == "dtypes"
    assert set(record["contenders"]) == {
        f"{name}, {dtype}" for name in TYPED[part] for dtype in ("float32", "bfloat16")
    }
    assert all(entry["series"]["median"] > 0 for entry in record["contenders"].values())


@pytest.mark.parametrize("dtype", dtypes.TYPES, ids=str)
def test_the_step_without_takes_neither_units_nor_onednn(dtype, monkeypatch):
    asked = []
    for name, answer in (("bfloat16_units", ("AMX",)), ("float32_by_onednn", True)):
        monkeypatch.setattr(torch_backend, name, lambda name=name, answer=answer: answer)
    monkeypatch.setattr(
        torch_backend, "_onednn_product", lambda w, c: asked.append("oneDNN") or w @ c
    )
    builds = dtypes.TypedStepRow(300, 5).contenders(CPU, FLOAT)
    short = dtypes.short_name(dtype)
    with torch.inference_mode():
        builds[f"fsa step without, {short}"]()()
        assert asked == []
        builds[f"fsa step, {short}"]()()
    assert bool(asked) == (dtype == torch.float32)


def test_labels_in_half_precision_are_compared(monkeypatch, tmp_path):
    shipped = list(dtypes.pictures(None))
    assert len(shipped) == 18
    (tmp_path / "street/images").mkdir(parents=True)
    (tmp_path / "street/classes.txt").write_text("dog\ncat\n")
    Image.new("RGB", (70, 60), "green").save(tmp_path / "street/images/a.png")
    found = toy(registry.labels(tmp_path / "street")[0])
    # A result names the folder and does not say where it lies.
    assert (found["name"], found["folder"]) == ("labels clearclip street", "street")
    assert set(found["contenders"]) == {"bfloat16", "float16"}

    dtypes._exact_labels.cache_clear()
    exact = np.array([[0, 0], [1, 1]])
    labels = {
        "float32": [exact, exact],
        "bfloat16": [np.array([[0, 0], [1, 0]]), exact],
        "float16": [exact, exact],
    }

    def load_segmentor(host, dtype, **_):
        found = iter(labels[dtypes.short_name(dtype)])
        return SimpleNamespace(segment=lambda *_: SimpleNamespace(labels=next(found)))

    monkeypatch.setattr(fsa, "load_segmentor", load_segmentor)
    monkeypatch.setattr(dtypes, "pictures", lambda _: shipped[:2])
    record = toy(registry.labels()[0])
    assert {name: entry["labels"] for name, entry in record["contenders"].items()} == {
        "bfloat16": {"equal": 7 / 8, "lowest": 3 / 4},
        "float16": {"equal": 1, "lowest": 1},
    }
    dtypes._exact_labels.cache_clear()
    assert all("series" not in entry for entry in record["contenders"].values())


def test_types_have_their_tables():
    record = json.loads(json.dumps(made_up_record()))
    assert tables.tables(record, None)["dtypes-step"] == "not measured"

    def entries(names, ms):
        return {
            f"{name}, {dtype}": {"series": {"median": ms * (k + 1) * (j + 1)}}
            for k, name in enumerate(reversed(names))
            for j, dtype in enumerate(("bfloat16", "float32"))
        }

    types = {
        **record,
        "rows": [
            {"kind": "dtypes", "name": "window x", "contenders": entries(TYPED["window"], 10)},
            {"kind": "dtypes", "name": "step y", "N": 784, "contenders": entries(TYPED["step"], 5)},
            {
                "kind": "dtypes",
                "name": "labels sclip street",
                "host": "sclip",
                "folder": "street",
                "contenders": {"bfloat16": {"labels": {"equal": 0.99891, "lowest": 0.5}}},
            },
        ],
    }
    types["environment"] = {**types["environment"], "tiny": "0123456789ab"}
    made = tables.tables(record, None, None, types)
    assert "| clearclip with FSA | 40 | 20 |" in made["dtypes-window"]
    assert "| 784 | bfloat16 | 15 | 10 | 5 | 3× |" in made["dtypes-step"]
    assert "| sclip | street | 99.89% (50.00%) | not measured |" in made["dtypes-labels"]
    assert "weights 0123456789ab" in made["dtypes-labels"]
    assert ". float32, " not in made["dtypes-labels"].split("\n\n")[1]
    # What a whole run has comes first.
    assert tables.tables(types, None, None, record)["dtypes-step"] == made["dtypes-step"]


def test_a_result_names_the_weights_and_no_place(monkeypatch, tmp_path):
    weights = hashlib.sha256(tiny.weights_path().read_bytes()).hexdigest()
    (tmp_path / "street").mkdir()
    found = environment.origin(["cpu", "--photographs", str(tmp_path / "street")])
    assert weights.startswith(found["tiny"])
    assert len(found["tiny"]) == 12
    assert found["command"] == "python -m bench cpu --photographs street"


# --------------------------------------------------------------------------------------------------
# Tables


def made_up_record() -> dict:
    def entry(ms, **more):
        return {"series": {"median": ms}, "graph": {"median": ms / 2}, **more}

    made_up = dict.fromkeys(("processor", "cpu_threads", "triton", "open_clip_torch"), "x")
    made_up |= {"gpu": "G", "torch": "9", "commit": "c", "date": "2030-01-01", "command": "do"}
    return {
        "environment": made_up,
        "dtype": "float16",
        "not_begun": ["op B=9 N=9 C=9: time"],
        "rows": [
            {
                **contenders.describe(OpRow("op", 1, 1764, 171)),
                "contenders": {
                    "published": entry(8.0, memory=3 << 20),
                    "torch.compile": entry(1.0),
                    "algebra": {"does_not_fit": "no"},
                    "flashinfer": {"not_installed": "no"},
                    "fsa torch": {"error": "broke"},
                    "fsa triton": entry(0.04, numerics={"relative_error": None})
                    | {"graph": {"median": 0.01}},
                },
            },
            {
                **contenders.describe(HostRow("sclip", "ViT-L/14")),
                "contenders": {
                    "published off": entry(10.0),
                    "published on": entry(15.0),
                    "fsa off": entry(8.0, launches=100),
                    "fsa on": entry(
                        8.4, launches=107, numerics={"relative_error": 1e-3, "limit": 2e-3}
                    ),
                },
            },
        ],
    }


def test_tables_come_from_the_data():
    record = made_up_record()
    speed = tables.speed_table(record)
    cells = "8 | does not fit | 1 | not installed | failed | 0.04 | 200× | 25×"
    assert f"| op B=1 N=1764 C=171 | {cells} |" in speed
    beside = tables.speed_table(record, ("series", "graph"))
    cells = "8 / 4 | does not fit | 1 / 0.5 | not installed | failed | 0.04 / 0.01 | 400× | 50×"
    assert f"| op B=1 N=1764 C=171 | {cells} |" in beside
    host = tables.host_table(record)
    assert "| sclip ViT-L/14 336 | 10 | 15 | 8 | 8.4 | 50% | 5% | 5.97% | 1.19× |" in host
    beside = tables.host_table(record, ("series", "graph"))
    assert "| 8 / 4 | 8.4 / 4.2 | 50% | 5% | 5.97% | 1.19× |" in beside
    assert "| op B=1 N=1764 C=171 | 3 |" in tables.memory_table(record)
    assert "not finite" in tables.numerics_table(record)
    assert "sclip" not in tables.numerics_table(record)
    hosts_numerics = tables.host_numerics_table(record)
    assert "| sclip ViT-L/14 336 | - | - | - | 1.0e-03 of 2.0e-03 |" in hosts_numerics
    found = {mark.text: mark for mark in marks.marks(record)}
    assert found["logits → A_f, N=1764, C=171"].value == pytest.approx(10)
    assert found["logits → A_f, N=1764, C=171"].verdict == "met"
    assert found["sclip ViT-L/14: FSA on against off"].verdict == "NOT MET"
    assert (
        found["sclip ViT-L/14: the published baseline over the host with FSA here"].verdict == "met"
    )
    assert found["street picture, ProxyCLIP with FSA, over the published loop"].value is None
    assert "op B=9 N=9 C=9: time" in tables.tables(None, record)["not-begun-gpu"]


def test_what_was_not_measured_is_called_that():
    made = tables.tables(None, None)
    assert made["speed-gpu"] == made["host-cpu"] == "not measured"
    assert "| logits → A_f, N=196, C=171 | ≤ 12 µs | not measured |" in made["marks"]
    assert "| proxyclip ViT-B/16 | 12.9 | 13.6 | 5.4% |" in made["paper"]


def test_committed_tables_are_those_of_the_committed_results():
    made = tables.tables(*map(results_data.load, results_data.NAMES))
    pages = list(tables.pages())
    assert tables.PAGE in pages
    for page in pages:
        assert tables.fill(page.read_text(), made) == page.read_text(), page.name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"commit": "abc1234-dirty"}, "abc1234 with changes"),
        ({"commit": "unknown"}, "names no commit"),
        ({"rehearsal": True}, "a rehearsal"),
    ],
    ids=["clean", "dirty", "unknown", "rehearsal"],
)
def test_only_a_result_of_a_commit_is_for_publication(changes, reason, tmp_path):
    record = made_up_record()
    record["environment"]["commit"] = changes.get("commit", "abc1234")
    if "rehearsal" in changes:
        record["rehearsal"] = True
    # Elsewhere anything may be written; and the tables say what it is.
    environment.require_publishable(record, tmp_path / "gpu.json")
    if reason is None:
        assert environment.unpublishable(record) is None
        environment.require_publishable(record, RESULTS / "gpu.json")
        assert ", commit abc1234, 2030-01-01" in tables.speed_table(record)
        return
    assert reason in environment.unpublishable(record)
    assert f"**{environment.unpublishable(record)}**" in tables.speed_table(record)
    for place in (RESULTS, RESULTS / "gpu.json", RESULTS / ".." / "results" / "x"):
        with pytest.raises(SystemExit, match=reason):
            environment.require_publishable(record, place)


def test_a_run_for_publication_needs_a_commit(monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: "abc1234-dirty")
    jobs = [Job(OpRow("op", 1, 16, 3), ("time",))]
    with pytest.raises(SystemExit, match="Commit first"):
        runner.run(jobs, RESULTS / "toy.json", device=CPU, dtype=FLOAT, budget=-1)
    assert not (RESULTS / "toy.json").exists()


def test_committed_results_name_a_commit_or_are_called_what_they_are():
    texts = "".join(page.read_text() for page in tables.pages())
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        reason = environment.unpublishable(record)
        assert not record.get("rehearsal"), file.name
        assert reason is None or f"**{reason}**" in texts, (file.name, reason)
        if reason is not None:
            named = record["environment"]["commit"]
            assert named not in texts, f"{file.name}: {named} is quoted as if it were a commit"


def test_code_with_changes_is_not_that_of_its_commit(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() == "unknown"
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = environment.commit()
    assert len(clean) >= 7
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "gpu.json").write_text("{}")
    assert environment.commit() == clean
    (tmp_path / "new.py").write_text("2")
    assert environment.commit() == f"{clean}-dirty"
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("3")
    assert environment.commit() == f"{clean}-dirty"


@pytest.mark.slow
def test_a_run_in_parts_is_one_record(tmp_path):
    file = tmp_path / "gpu.json"
    jobs = [
        Job(OpRow("op", 1, 16, 3), ("numerics",)),
        Job(OpRow("step", 1, 16, 3), ("numerics",)),
    ]
    options = {"device": CPU, "dtype": FLOAT, "budget": 60.0, "commit": "abc"}
    runner.run(jobs, file, only=["op"], **options)
    record = runner.run(jobs, file, only=["step"], **options)
    assert [row["kind"] for row in record["rows"]] == ["op", "step"]
    assert record["environment"]["command"].count(";") == 1
    record = runner.run(jobs, file, only=["op"], **{**options, "commit": "other"})
    assert [row["kind"] for row in record["rows"]] == ["op"]
    assert [row["kind"] for row in runner.run(jobs, file, **options)["rows"]] == ["op", "step"]


def test_the_plot_is_drawn_with_and_without_results(tmp_path):
    for number, record in enumerate((None, made_up_record())):
        file = tmp_path / f"{number}.png"
        plots.draw(None, record, file)
        assert file.read_bytes().startswith(b"\x89PNG")
