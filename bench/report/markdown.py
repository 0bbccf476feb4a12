"""Pieces of Markdown that all tables of results are made of."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import results_data as data
from bench.report.results_data import Record

NOT_MEASURED = "not measured"


def number(value: float | None, unit: str) -> str:
    """A measured number of three digits, with its unit."""
    if value is None:
        return NOT_MEASURED
    space = " " if unit and unit not in "×%" else ""
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits}{space}{unit}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}", *rows])


def caption(record: Record, note: str, *, times: bool = True, dtype: bool = True) -> str:
    """What was measured, where, with which versions, of which commit, and by which command.

    Args:
        record: of a run.
        note: what the table shows.
        times: whether that is medians in ms.
        dtype: whether all of it was computed in the type of the run.
    """
    env = record["environment"]
    machine = env["gpu"] or f"{env['processor']}, CPU threads: {env['cpu_threads']}"
    versions = ", ".join(
        f"{name} {env[name]}" for name in ("torch", "triton", "open_clip_torch") if env[name]
    )
    head = "Medians in ms, " if times else ""
    of_type = f"{record['dtype']}, " if dtype else ""
    if env.get("driver"):
        versions += f", driver {env['driver']}"
    return (
        f"{head}{note}. {of_type}{machine}, {versions}, {data.commit_text(record)}, "
        f"{env['date'][:10]}, `{env['command']}`."
    )
