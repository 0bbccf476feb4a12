"""Runs the registry's jobs in order of importance and writes what was measured as data.

    python -m bench cpu|gpu [--only op,step,host,picture,memory,numerics] [--budget SECONDS]
                            [--out FILE] [--commit NAME]

Exits with 1 where this library failed, or was less exact than the tests allow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import RESULTS
from bench.measure import numerics
from bench.measure.environment import environment
from bench.measure.worker import Worker
from bench.rows import registry
from bench.rows.contenders import Job, is_ours

ONLY = ("op", "step", "host", "picture", "memory", "numerics")

# Seconds without news of a contender, and beyond the budget, after which it is given up.
_PATIENCE = {"cuda": 90.0, "cpu": 240.0}
_GRACE = 20.0


def main(arguments: Sequence[str]) -> int:
    """Measures; the first argument is "cpu" or "gpu"."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("cpu", "gpu"))
    parser.add_argument("--only", type=_only, default=ONLY, help="default: everything")
    parser.add_argument("--budget", type=float, default=450, help="seconds; default 450")
    parser.add_argument("--out", type=Path, help="default bench/results/{cpu,gpu}.json")
    parser.add_argument("--commit", help="to record, where the code was copied without its history")
    options = parser.parse_args(arguments)
    if options.what == "gpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: `python -m bench gpu` needs one")
    on_gpu = options.what == "gpu"
    record = run(
        registry.GPU if on_gpu else registry.CPU,
        options.out or RESULTS / f"{options.what}.json",
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        dtype=torch.float16 if on_gpu else torch.float32,
        budget=options.budget,
        only=options.only,
        commit=options.commit,
    )
    for complaint in complaints(record):
        print(complaint, file=sys.stderr)
    return 1 if complaints(record) else 0


def _only(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    unknown = set(wanted) - set(ONLY)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: must be of {', '.join(ONLY)}"
        )
    return wanted


def run(
    jobs: Sequence[Job],
    file: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    only: Sequence[str] = ONLY,
    commit: str | None = None,
) -> dict[str, Any]:
    """Does jobs until the budget is used up; writes the file after every one.

    Args:
        jobs: in order of importance.
        file: JSON with the environment and one record per job.
        device, dtype: of the inputs.
        budget: seconds; rows that were not begun by then are left out and named.
        only: which rows are timed, and whether memory and numerics are measured.
        commit: of the code; default what git says.
    """
    start = time.monotonic()
    record: dict[str, Any] = {
        "environment": environment(device) | ({"commit": commit} if commit else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "unit": "ms; memory in bytes",
        "budget": budget,
        "rows": [],
        "not_begun": [],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    worker = Worker(device, dtype, _PATIENCE[device.type])
    try:
        for job in narrowed(jobs, only):
            elapsed = time.monotonic() - start
            if elapsed > budget:
                record["not_begun"].append(f"{job.row.name}: {', '.join(job.measures)}")
                continue
            print(f"{elapsed:6.0f} s  {job.row.name}: {', '.join(job.measures)}", flush=True)
            done = worker.do(job, deadline=start + budget + _GRACE)
            done["measures"] = list(job.measures)
            for name, found in _beyond(done, dtype).items():
                done["contenders"][name]["beyond_limits"] = found
            record["rows"].append(done)
            write(record, file)
    finally:
        worker.stop()
    record["seconds"] = round(time.monotonic() - start, 1)
    write(record, file)
    return record


def narrowed(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs, with the measures that are wanted; those without any left out."""
    kept = []
    for job in jobs:
        measures = tuple(
            measure
            for measure in job.measures
            if (job.row.kind if measure == "time" else measure) in only
        )
        if measures:
            kept.append(Job(job.row, measures))
    return kept


def _beyond(row: dict[str, Any], dtype: torch.dtype) -> dict[str, list[str]]:
    found = {
        name: numerics.beyond_limits(name, entry["numerics"], dtype)
        for name, entry in row["contenders"].items()
        if "numerics" in entry
    }
    return {name: broken for name, broken in found.items() if broken}


def complaints(record: dict[str, Any]) -> list[str]:
    """What went wrong in a run with this library, or with its judges, in words."""
    return [
        f"{row['name']}{where}: {'; '.join(wrong)}"
        for row in record["rows"]
        for where, wrong in (
            ("", _errors(row)),
            (", in float64", _errors(row.get("exact", {}))),
            *(
                (f", {name}", [*entry.get("beyond_limits", ()), *_errors(entry)])
                for name, entry in row["contenders"].items()
                if is_ours(name)
            ),
        )
        if wrong
    ]


def _errors(entry: dict[str, Any]) -> list[str]:
    """Of an entry and of its capture in a CUDA graph; what does not fit is no error."""
    return [place["error"] for place in (entry, entry.get("graph", {})) if "error" in place]


def write(record: dict[str, Any], file: Path) -> None:
    """Writes a record whole or not at all; what is not a number becomes null."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, file)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
