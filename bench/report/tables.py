"""Markdown tables from committed results, between markers of README, results page and model card.

    python -m bench tables

rewrites them and draws the plots. What was not measured is called that.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial

from bench import FOLDER, RESULTS, ROOT
from bench.quality import tables as quality_tables
from bench.report import results_data as data
from bench.report.marks import marks
from bench.report.paper import LATENCY_MS, overhead
from bench.report.results_data import Record

README = ROOT / "README.md"
PAGE = FOLDER / "RESULTS.md"
MODEL_CARD = ROOT / "fsa" / "tiny" / "weights" / "MODEL_CARD.md"
NOT_MEASURED = "not measured"

_WAYS = ("fsa stored", "fsa streamed")
_ORDER = ("published", "algebra", "torch.compile", "fsa torch", "fsa triton")
MODES = ("published off", "published on", "fsa off", "fsa on")
_FIGURES = {
    "series": "calls one after another",
    "one_call": "one call alone, until the device has finished",
    "graph": "replayed from a CUDA graph: the device's own work",
}


def speed_table(
    record: Record | None,
    figure: str = "series",
    chosen: Callable[[Record], bool] = lambda row: True,
) -> str:
    """One line per op or step: medians in ms, and how often ours fits into the others.

    Args:
        record: of a run.
        figure: which of the timings.
        chosen: which rows.
    """
    rows = [row for row in _timed(record, "step", "op") if chosen(row)]
    if not rows:
        return NOT_MEASURED
    present = [name for name in _ORDER if any(name in row["contenders"] for row in rows)]
    ours = present[-1]
    lines = []
    for row in rows:
        mine = data.median(row, ours, figure)
        cells = [_time_cell(row, name, figure) for name in present]
        speedups = [
            _number(data.ratio(data.median(row, name, figure), mine), "×")
            for name in ("published", "torch.compile")
        ]
        lines.append([row["name"], *cells, *speedups])
    header = ["row", *present, f"{ours} over published", "over torch.compile"]
    return f"{_table(header, lines)}\n\n{_caption(record, _FIGURES[figure])}"


def host_table(record: Record | None, figure: str = "series") -> str:
    """Whole forwards in ms, and what FSA adds, beside the paper."""
    rows = _timed(record, "host")
    if not rows:
        return NOT_MEASURED
    time = partial(data.median, figure=figure)
    lines = [
        [
            row["name"],
            *(_time_cell(row, name, figure) for name in MODES),
            _number(data.overhead(row, "published", time), "%"),
            _number(data.overhead(row, "fsa", time), "%"),
            _number(overhead(row["host"], row["backbone"]), "%"),
            _number(data.ratio(time(row, "published off"), time(row, "fsa on")), "×"),
        ]
        for row in rows
    ]
    header = [
        "host",
        "published",
        "published + FSA",
        "here",
        "here + FSA",
        "FSA adds, published",
        "FSA adds, here",
        "FSA adds, by the paper",
        "published host over here + FSA",
    ]
    return f"{_table(header, lines)}\n\n{_caption(record, _FIGURES[figure])}"


def picture_table(record: Record | None) -> str:
    """Whole pictures in ms."""
    rows = _timed(record, "picture")
    if not rows:
        return NOT_MEASURED
    lines = [
        [
            row["name"],
            *(_time_cell(row, name, "series") for name in MODES),
            _number(
                data.ratio(*(data.median(row, f"{who} on") for who in ("published", "fsa"))), "×"
            ),
        ]
        for row in rows
    ]
    header = [
        "picture (window/stride)",
        "published loop",
        "with FSA",
        "here",
        "with FSA",
        "speedup",
    ]
    note = "from a decoded picture to labels in main memory; the speedup is with FSA"
    return f"{_table(header, lines)}\n\n{_caption(record, note)}"


def memory_table(record: Record | None) -> str:
    """Peak extra memory in MiB."""
    rows = _measured(record, "memory")
    if not rows:
        return NOT_MEASURED
    present = _present(rows, "memory")
    lines = [
        [
            row["name"],
            *(_cell(row, name, "memory", lambda b: f"{b / 2**20:.0f}") for name in present),
        ]
        for row in rows
    ]
    note = "MiB, the result included, the inputs not"
    return f"{_table(['row', *present], lines)}\n\n{_caption(record, note, times=False)}"


def numerics_table(record: Record | None) -> str:
    """Relative error, and the share of pruning decisions that differ, against float64."""
    rows = _measured(record, "numerics", "op", "step")
    if not rows:
        return NOT_MEASURED
    present = _present(rows, "numerics")

    def text(found: Record) -> str:
        error = found["relative_error"]
        parts = ["not finite" if error is None else f"{error:.1e}"]
        if "decisions_that_differ" in found:
            parts.append(f"{found['decisions_that_differ']:.1e}")
        return ", ".join(parts)

    lines = [
        [row["name"], *(_cell(row, name, "numerics", text) for name in present)] for row in rows
    ]
    note = (
        "the whole result's relative error against float64, and the share of pruning decisions "
        "that differ; of a batch the first and the last image"
    )
    return f"{_table(['row', *present], lines)}\n\n{_caption(record, note, times=False)}"


def host_numerics_table(record: Record | None) -> str:
    """Relative error of a host's features, and the largest that is accepted."""
    rows = _measured(record, "numerics", "host")
    if not rows:
        return NOT_MEASURED

    def text(found: Record) -> str:
        error = found["relative_error"]
        return "not finite" if error is None else f"{error:.1e} of {found['limit']:.1e}"

    lines = [[row["name"], *(_cell(row, name, "numerics", text) for name in MODES)] for row in rows]
    note = (
        "relative error of the features against the same forward in a wider type, of twice that "
        "of plain PyTorch"
    )
    header = ["host", "published", "published + FSA", "here", "here + FSA"]
    return f"{_table(header, lines)}\n\n{_caption(record, note, times=False)}"


