"""A session with a GPU, rehearsed without one: every command, from end to end, at toy sizes.

Ops and steps run by the kernels in Triton's interpreter, hosts and pictures by PyTorch on the CPU;
CUDA's events, streams and graphs are stand-ins. Everything else - the choice of tests, the rows,
the process that measures, the raw results, marks, tables, plots - is what a session runs. The
numbers mean nothing: each file says that it is a rehearsal, and none can be written into
bench/results.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.measure import driver, timing
from bench.rows import op, registry
from bench.rows.contenders import Job, Row
from bench.rows.hosts import HostRow
from bench.rows.op import OpRow
from bench.rows.pictures import PictureRow

_TOY_BACKBONE = "ViT-S-16-alt"
_CPU = torch.device("cpu")
_GPU_NAME = "no GPU (rehearsal)"


def rehearse(folder: Path | None) -> int:
    """Runs every command of a session; 0 if all of them do.

    Args:
        folder: for what they write; default a new one.
    """
    from bench.measure import runner

    folder = Path(folder or tempfile.mkdtemp(prefix="fsa-rehearsal-"))
    folder.mkdir(parents=True, exist_ok=True)
    steps = {"python -m bench driver": _launch}
    steps |= {command: partial(_rehearsed, command, folder) for command in runner.session()}
    failed = []
    began = time.monotonic()
    for name, step in steps.items():
        start = time.monotonic()
        print(f"\n== {name}", flush=True)
        code = step()
        print(
            f"== {'done' if code == 0 else 'FAILED'}, {time.monotonic() - start:.0f} s", flush=True
        )
        if code != 0:
            failed.append(name)
    print(f"\n{folder} holds what was written, in {time.monotonic() - began:.0f} s.")
    print(
        "\n".join(["Failed:", *failed]) if failed else "A rehearsal: all ran, nothing was measured."
    )
    return int(bool(failed))


def _python(*arguments: str, interpreted: bool = True) -> int:
    """Runs Python on a command line; its exit code."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode


def _launch() -> int:
    """Real calls of every kernel, before its results are looked at in the interpreter."""
    if reason := driver.obstacle():
        print(f"left out: {reason}")
        return 0
    return _python("-m", "bench", "driver", interpreted=False)


def _rehearsed(command: str, folder: Path) -> int:
    """One command of a session as it stands, with what makes it a rehearsal."""
    _, *arguments = command.split()
    if arguments[1] == "pytest":
        # All tests are collected, and the first of each file is run.
        return _python(*arguments, "-p", "bench.measure.first_tests")
    if arguments[2] == "gpu":
        code = "import sys; from bench.measure import rehearsal as r; sys.exit(r.measure(sys.argv))"
        return _python("-c", code, *arguments[2:], "--out", str(folder / "gpu.json"))
    code = _python(*arguments, "--results", str(folder))
    if code == 0 and "rehearsal" not in (folder / "RESULTS.md").read_text():
        print("the page does not say that it is a rehearsal")
        return 1
    return code


def measure(arguments: list[str]) -> int:
    """`python -m bench gpu` at toy sizes on a pretended GPU; changes this process for good."""
    from bench.measure import runner

    pretend()
    torch.cuda.is_available = lambda: True
    registry.GPU = toy_jobs()
    return runner.main(arguments[1:], rehearsed=pretend)


def toy_jobs() -> tuple[Job, ...]:
    """The jobs of the marks, and one of the rows that follow."""
    return (*registry.MARKS_GPU, registry.GPU[-1])


def pretend() -> None:
    """Makes this process compute toys of all rows on a pretended GPU, for good."""
    for owner, name, value in replacements():
        setattr(owner, name, value)


