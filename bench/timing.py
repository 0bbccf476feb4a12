"""Times the contenders of a row, interleaved.

Three figures, each the median with the 20th and the 80th percentile, in ms a call:

series     calls one after another, at least 10 ms of them; on a GPU between two CUDA events
one_call   GPU only, short calls: one alone, from its start until the device has finished, by the
           wall clock
graph      likewise: the call captured in a CUDA graph and replayed, between two CUDA events: the
           device's own work, without Python and launches; `launches` counts what the graph holds

The GPU's second-level cache is not flushed between calls: a segmentor's inputs were written just
before, so a warm cache is what it sees.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from bench.contenders import Call, failure, release, synchronise

_ROUNDS, _FEWEST_ROUNDS = 15, 3
# Time that one contender may take in all its rounds, in seconds, unless they are the fewest.
_SECONDS = {"cuda": 0.6, "cpu": 6.0}
_SERIES_SECONDS = 0.010
# Above this a call's launches no longer count: its series says all.
_LAUNCHES_COUNT_BELOW_SECONDS = 0.050
_NEEDS_NO_WARM_UP_SECONDS = 1.0


def time_calls(
    calls: dict[str, Call],
    device: torch.device,
    *,
    graphs: bool,
    at: Callable[[str], None] = lambda contender: None,
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Times calls, in turns.

    Args:
        calls: contender -> call, compiled and run once.
        device: where they run.
        graphs: whether to capture them in CUDA graphs too, on a GPU.
        at: told the contender before each of its turns.

    Returns:
        contender -> figures, or what went wrong; and whether a capture failed, after which this
        process should measure nothing more.
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

    captured: dict[str, Call] = {}
    failed = False
    for name, call in short.items():
        at(name)
        try:
            captured[name], figures[name]["launches"] = capture(call, device)
            captured[name]()
            seconds[name] = _one_call(captured[name], device)
        except Exception as error:
            captured.pop(name, None)
            failed = True
            figures[name]["graph"] = failure(error)
            error.with_traceback(None)
            release(device)
            synchronise(device)
    _sample("graph", captured, seconds, figures, device, _series, at)
    return figures, failed


def capture(call: Call, device: torch.device) -> tuple[Call, int | None]:
    """Captures a call in a CUDA graph.

    Returns:
        A call that replays it, and how many launches it holds, None where that cannot be read.

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
        graph = torch.cuda.CUDAGraph()
        graph.enable_debug_mode()
        with torch.cuda.graph(graph):
            result = call()
    finally:
        # A capture that fails may leave its own stream behind as the current one.
        torch.cuda.set_stream(before)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay, _launches(graph)


def _launches(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels, copies and fills of a captured graph, counted in its drawing."""
    with tempfile.TemporaryDirectory() as folder:
        drawing = Path(folder) / "graph.dot"
        try:
            graph.debug_dump(str(drawing))
            text = drawing.read_text(errors="replace")
        except (RuntimeError, OSError):
            return None
    return len(set(re.findall(r'^\s*"(graph_\d+_node_\d+)"\s*\[', text, re.MULTILINE))) or None


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