def marks_table(record: Record | None, launches: Record | None = None) -> str:
    """What is promised on an H200 and what was measured."""
    lines = [
        [
            mark.text,
            f"{'≥' if mark.at_least else '≤'} {mark.limit:g} {mark.unit}".strip(),
            _number(mark.value, mark.unit),
            mark.verdict,
        ]
        for mark in marks(record, launches)
    ]
    table = _table(["mark", "limit", "measured", ""], lines)
    if record is None:
        return table
    return f"{table}\n\n{_caption(record, 'op rows: the work of the device, from a CUDA graph')}"


def launches_table(record: Record | None) -> str:
    """How many launches a forward makes on a GPU, as counted without one."""
    if record is None:
        return NOT_MEASURED
    lines = []
    for host, counts in record["hosts"].items():
        off, on = (sum(counts[mode].values()) for mode in ("off", "on"))
        lines.append([host, str(off), str(on), str(on - off)])
    caption = (
        f"{record['backbone']}, window {record['side']}, float16, counted op by op without a GPU, "
        f"`{record['command']}`."
    )
    return f"{_table(['host', 'alone', 'with FSA', 'FSA adds'], lines)}\n\n{caption}"


def paper_table() -> str:
    """The latencies that FSA's authors published."""
    lines = [
        [f"{host} {backbone}", f"{off}", f"{on}", f"{overhead(host, backbone):.1f}%"]
        for (host, backbone), (off, on) in LATENCY_MS.items()
    ]
    return _table(["host", "ms", "with FSA", "FSA adds"], lines)


def _timed(record: Record | None, *kinds: str) -> list[Record]:
    return [
        row
        for row in (data.rows(record, *kinds) if record else [])
        if any(set(entry) & set(_FIGURES) for entry in row["contenders"].values())
    ]


def _measured(record: Record | None, key: str, *kinds: str) -> list[Record]:
    kinds = kinds or ("op", "step", "host", "picture")
    return [
        row
        for row in (data.rows(record, *kinds) if record else [])
        if any(key in entry for entry in row["contenders"].values())
    ]


def _present(rows: list[Record], key: str) -> list[str]:
    return [
        name
        for name in (*_ORDER, *_WAYS, *MODES)
        if any(key in row["contenders"].get(name, {}) for row in rows)
    ]


