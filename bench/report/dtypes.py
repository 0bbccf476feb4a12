"""Markdown tables of the rows that compare types on the CPU."""

from __future__ import annotations

from bench.report import results_data as data
from bench.report.markdown import NOT_MEASURED, caption, number, table
from bench.report.results_data import Record
from bench.rows.dtypes import HALVES, STEPS, TYPES, short_name

_TYPES = tuple(map(short_name, TYPES))
_HALVES = tuple(map(short_name, HALVES))
_WINDOW = {
    "fsa off": "clearclip",
    "fsa on": "clearclip with FSA",
    "trunk": "all blocks but the last",
}


def tables(record: Record | None) -> dict[str, str]:
    """marker -> Markdown.

    Args:
        record: of `python -m bench cpu`, all of it or `--only dtypes`.
    """
    rows = data.rows(record, "dtypes") if record else []
    parts = {
        part: [row for row in rows if row["name"].startswith(part)]
        for part in ("window", "step", "labels")
    }
    return {
        "dtypes-window": _window_table(record, parts["window"]),
        "dtypes-step": _step_table(record, parts["step"]),
        "dtypes-labels": _labels_table(record, parts["labels"]),
    }


def _window_table(record: Record | None, rows: list[Record]) -> str:
    if record is None or not rows:
        return NOT_MEASURED
    lines = [
        [title, *(_median(row, f"{name}, {dtype}") for dtype in _TYPES)]
        for row in rows
        for name, title in _WINDOW.items()
    ]
    return f"{table(['', *_TYPES], lines)}\n\n{caption(record, _TIMED, dtype=False)}"


def _step_table(record: Record | None, rows: list[Record]) -> str:
    if record is None or not rows:
        return NOT_MEASURED
    lines = []
    for row in rows:
        for dtype in _TYPES:
            names = [f"{name}, {dtype}" for name in STEPS]
            over = data.ratio(data.median(row, names[0]), data.median(row, names[-1]))
            cells = (_median(row, name) for name in names)
            lines.append([str(row["N"]), dtype, *cells, number(over, "×")])
    header = ["patches", "type", "step", "the same without the units, or by MKL", "products"]
    made = table([*header, "step over products"], lines)
    return f"{made}\n\n{caption(record, _TIMED, dtype=False)}"


def _labels_table(record: Record | None, rows: list[Record]) -> str:
    if record is None or not rows:
        return NOT_MEASURED

    def cell(row: Record, half: str) -> str:
        found = row["contenders"].get(half, {}).get("labels")
        return f"{found['equal']:.2%} ({found['lowest']:.2%})" if found else NOT_MEASURED

    lines = [
        [row["host"], row["folder"] or "scenes of this project", *(cell(row, h) for h in _HALVES)]
        for row in rows
    ]
    weights = record["environment"].get("tiny", "unknown")
    note = (
        "Share of pixels with the label of float32, in brackets that of the picture where it is "
        f"lowest. `tiny` with the weights {weights}"
    )
    made = table(["host", "pictures", *_HALVES], lines)
    return f"{made}\n\n{caption(record, note, times=False, dtype=False)}"


_TIMED = "all in turns"


def _median(row: Record, name: str) -> str:
    return number(data.median(row, name), "")