class StandIn:
    """Takes the place of CUDA's events, streams, graphs and of functions that only wait."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._options = options
        self._time = 0.0

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> bool:
        return False

    def __call__(self, *args: Any, **options: Any) -> StandIn:
        return StandIn()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None

    def record(self) -> None:
        """Of an event: notes the time."""
        self._time = time.perf_counter()

    def elapsed_time(self, end: StandIn) -> float:
        """Of an event: milliseconds until another."""
        return 1000 * (end._time - self._time)

    def replay(self) -> None:
        """Of a graph: takes a moment."""
        time.sleep(REPLAY_SECONDS)

    def debug_dump(self, path: str) -> None:
        """Of a graph: draws it, if it was told to keep what it is drawn from."""
        if self._options.get("keep_graph"):
            Path(path).write_text(drawing(KERNELS_DRAWN))


REPLAY_SECONDS, KERNELS_DRAWN = 0.005, 30


def drawing(kernels: int) -> str:
    """A captured graph as the CUDA runtime draws it: kernels, and a node that is no launch."""
    kernel = """
"graph_1_node_{0}"[style="bold" shape="record" label="{{KERNEL
| {{ID | {0} (topoId: 3) | _isolate_kernel\\<\\<\\<1,128,0\\>\\>\\>}}
| {{cooperative | 0}}
}}"];"""
    nodes = [kernel.format(number) for number in range(kernels)]
    nodes.append('"graph_1_node_99"[style="solid" shape="record" label="{EMPTY\n}"];')
    nodes.append('"graph_1_node_0" -> "graph_1_node_1" [headlabel=0];')
    return "digraph dot {\nsubgraph cluster_1 {" + "\n".join(nodes) + "\n}\n}\n"


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of everything that is another in a rehearsal."""
    yield from gpu_replacements()
    yield from toy_replacements()


def gpu_replacements() -> Iterator[tuple[Any, str, Any]]:
    """Of these, what stands for a GPU."""
    for name in ("Event", "CUDAGraph", "Stream", "stream", "graph"):
        yield torch.cuda, name, StandIn
    for name in ("synchronize", "empty_cache", "current_stream", "set_stream"):
        yield torch.cuda, name, StandIn()
    yield torch.cuda, "get_device_name", lambda device=None: _GPU_NAME
    yield torch.cuda, "memory_allocated", lambda device=None: 100
    yield torch.cuda, "max_memory_allocated", lambda device=None: 164
    yield torch.cuda, "reset_peak_memory_stats", lambda device=None: None
    yield timing, "wake", lambda device: None


def toy_replacements() -> Iterator[tuple[Any, str, Any]]:
    """Of these, what makes every row compute a toy of its kind on the CPU, under its own name."""
    ours, of_host, of_picture = op.ours, HostRow.inputs, PictureRow.contenders

    def op_inputs(row: OpRow, device: torch.device, dtype: torch.dtype) -> op.Inputs:
        return op.make_inputs(OpRow(row.kind, min(row.B, 2), 12, 5), _CPU, dtype)

    def host_inputs(row: HostRow, device: torch.device, dtype: torch.dtype) -> Any:
        return of_host(HostRow(row.host, _TOY_BACKBONE, side=32, C=3), _CPU, dtype)

    def picture_contenders(row: Row, device: torch.device, dtype: torch.dtype) -> Any:
        toy = PictureRow(row.host, _TOY_BACKBONE, 112, 112, 112, 112, 3)
        return of_picture(toy, _CPU, dtype)

    def interpreted(kind: str, backend: str, *rest: Any) -> Any:
        if os.environ.get("TRITON_INTERPRET") != "1":
            backend = "torch"
        return ours(kind, backend, *rest)

    yield OpRow, "inputs", op_inputs
    yield HostRow, "inputs", host_inputs
    yield PictureRow, "contenders", picture_contenders
    yield op, "ours", interpreted
    yield op, "require_memory", lambda needed, device: None
    # Without a compiler for C++, which not every machine has.
    yield torch, "compile", partial(torch.compile, backend="eager")
    yield timing, "_ROUNDS", 1
    yield timing, "_FEWEST_ROUNDS", 1
    yield timing, "_SERIES_SECONDS", 1e-6
    yield timing, "_LAUNCHES_COUNT_BELOW_SECONDS", 60.0
