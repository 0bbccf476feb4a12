"""Reads committed results: rows by kind, and the figures that tables and plots are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.environment import unpublishable

Entry = dict[str, Any]
Record = dict[str, Any]

NAMES = ("cpu", "gpu", "launches", "dtypes")


def load(name: str, folder: Path = RESULTS) -> Record | None:
    """The results of one of `NAMES`, or None where nothing was measured."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def commit_text(record: Record) -> str:
    """Which code a result is of; in bold what keeps it from being one to quote."""
    reason = unpublishable(record)
    return f"commit {record['environment']['commit']}" if reason is None else f"**{reason}**"


def rows(record: Record, *kinds: str) -> list[Record]:
    """The rows of some kinds in the order of the run; what several jobs found is put together."""
    merged: dict[str, Record] = {}
    for row in record["rows"]:
        if row["kind"] not in kinds:
            continue
        known = merged.setdefault(row["name"], {**row, "contenders": {}})
        for name, entry in row["contenders"].items():
            known["contenders"].setdefault(name, {}).update(entry)
    return list(merged.values())


def find(record: Record | None, **wanted: Any) -> Record | None:
    """The one row with these fields, or None."""
    if record is None:
        return None
    for row in rows(record, wanted["kind"]):
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    return None


def median(row: Record | None, contender: str, figure: str = "series") -> float | None:
    """A median in ms, or None where it was not measured."""
    entry = (row or {"contenders": {}})["contenders"].get(contender, {})
    return entry.get(figure, {}).get("median")


def device_time(row: Record | None, contender: str) -> float | None:
    """The device's own work in ms: the graph's median, or the series' where there is no graph."""
    graph = median(row, contender, "graph")
    return graph if graph is not None else median(row, contender, "series")


def overhead(
    row: Record | None,
    name: str,
    time: Callable[[Record | None, str], float | None] = median,
) -> float | None:
    """What FSA adds to "published" or "fsa", in percent of the host without it."""
    off, on = time(row, f"{name} off"), time(row, f"{name} on")
    return None if off is None or on is None else 100 * (on / off - 1)


def ratio(slow: float | None, fast: float | None) -> float | None:
    """How often one time fits into another, or None where one is missing."""
    return None if slow is None or fast is None else slow / fast
