"""Markdown tables from committed results, between markers of every page that has some.

    python -m bench tables [--results FOLDER]

rewrites them and draws the plots. What was not measured is called that. With another folder than
bench/results, which is how a rehearsal or a run elsewhere is looked at, the results page and the
plot are written there and nothing else is touched.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench import FOLDER, RESULTS, ROOT
from bench.quality import tables as quality_tables
from bench.report import dtypes, h200
from bench.report import results_data as data
from bench.report.markdown import NOT_MEASURED, caption, number, table
from bench.report.marks import marks
from bench.report.paper import LATENCY_MS, overhead
from bench.report.predicted import predictions
from bench.report.results_data import Record

PAGE = FOLDER / "RESULTS.md"

_WAYS = ("fsa stored", "fsa streamed")
_ORDER = ("published", "algebra", "torch.compile", "flashinfer", "fsa torch", "fsa triton")
MODES = ("published off", "published on", "fsa off", "fsa on")
_MODE_TITLES = ["published baseline", "published + FSA", "baseline here", "+ FSA here"]
_FIGURES = {
    "series": "calls one after another",
    "one_call": "a single call until the device has finished",
    "graph": "replayed from a CUDA graph, the device's own work",
}


FIGURES = tuple(_FIGURES)


def pages() -> Iterator[Path]:
    """Every Markdown file of the project that has a marker."""
    places = (ROOT.glob("*.md"), ROOT.glob("docs/**/*.md"), (PAGE,), ROOT.glob("fsa/**/*.md"))
    for place in places:
        for file in sorted(place):
            if "<!-- table " in file.read_text():
                yield file


def speed_table(
    record: Record | None,
    figures: Sequence[str] = ("series",),
    chosen: Callable[[Record], bool] = lambda row: True,
) -> str:
    """One line per op or step: medians in ms, and how often ours fits into the others.

    Args:
        record: of a run.
        figures: which of the timings, beside each other in a cell.
        chosen: which rows.
    """
    rows = [row for row in _timed(record, "step", "op") if chosen(row)]
    if not rows:
        return NOT_MEASURED
    present = [name for name in _ORDER if any(name in row["contenders"] for row in rows)]
    ours = present[-1]
    time = data.median if figures == ("series",) else data.device_time
    lines = []
    for row in rows:
        cells = [_time_cells(row, name, figures) for name in present]
        speedups = [
            number(data.ratio(time(row, name), time(row, ours)), "×")
            for name in ("published", "torch.compile")
        ]
        lines.append([row["name"], *cells, *speedups])
    header = ["row", *present, f"{ours} over published", "over torch.compile"]
    return f"{table(header, lines)}\n\n{caption(record, _named(figures))}"


def host_table(record: Record | None, figures: Sequence[str] = ("series",)) -> str:
    """Whole forwards in ms, and what FSA adds, beside the paper."""
    rows = _timed(record, "host")
    if not rows:
        return NOT_MEASURED
    times = [partial(data.median, figure=figure) for figure in figures]

    def each(value: Callable[[Callable[..., float | None]], float | None], unit: str) -> str:
        return _beside(number(value(time), unit) for time in times)

    lines = [
        [
            row["name"],
            *(_time_cells(row, name, figures) for name in MODES),
            each(partial(data.overhead, row, "published"), "%"),
            each(partial(data.overhead, row, "fsa"), "%"),
            number(overhead(row["host"], row["backbone"]), "%"),
            each(lambda time, row=row: data.ratio(time(row, MODES[0]), time(row, MODES[3])), "×"),
        ]
        for row in rows
    ]
    header = [
        "host",
        *_MODE_TITLES,
        "FSA adds, published",
        "FSA adds, here",
        "FSA adds, by the paper",
        "published baseline over + FSA here",
    ]
    return f"{table(header, lines)}\n\n{caption(record, _named(figures))}"


def picture_table(record: Record | None) -> str:
    """Whole pictures in ms."""
    rows = _timed(record, "picture")
    if not rows:
        return NOT_MEASURED
    lines = [
        [
            row["name"],
            *(_time_cells(row, name, ("series",)) for name in MODES),
            number(
                data.ratio(*(data.median(row, f"{who} on") for who in ("published", "fsa"))), "×"
            ),
        ]
        for row in rows
    ]
    header = ["picture (window/stride)", *_MODE_TITLES, "speedup"]
    note = "from a decoded picture to labels in main memory; the speedup is with FSA"
    return f"{table(header, lines)}\n\n{caption(record, note)}"


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
    return f"{table(['row', *present], lines)}\n\n{caption(record, note, times=False)}"


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
    return f"{table(['row', *present], lines)}\n\n{caption(record, note, times=False)}"


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
    header = ["host", *_MODE_TITLES]
    return f"{table(header, lines)}\n\n{caption(record, note, times=False)}"


def marks_table(record: Record | None, launches: Record | None = None) -> str:
    """What is promised on an H200 and what was measured."""
    lines = [
        [
            mark.text,
            f"{'≥' if mark.at_least else '≤'} {mark.limit:g} {mark.unit}".strip(),
            number(mark.value, mark.unit),
            mark.verdict,
        ]
        for mark in marks(record, launches)
    ]
    made = table(["mark", "limit", "measured", ""], lines)
    if record is None:
        return made
    return f"{made}\n\n{caption(record, 'op rows: the work of the device, from a CUDA graph')}"


def launches_table(record: Record | None) -> str:
    """How many launches a forward makes on a GPU, as counted without one."""
    if record is None:
        return NOT_MEASURED
    backbone, counted = next(iter(record["backbones"].items()))
    lines = []
    for host, modes in counted.items():
        off, on = (sum(modes[mode]["launches"].values()) for mode in ("off", "on"))
        lines.append([host, str(off), str(on), str(on - off)])
    made = table(["host", "baseline", "with FSA", "FSA adds"], lines)
    return f"{made}\n\n{backbone}, {_counted(record)}"


def predicted_table(record: Record | None) -> str:
    """What FSA should add on an H200, from counts and shapes, beside the paper."""
    found = predictions(record)
    if not found:
        return NOT_MEASURED
    costs = (0.0, h200.LAUNCH_SECONDS)
    lines = [
        [
            f"{one.host} {one.backbone}",
            str(one.off.launches),
            str(one.on.launches - one.off.launches),
            f"{(one.on.bytes - one.off.bytes) / 1e6:.0f}",
            f"{(one.on.products - one.off.products) / 1e9:.1f}",
            f"{1e6 * (one.on.floor - one.off.floor):.0f}",
            " / ".join(f"{one.overhead(cost):.1f}%" for cost in costs),
            number(overhead(one.host, one.backbone), "%"),
        ]
        for one in found
    ]
    header = [
        "host",
        "launches of the baseline",
        "FSA adds launches",
        "MB",
        "GFLOP of products",
        "µs at the floor",
        "FSA adds, predicted: free launches / 3 µs each",
        "FSA adds, by the paper on its own GPU",
    ]
    method = (
        "Predicted, not measured. The time of a forward is the sum over its ops of the larger of "
        f"bytes over {h200.BYTES_A_SECOND / 1e12:g} TB/s and of arithmetic: products over "
        f"{h200.HALF_FLOPS / 1e12:.0f} TFLOP/s, the search for the threshold "
        f"over {h200.FLOPS / 1e12:.0f} TFLOP/s at 50 operations an entry; plus nothing or "
        f"{1e6 * h200.LAUNCH_SECONDS:g} µs a launch. Each tensor that a launch is given moves "
        "once, whatever stays in the cache. No op reaches its floor, so a ratio of such times says "
        "where FSA's cost should lie, and no more"
    )
    return f"{table(header, lines)}\n\n{method}. {_counted(record)}"


def _counted(record: Record) -> str:
    env = record["environment"]
    return (
        f"window {record['side']}, {record['classes']} classes, float16, counted op by op without "
        f"a GPU, torch {env['torch']}, {data.commit_text(record)}, `{env['command']}`."
    )


def paper_table() -> str:
    """The latencies that FSA's authors published."""
    lines = [
        [f"{host} {backbone}", f"{off}", f"{on}", f"{overhead(host, backbone):.1f}%"]
        for (host, backbone), (off, on) in LATENCY_MS.items()
    ]
    return table(["host", "baseline, ms", "with FSA, ms", "FSA adds"], lines)


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
    if "not_installed" in entry:
        return "not installed"
    if "not_finished" in entry:
        return NOT_MEASURED
    return "failed" if "error" in entry else "-"


