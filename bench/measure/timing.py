"""Times the contenders of a row, interleaved.

Three figures, each the median with the 20th and the 80th percentile, in ms a call:

series     calls one after another, at least 10 ms of them; on a GPU between two CUDA events
one_call   GPU only, short calls: a single one, from its start until the device has finished, by
           the wall clock
graph      likewise: the call captured in a CUDA graph and replayed, between two CUDA events: the
           device's own work, without Python and launches. A short call is captured several times
           in one graph, so that the start of a graph is no part of it; `launches` counts what the
           graph holds for one of them

The GPU's second-level cache is not flushed between calls: a segmentor's inputs were written just
before, so a warm cache is what it sees.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.rows.contenders import Call, failure, release, synchronise

_ROUNDS, _FEWEST_ROUNDS = 15, 3
# Time that one contender may take in all its rounds, in seconds, unless they are the fewest.
_SECONDS = {"cuda": 0.6, "cpu": 6.0}
_SERIES_SECONDS = 0.010
# Above this a call's launches no longer count: its series says all.
_LAUNCHES_COUNT_BELOW_SECONDS = 0.050
_NEEDS_NO_WARM_UP_SECONDS = 1.0
# Starting a graph takes microseconds, as much as the shortest calls.
_SHORT_SECONDS, _SHORT_CALLS_A_GRAPH = 0.001, 10

_WAKING_SECONDS, _WAKING_SIDE, _WAKING_TURNS = 0.5, 4096, 20

# What a graph's drawing calls the nodes that are launches.
_LAUNCH_NODES = ("KERNEL", "MEMCPY", "MEMSET")


def time_calls(
    calls: dict[str, Call],
    device: torch.device,
    *,
    graphs: bool,
    uncaptured: Collection[str] = (),
    at: Callable[[str], None] = lambda contender: None,
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Times calls, in turns.

    Args:
        calls: contender -> call, compiled and run once.
        device: where they run.
        graphs: whether to capture them in CUDA graphs too, on a GPU.
        uncaptured: contenders that are not captured all the same.
        at: told the contender before each of its turns.

    Returns:
        contender -> figures, or what went wrong; and whether a failed capture has left this process
        unable to go on.
    """
    figures: dict[str, dict[str, Any]] = {name: {} for name in calls}
    alive = dict(calls)
    seconds = {}
    for name, call in calls.items():
        at(name)
        try:
            seconds[name] = _one_call(call, device)
            if seconds[name] < _NEEDS_NO_WARM_UP_SECONDS:
                seconds[name] = _one_call(call, device)
        except Exception as error:
            _drop(name, error, alive, figures, device)

    _sample("series", alive, seconds, figures, device, _series, at)
    if device.type != "cuda":
        return figures, False
    short = {n: call for n, call in alive.items() if seconds[n] < _LAUNCHES_COUNT_BELOW_SECONDS}
    _sample("one_call", short, seconds, figures, device, lambda c, _, d: _one_call(c, d), at)
    if not graphs:
        return figures, False

    captured: dict[str, Captured] = {}
    failed = False
    for name, call in short.items():
        if name in uncaptured:
            continue
        at(name)
        try:
            times = _SHORT_CALLS_A_GRAPH if seconds[name] < _SHORT_SECONDS else 1
            captured[name] = capture(call, device, times)
            captured[name].replay()
            seconds[name] = _one_call(captured[name].replay, device)
            figures[name]["launches"] = captured[name].launches
        except Exception as error:
            captured.pop(name, None)
            failed = True
            figures[name]["graph"] = failure(error)
            error.with_traceback(None)
            release(device)
            synchronise(device)
    replays = {name: graph.replay for name, graph in captured.items()}
    _sample("graph", replays, seconds, figures, device, _series, at)
    for name in replays:
        graph = captured[name]
        figures[name]["graph"] = _shared(figures[name]["graph"], graph.calls)
        if graph.launches is None:
            at(name)
            figures[name]["launches"] = profiled_launches(short[name], device)
    return figures, failed and not _usable(device)


def wake(device: torch.device) -> None:
    """Half a second of products: a GPU that had nothing to do runs at a lower clock."""
    if device.type != "cuda":
        return
    factor = torch.ones((_WAKING_SIDE, _WAKING_SIDE), dtype=torch.float16, device=device)
    end = time.monotonic() + _WAKING_SECONDS
    while time.monotonic() < end:
        for _ in range(_WAKING_TURNS):
            torch.mm(factor, factor)
        synchronise(device)


