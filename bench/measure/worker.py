"""Measures jobs in a process of its own, so that nothing a contender does can end the run.

A kernel that reads where it must not leaves the whole process without its GPU, one that never ends
leaves it waiting, and a process that takes too much memory is killed. The job is then done again in
a new process without that contender, whose record says what happened.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.measure import memory, numerics, timing
from bench.rows.contenders import SHARES, Call, Job, Row, describe, failure, release, synchronise
from bench.rows.hosts import HostRow
from bench.rows.op import OpRow

# So often is a capture that fails tried for a contender in rows of one kind.
_TRIES = 2

# A process has to import everything and to wake the GPU first.
_START_SECONDS = 180.0


class DeviceLost(Exception):
    """The device answers nothing any more; holds what led to it."""


@torch.no_grad()
def measure(
    job: Job,
    device: torch.device,
    dtype: torch.dtype,
    *,
    skip: frozenset[str] = frozenset(),
    uncaptured: frozenset[str] = frozenset(),
    at: Callable[[str], None] = lambda contender: None,
) -> tuple[dict[str, Any], bool]:
    """Does a job in this process.

    Args:
        job: the row and what to measure of it.
        device, dtype: of the inputs.
        skip: contenders to leave out.
        uncaptured: contenders that are not captured in CUDA graphs.
        at: told the contender before each of its turns.

    Returns:
        The record, and whether this process should measure nothing more.

    Raises:
        DeviceLost: the device failed for good.
    """
    start = time.perf_counter()
    row = job.row
    torch.manual_seed(0)
    record: dict[str, Any] = {**describe(row), "contenders": {}}
    entries: dict[str, dict[str, Any]] = record["contenders"]
    if job.measures == ("memory",) and device.type == "cpu":
        _cpu_memory(row, dtype, entries, skip, at)
        record["seconds"] = round(time.perf_counter() - start, 2)
        return record, False

    options = {}
    judge = None
    if isinstance(row, (OpRow, HostRow)):
        options["inputs"] = row.inputs(device, dtype)
        if "numerics" in job.measures:
            try:
                judge = numerics.judge_for(row, options["inputs"])
            except Exception as error:
                record["exact"] = {}
                _record_failure(record["exact"], error, device)
    calls: dict[str, Call] = {}
    for name, build in row.contenders(device, dtype, **options).items():
        if name in skip:
            continue
        at(name)
        entries[name] = {}
        began = time.perf_counter()
        try:
            call = build()
            result = call()
            synchronise(device)
            # With compilation, where there is any.
            entries[name]["first_call_s"] = round(time.perf_counter() - began, 3)
            if "labels" in job.measures:
                entries[name]["labels"] = dict(zip(SHARES, result.tolist(), strict=True))
            if judge is not None:
                entries[name]["numerics"] = judge(name, result)
            del result
            if "memory" in job.measures:
                entries[name]["memory"] = memory.peak_extra_bytes_cuda(call, device)
            calls[name] = call
        except Exception as error:
            _record_failure(entries[name], error, device)
    judge = None
    release(device)
    spoilt = False
    if "time" in job.measures:
        try:
            # It idled while something was compiled.
            timing.wake(device)
            figures, spoilt = timing.time_calls(
                calls, device, graphs=row.graphs, uncaptured=uncaptured, at=at
            )
        except Exception as error:
            raise DeviceLost(failure(error)) from error
        for name, figure in figures.items():
            entries[name] |= figure
    record["seconds"] = round(time.perf_counter() - start, 2)
    return record, spoilt


def _cpu_memory(
    row: Row,
    dtype: torch.dtype,
    entries: dict[str, dict[str, Any]],
    skip: frozenset[str],
    at: Callable[[str], None],
) -> None:
    for name in row.small().contenders(torch.device("cpu"), dtype):
        if name in skip or name == "torch.compile":
            continue
        at(name)
        try:
            entries[name] = {"memory": memory.peak_extra_bytes_cpu(row, name, dtype)}
        except Exception as error:
            entries[name] = failure(error)


def _record_failure(entry: dict[str, Any], error: Exception, device: torch.device) -> None:
    entry |= failure(error)
    # The frames of the failed call hold its tensors.
    error.with_traceback(None)
    release(device)
    try:
        synchronise(device)
    except Exception as lost:
        raise DeviceLost(entry) from lost


class Worker:
    """Does jobs one after another in another process, and starts it anew where it is lost.

    Args:
        device, dtype: of the inputs.
        patience: seconds without news of a contender after which it is given up.
        prepare: called in each new process before anything else; a function of a module.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        patience: float,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._settings = (device, dtype, prepare)
        self._patience = patience
        self._failed_captures: Counter[tuple[str, str]] = Counter()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def do(self, job: Job, deadline: float) -> dict[str, Any]:
        """The record of a job, with what became of contenders that took the process with them.

        Args:
            job: the row and what to measure.
            deadline: of `time.monotonic`, when to give up.
        """
        lost: dict[str, dict[str, str]] = {}
        while True:
            record, contender, reason = self._try(job, frozenset(lost), deadline)
            if record is not None:
                record["contenders"] |= lost
                return record
            self.stop()
            if contender is not None and contender not in lost:
                lost[contender] = reason
            if contender is None or time.monotonic() > deadline:
                return {**describe(job.row), "contenders": lost, **reason}

    def _try(
        self, job: Job, skip: frozenset[str], deadline: float
    ) -> tuple[dict[str, Any] | None, str | None, dict[str, str]]:
        """The record, or None with the contender that was at work and what happened."""
        connection = self._started()
        connection.send((job, skip, self._uncaptured(job.row.kind)))
        contender = None
        patience = _START_SECONDS
        while True:
            left = deadline - time.monotonic()
            if not connection.poll(max(0, min(patience, left))):
                if left < patience:
                    return None, contender, {"not_finished": "the budget ended meanwhile"}
                return None, contender, {"error": f"gave no sign of life for {patience:.0f} s"}
            try:
                tag, content = connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                code = self._process.exitcode
                return None, contender, {"error": f"its process ended with exit code {code}"}
            patience = self._patience
            if tag == "at":
                contender = content
            elif tag == "lost":
                return None, contender, content
            else:
                record, spoilt = content
                if spoilt:
                    self.stop()
                self._failed_captures.update(
                    (job.row.kind, name)
                    for name, entry in record["contenders"].items()
                    if "graph" in entry and "median" not in entry["graph"]
                )
                return record, None, {}

    def _uncaptured(self, kind: str) -> frozenset[str]:
        """Contenders whose captures failed too often in rows of a kind."""
        failed = self._failed_captures
        return frozenset(name for k, name in failed if k == kind and failed[k, name] >= _TRIES)

    def _started(self) -> Connection:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, *self._settings))
            self._process.start()
            other.close()
        return self._connection

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._connection.close()
            # With the processes that it started itself: compilers, probes of memory.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(
    connection: Connection,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[], None] | None,
) -> None:
    """The other process: does jobs until the connection is closed."""
    os.setsid()
    if prepare is not None:
        prepare()
    # Memory is collected around every measurement: what was imported need not be gone through.
    gc.freeze()
    while True:
        try:
            job, skip, uncaptured = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send(("at", None))
        try:
            done = measure(
                job,
                device,
                dtype,
                skip=skip,
                uncaptured=uncaptured,
                at=lambda name: connection.send(("at", name)),
            )
            connection.send(("done", done))
        except DeviceLost as error:
            connection.send(("lost", error.args[0]))
        except Exception as error:
            # The row's inputs or models could not be made: that is the row's record.
            record = {**describe(job.row), "contenders": {}, **failure(error)}
            connection.send(("done", (record, True)))
        release(device)