def _cell(row: Record, name: str, key: str, text: Callable[..., str]) -> str:
    entry = row["contenders"].get(name)
    if entry is None:
        return "-"
    if key in entry:
        return text(entry[key])
    if "does_not_fit" in entry:
        return "does not fit"
    if "not_finished" in entry:
        return NOT_MEASURED
    return "failed" if "error" in entry else "-"


def _time_cell(row: Record, name: str, figure: str) -> str:
    def text(found: Record) -> str:
        if "median" in found:
            return f"{found['median']:.3g}" if found["median"] < 1000 else f"{found['median']:.0f}"
        return "does not fit" if "does_not_fit" in found else "failed"

    return _cell(row, name, figure, text)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return NOT_MEASURED
    space = " " if unit and unit not in "×%" else ""
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits}{space}{unit}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}", *rows])


def _caption(record: Record, note: str, *, times: bool = True) -> str:
    env = record["environment"]
    machine = env["gpu"] or f"{env['processor']}, CPU threads: {env['cpu_threads']}"
    versions = ", ".join(
        f"{name} {env[name]}" for name in ("torch", "triton", "open_clip_torch") if env[name]
    )
    head = "Medians in ms, " if times else ""
    return (
        f"{head}{note}. {record['dtype']}, {machine}, {versions}, commit {env['commit']}, "
        f"{env['date'][:10]}, `{env['command']}`."
    )


def _not_begun(record: Record | None) -> str:
    if record is None or not record["not_begun"]:
        return "Every row was begun."
    return "Not begun when the budget ended: " + "; ".join(record["not_begun"]) + "."


def tables(
    cpu: Record | None, gpu: Record | None, launches: Record | None = None
) -> dict[str, str]:
    """marker -> Markdown.

    Args:
        cpu, gpu: what `python -m bench cpu` and `gpu` wrote.
        launches: what `python -m bench launches` did.
    """
    made = {
        "paper": paper_table(),
        "launches": launches_table(launches),
        "marks": marks_table(gpu, launches),
        # On the GPU where it was measured.
        "hosts": host_table(gpu or cpu),
        "pictures": picture_table(gpu or cpu),
        "host-numerics-gpu": host_numerics_table(gpu),
        "speed-cpu": speed_table(cpu, chosen=lambda row: row["kind"] == "step"),
        "speed-gpu": speed_table(gpu, "graph", lambda row: row["B"] == 1 and row["C"] == 171),
    }
    for name, record in (("cpu", cpu), ("gpu", gpu)):
        made |= {
            f"speed-all-{name}": speed_table(record),
            f"host-{name}": host_table(record),
            f"picture-{name}": picture_table(record),
            f"memory-{name}": memory_table(record),
            f"numerics-{name}": numerics_table(record),
            f"not-begun-{name}": _not_begun(record) if record else NOT_MEASURED,
        }
    for figure in ("graph", "one_call"):
        made[f"speed-all-gpu-{figure}"] = speed_table(gpu, figure)
        made[f"host-gpu-{figure}"] = host_table(gpu, figure)
    return made | quality_tables.tables()


def fill(text: str, made: dict[str, str]) -> str:
    """The text with each `<!-- table NAME -->` ... `<!-- end -->` filled.

    Raises:
        KeyError: a marker without a table.
    """
    return re.sub(
        r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main(arguments: Sequence[str]) -> int:
    """Regenerates the README's tables, the results page and the plots."""
    parser = argparse.ArgumentParser(
        prog="python -m bench tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments[1:])
    cpu, gpu = data.load("cpu"), data.load("gpu")
    made = tables(cpu, gpu, data.load("launches"))
    for file in (README, PAGE, MODEL_CARD):
        file.write_text(fill(file.read_text(), made))
    try:
        from bench.report import plots
    except ModuleNotFoundError as error:
        raise SystemExit(f"the plots need {error.name}: pip install '.[bench]'") from None
    plots.draw(cpu, gpu, RESULTS / "cost.png")
    return 0