def _usable(device: torch.device) -> bool:
    """Whether the device still does what rows need, after a capture that failed.

    Such a capture can leave the random generator or the allocator in the midst of it.
    """
    try:
        made = torch.randn((64, 64), device=device)
        product = float((made @ made.T).diagonal().sum())
        del made
        release(device)
        synchronise(device)
    except RuntimeError:
        return False
    return product > 0


@dataclass(frozen=True)
class Captured:
    """Calls in a CUDA graph.

    Attributes:
        replay: does them all.
        calls: how many they are.
        launches: of one of them; None where that cannot be read.
    """

    replay: Call
    calls: int
    launches: int | None


def capture(call: Call, device: torch.device, calls: int = 1) -> Captured:
    """Captures a call, several times in a row, in a CUDA graph.

    Raises:
        RuntimeError: something in the call cannot be captured.
    """
    before = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    try:
        side.wait_stream(before)
        with torch.cuda.stream(side):
            call()
        before.wait_stream(side)
        release(device)
        # Only a graph that is kept beside what is made of it can be drawn.
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                result = call()
    finally:
        # A capture that fails may leave its own stream behind as the current one.
        torch.cuda.set_stream(before)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    held = _launches(graph)
    return Captured(replay, calls, None if held is None or held % calls else held // calls)


def profiled_launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills of one call, by PyTorch's profiler; None where it sees none.

    Calls are slower ever after, so that nothing may be timed then.
    """
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            synchronise(device)
        seen = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    except RuntimeError:
        return None
    return len(seen) or None


def _launches(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels, copies and fills of a captured graph, counted in its drawing."""
    with tempfile.TemporaryDirectory() as folder:
        drawing = Path(folder) / "graph.dot"
        try:
            graph.debug_dump(str(drawing))
            text = drawing.read_text(errors="replace")
        except (RuntimeError, OSError):
            return None
    nodes = dict(
        re.findall(r'^\s*"(graph_\d+_node_\d+)"\s*\[.*label="[{\s]*([A-Z_]+)', text, re.MULTILINE)
    )
    return sum(kind in _LAUNCH_NODES for kind in nodes.values()) or None


def _sample(
    figure: str,
    calls: dict[str, Call],
    seconds: dict[str, float],
    figures: dict[str, dict[str, Any]],
    device: torch.device,
    measure: Callable[[Call, int, torch.device], float],
    at: Callable[[str], None],
) -> None:
    """Fills one figure of all contenders, round by round; drops those that fail."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turns = {name: max(1, math.ceil(_SERIES_SECONDS / max(seconds[name], 1e-7))) for name in calls}
    limit = _SECONDS[device.type]
    rounds = {}
    for name in calls:
        wanted = int(limit / max(seconds[name] * turns[name], 1e-7))
        rounds[name] = min(_ROUNDS, max(_FEWEST_ROUNDS, wanted))
    for number in range(_ROUNDS):
        for name, call in list(calls.items()):
            if number >= rounds[name]:
                continue
            at(name)
            try:
                samples[name].append(measure(call, turns[name], device))
            except Exception as error:
                _drop(name, error, calls, figures, device)
    for name in calls:
        figures[name][figure] = summary(samples[name])


def _drop(
    name: str,
    error: Exception,
    calls: dict[str, Call],
    figures: dict[str, dict[str, Any]],
    device: torch.device,
) -> None:
    del calls[name]
    figures[name] |= failure(error)
    # The frames of the failed call hold its tensors.
    error.with_traceback(None)
    release(device)
    # Raises where the error has left the device unusable.
    synchronise(device)


def _series(call: Call, turns: int, device: torch.device) -> float:
    """Seconds a call, of several one after another."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(turns):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / turns
    start = time.perf_counter()
    for _ in range(turns):
        call()
    return (time.perf_counter() - start) / turns


def _one_call(call: Call, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def _shared(figure: dict[str, Any], calls: int) -> dict[str, Any]:
    """The time of one of several calls that were timed together; a failure stays what it is."""
    share = {
        key: round(figure[key] / calls, 5) for key in ("p20", "median", "p80") if key in figure
    }
    return figure | share


def summary(seconds: list[float]) -> dict[str, float | int]:
    """p20, median and p80 in ms, within what was measured, and of how many measurements."""
    milliseconds = [1000 * s for s in seconds]
    cuts = quantiles(milliseconds, n=10, method="inclusive") if len(seconds) > 1 else None
    p20, median, p80 = (cuts[1], cuts[4], cuts[7]) if cuts else milliseconds * 3
    return {
        "p20": round(p20, 5),
        "median": round(median, 5),
        "p80": round(p80, 5),
        "measurements": len(seconds),
    }