def _time_cells(row: Record, name: str, figures: Sequence[str]) -> str:
    def text(found: Record) -> str:
        if "median" in found:
            return f"{found['median']:.3g}" if found["median"] < 1000 else f"{found['median']:.0f}"
        return "does not fit" if "does_not_fit" in found else "failed"

    return _beside(_cell(row, name, figure, text) for figure in figures)


def _beside(cells: Iterable[str]) -> str:
    """Cells in one; what is the same in all of them is said once."""
    said = list(cells)
    return said[0] if len(set(said)) == 1 else " / ".join(said)


def _named(figures: Sequence[str]) -> str:
    return " / ".join(_FIGURES[figure] for figure in figures)


def _not_begun(record: Record | None) -> str:
    if record is None or not record["not_begun"]:
        return "Every row was begun."
    return "Not begun when the budget ended: " + "; ".join(record["not_begun"]) + "."


def tables(
    cpu: Record | None,
    gpu: Record | None,
    launches: Record | None = None,
    types: Record | None = None,
) -> dict[str, str]:
    """marker -> Markdown.

    Args:
        cpu, gpu: what `python -m bench cpu` and `gpu` wrote.
        launches: what `python -m bench launches` did.
        types: what `python -m bench cpu --only dtypes` did, where `cpu` has none of it.
    """
    made = {
        "paper": paper_table(),
        "launches": launches_table(launches),
        "predicted": predicted_table(launches),
        "marks": marks_table(gpu, launches),
        # On the GPU where it was measured.
        "hosts": host_table(gpu or cpu),
        "pictures": picture_table(gpu or cpu),
        "host-numerics-gpu": host_numerics_table(gpu),
        "speed-cpu": speed_table(cpu, chosen=lambda row: row["kind"] == "step"),
        "speed-gpu": speed_table(gpu, FIGURES, lambda row: row["B"] == 1 and row["C"] == 171),
    }
    for name, record in (("cpu", cpu), ("gpu", gpu)):
        figures = FIGURES if name == "gpu" else ("series",)
        made |= {
            f"speed-all-{name}": speed_table(record, figures),
            f"host-{name}": host_table(record, figures),
            f"picture-{name}": picture_table(record),
            f"memory-{name}": memory_table(record),
            f"numerics-{name}": numerics_table(record),
            f"not-begun-{name}": _not_begun(record) if record else NOT_MEASURED,
        }
    compared = cpu if cpu is not None and data.rows(cpu, "dtypes") else types
    return made | dtypes.tables(compared) | quality_tables.tables()


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
    """Regenerates the tables of every page, and the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m bench tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default bench/results")
    folder = parser.parse_args(arguments[1:]).results
    cpu, gpu, launches, types = (data.load(name, folder) for name in data.NAMES)
    made = tables(cpu, gpu, launches, types)
    if folder.resolve() == RESULTS.resolve():
        for file in pages():
            file.write_text(fill(file.read_text(), made))
    else:
        (folder / PAGE.name).write_text(fill(PAGE.read_text(), made))
    try:
        from bench.report import plots
    except ModuleNotFoundError as error:
        raise SystemExit(f"the plots need {error.name}: pip install '.[bench]'") from None
    plots.draw(cpu, gpu, folder / "cost.png")
    return 0
