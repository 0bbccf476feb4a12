"""Runs the registry's jobs in order of importance and writes what was measured as data.

    python -m bench cpu|gpu [--only op,step,host,picture,memory,numerics] [--budget SECONDS]
                            [--out FILE] [--commit NAME]
    python -m bench cpu --only dtypes [--photographs FOLDER]
    python -m bench gpu --rehearse [--out FOLDER]

Exits with 1 where this library failed, or was less exact than the tests allow. With --only, what
the file holds from the same commit, machine and versions stays, so that a run can come in parts. A
result for bench/results needs code that is committed.

"dtypes" compares float32 and bfloat16 on the CPU: a window, a feedback step, and the labels of the
embedded model on the shipped pictures ("labels" stands for these alone). --photographs adds the
pictures of a folder with images/ and classes.txt, as `fsa eval folder` takes it.

A session with a GPU, each command within ten minutes:

{session}

--rehearse does all of them without a GPU at toy sizes, to see that every command runs; what it
writes is marked and cannot become a result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import RESULTS
from bench.environment import environment, require_publishable
from bench.measure import numerics
from bench.measure.worker import Worker
from bench.rows import registry
from bench.rows.contenders import MEASURES, Job, is_ours

KINDS = ("op", "step", "host", "picture", "dtypes")
ONLY = (*KINDS, "memory", "numerics", "labels")

# Where the tests lie that matter on a GPU: of kernels, ops, compilation and CUDA graphs.
GPU_TESTS = ("tests/kernels", "tests/ops", "tests/segment/test_graphs.py")

# The parts of `bench gpu` in order of importance.
PARTS = ("op,step,memory,numerics", "host,picture")

# Seconds without news of a contender, and beyond the budget, after which it is given up.
_PATIENCE = {"cuda": 90.0, "cpu": 240.0}
_GRACE = 20.0

# What two runs must share for one record to hold both.
_SAME = ("commit", "processor", "gpu", "driver", "cuda", "torch", "triton", "python")


def main(arguments: Sequence[str], *, rehearsed: Callable[[], None] | None = None) -> int:
    """Measures; the first argument is "cpu" or "gpu".

    Args:
        arguments: the command line.
        rehearsed: for a rehearsal: what makes a process do everything at toy sizes.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__.format(session="\n".join(f"    {line}" for line in session())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("cpu", "gpu"))
    parser.add_argument("--only", type=_only, default=ONLY, help="default: everything")
    parser.add_argument("--budget", type=float, default=450, help="seconds; default 450")
    parser.add_argument("--out", type=Path, help="default bench/results/{cpu,gpu}.json")
    parser.add_argument("--commit", help="to record, where the code was copied without its history")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="for the labels")
    parser.add_argument("--rehearse", action="store_true", help="a session, without a GPU")
    options = parser.parse_args(arguments)
    on_gpu = options.what == "gpu"
    if options.rehearse:
        if not on_gpu:
            parser.error("--rehearse is of `bench gpu`")
        from bench.measure import rehearsal

        return rehearsal.rehearse(options.out)
    jobs = registry.GPU if on_gpu else registry.CPU
    if options.photographs is not None:
        if on_gpu:
            parser.error("--photographs is of `bench cpu`")
        jobs += registry.labels(options.photographs)
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: `python -m bench gpu` needs one; --rehearse needs none")
    record = run(
        jobs,
        options.out or RESULTS / f"{options.what}.json",
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        # A rehearsal computes on the CPU, where halves take minutes.
        dtype=torch.float16 if on_gpu and rehearsed is None else torch.float32,
        budget=options.budget,
        only=options.only,
        commit=options.commit,
        rehearsed=rehearsed,
    )
    for complaint in complaints(record):
        print(complaint, file=sys.stderr)
    return 1 if complaints(record) else 0


def session() -> list[str]:
    """The commands of a session with a GPU."""
    return [
        # In one process: there is one GPU.
        f"python -m pytest -n 0 {' '.join(GPU_TESTS)}",
        *(f"python -m bench gpu --only {part}" for part in PARTS),
        "python -m bench tables",
    ]


def _only(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    unknown = set(chosen) - set(ONLY)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: must be of {', '.join(ONLY)}"
        )
    return chosen


def run(
    jobs: Sequence[Job],
    file: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    only: Sequence[str] = ONLY,
    commit: str | None = None,
    rehearsed: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Does jobs until the budget is used up; writes the file after every one.

    Args:
        jobs: in order of importance.
        file: JSON with the environment and one record per job.
        device, dtype: of the inputs.
        budget: seconds; rows that were not begun by then are left out and named.
        only: as `narrowed` takes it; other rows that the file holds of the same code, machine and
            versions stay.
        commit: of the code; default what git says.
        rehearsed: makes the worker's process compute toys; the record says so.

    Raises:
        SystemExit: the file is for publication and the record would not be.
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
    if rehearsed:
        record["rehearsal"] = True
    require_publishable(record, file)
    earlier = _earlier(file, record) if set(only) != set(ONLY) else None
    if earlier is not None:
        commands = (earlier["environment"]["command"], record["environment"]["command"])
        record["environment"]["command"] = "; ".join(commands)
        for key in ("rows", "not_begun"):
            record[key] += earlier[key]
    file.parent.mkdir(parents=True, exist_ok=True)
    worker = Worker(device, dtype, _PATIENCE[device.type], rehearsed)
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
    record["seconds"] = round(
        time.monotonic() - start + (earlier["seconds"] if earlier is not None else 0), 1
    )
    write(record, file)
    return record


def _earlier(file: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """What a file holds of the same code, machine and versions as a record."""
    if not file.exists():
        return None
    earlier = json.loads(file.read_text())
    same = all(earlier["environment"].get(k) == record["environment"].get(k) for k in _SAME)
    alike = all(earlier.get(k) == record.get(k) for k in ("dtype", "rehearsal"))
    return earlier if same and alike and "seconds" in earlier else None


def narrowed(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """Some of the jobs, with some of their measures.

    Args:
        jobs: all.
        only: of `ONLY`. Kinds leave the rows of these kinds, all kinds where none is named; memory,
            numerics and labels leave these measures, and the time where kinds are named too.
    """
    kinds = set(only) & set(KINDS)
    measures = set(only) - kinds
    if not measures:
        measures = set(MEASURES)
    elif kinds:
        measures.add("time")
    kept = []
    for job in jobs:
        chosen = tuple(measure for measure in job.measures if measure in measures)
        if chosen and (not kinds or job.row.kind in kinds):
            kept.append(Job(job.row, chosen))
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
