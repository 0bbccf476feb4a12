"""Times rows: all contenders of a row in one run, interleaved; results as data."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fsa
from bench.rows import Inputs, Row, contenders, make_inputs

RESULTS = Path(__file__).parent / "results"

# A contender that takes longer than this a call is measured fewer times.
_SLOW_SECONDS = 1.0
_REPEATS = 15
_REPEATS_SLOW = 3


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit, date and command of a run."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fsa": fsa.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def bytes_free(device: torch.device) -> int:
    """Memory that a run may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def run(
    rows: Sequence[Row],
    file: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    compiled: bool = True,
) -> dict[str, Any]:
    """Checks and times rows until the budget is used up; writes the file after every row.

    Args:
        rows: in order of importance.
        file: JSON with the environment and one record per row.
        device, dtype: of the inputs.
        budget: seconds; rows that were not begun by then are left out and named.
        compiled: with `torch.compile` as a contender.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {
        "environment": environment(device),
        "dtype": str(dtype).removeprefix("torch."),
        "unit": "ms",
        "rows": [],
        "not_measured": [],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    for row in tqdm(rows, unit="row"):
        if time.perf_counter() - start > budget:
            record["not_measured"].append(row.name)
            continue
        record["rows"].append(_measure(row, device, dtype, compiled))
        file.write_text(json.dumps(record, indent=1) + "\n")
    file.write_text(json.dumps(record, indent=1) + "\n")
    return record


@torch.no_grad()
def _measure(row: Row, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    inputs = make_inputs(row, device, dtype)
    functions = contenders(row, device, dtype, bytes_free(device), compiled=compiled)
    result: dict[str, Any] = {"name": row.name, "contenders": {}}
    exact = _float64(row, inputs)
    first_times = {}
    for name, function in list(functions.items()):
        # Once for compilation, once for the clock and the check.
        function(inputs)
        first_times[name] = _seconds(function, inputs)
        result["contenders"][name] = {"relative_error": _error(function(inputs), exact)}

    times: dict[str, list[float]] = {name: [] for name in functions}
    repeats = _REPEATS if max(first_times.values()) < _SLOW_SECONDS else _REPEATS_SLOW
    for _ in range(repeats):
        for name, function in functions.items():
            # What is fast is measured more often within its turn.
            turns = max(1, min(10, int(1 / max(first_times[name], 1e-6))))
            times[name] += [_seconds(function, inputs) for _ in range(turns)]
    for name, seconds in times.items():
        cuts = quantiles([1000 * s for s in seconds], n=10, method="inclusive")
        result["contenders"][name] |= {
            "p20": round(cuts[1], 4),
            "median": round(cuts[4], 4),
            "p80": round(cuts[7], 4),
            "measurements": len(seconds),
        }
    return result


def _seconds(function: Callable[[Inputs], Tensor], inputs: Inputs) -> float:
    if inputs.value.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    function(inputs)
    return time.perf_counter() - start


def _float64(row: Row, inputs: Inputs) -> Tensor:
    """The row's result by exact algebra in float64 (the tests tie it to the definition)."""
    wide = Inputs(*(tensor.double() for tensor in vars(inputs).values()))
    feedback = fsa.feedback_attention(wide.patch_logits, wide.uniform_logits, backend="torch")
    if row.kind == "op":
        return feedback
    return fsa.adapt(wide.value, feedback, wide.attention, backend="torch")


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())
