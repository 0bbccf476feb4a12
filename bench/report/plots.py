"""One picture: what FSA costs in the published code, in torch.compile, and here."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import results_data as data
from bench.report.paper import overhead
from bench.report.results_data import Record

# Okabe and Ito's palette, which colour-blind readers can tell apart; shapes differ as well.
_COLOURS = {
    "published": "#D55E00",
    "torch.compile": "#0072B2",
    "here": "#009E73",
    "paper": "#999999",
}
_MARKERS = {"published": "s", "torch.compile": "^", "here": "o"}
_LABELS = {
    "published": "published code",
    "torch.compile": "exact algebra,\ntorch.compile",
    "here": "this library",
}
_CLASSES = 171
# Its label would run into its neighbour's.
_BETWEEN = 1024
_HOST_LABELS = {
    "proxyclip": "ProxyCLIP",
    "clearclip": "ClearCLIP",
    "maskclip": "MaskCLIP",
    "sclip": "SCLIP",
}
_SMALL = {"fontsize": 9}
_GREY = "#555555"


def draw(cpu: Record | None, gpu: Record | None, file: Path) -> None:
    """Draws both panels from the GPU's results, or from the CPU's where there are none.

    Args:
        cpu, gpu: results, or None where nothing was measured.
        file: PNG to write.
    """
    record = gpu or cpu
    bars = len(_host_rows(record))
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure(figsize=(12, 5.2 if bars <= 6 else 7.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _step(left, record)
        _overheads(right, record)
        figure.supxlabel(_caption(record), color=_GREY, fontsize=8)
        figure.savefig(file, dpi=150, facecolor="white")


def _step(axes: Axes, record: Record | None) -> None:
    """Time of the feedback step over the number of patches."""
    axes.set_title("The feedback step, one picture, 171 classes", loc="left", weight="bold", pad=24)
    rows = [
        row
        for row in (data.rows(record, "step") if record else [])
        if row["B"] == 1 and row["C"] == _CLASSES and data.device_time(row, _ours(record))
    ]
    if not rows:
        _not_measured(axes)
        return
    rows.sort(key=lambda row: row["N"])
    sizes = [row["N"] for row in rows]
    ends = {}
    for name, contender in (
        ("published", "published"),
        ("torch.compile", "torch.compile"),
        ("here", _ours(record)),
    ):
        points = [(row["N"], data.device_time(row, contender)) for row in rows]
        points = [(N, ms) for N, ms in points if ms is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=_COLOURS[name], marker=_MARKERS[name], lw=2)
        ends[name] = points[-1]
    axes.set(xscale="log", yscale="log", xlabel="patches N", ylabel="ms (log scale)")
    axes.set_xticks(sizes, [str(N) if N != _BETWEEN else "" for N in sizes])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    # Room for the labels at the ends of the lines.
    axes.set_xlim(sizes[0] / 1.1, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.42 * 1.3)
    here = {row["N"]: data.device_time(row, _ours(record)) for row in rows}
    for name, (N, ms) in ends.items():
        text = _LABELS[name]
        if name != "here":
            times = ms / here[N]
            text += f"\n{times:.0f}× the time" if times >= 10 else f"\n{times:.1f}× the time"
        axes.annotate(
            text,
            (N, ms),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=_COLOURS[name],
            weight="bold",
            **_SMALL,
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5")


def _overheads(axes: Axes, record: Record | None) -> None:
    """What FSA adds to whole forwards."""
    axes.set_title("What FSA adds to a whole forward", loc="left", weight="bold", pad=24)
    rows = _host_rows(record)
    if not rows:
        _not_measured(axes)
        return
    height = 0.26
    bars = (
        ("published code", "published", lambda row: data.overhead(row, "published")),
        (
            "by the paper, on its own GPU",
            "paper",
            lambda row: overhead(row["host"], row["backbone"]),
        ),
        ("this library", "here", lambda row: data.overhead(row, "fsa")),
    )
    # Below one percent noise decides; a bar needs a positive end on this scale.
    least = 0.1
    for offset, (label, colour, value) in enumerate(bars):
        values = [value(row) for row in rows]
        centres = [i + (offset - 1) * height for i in range(len(rows))]
        widths = [max(v, least) if v is not None else 0 for v in values]
        axes.barh(centres, widths, height * 0.92, color=_COLOURS[colour], label=label)
        for centre, width, v in zip(centres, widths, values, strict=True):
            text = "not measured" if v is None else f"{v:.1f}%" if abs(v) < 100 else f"{v:.0f}%"
            axes.annotate(
                text,
                (max(width, least), centre),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                color=_COLOURS[colour] if colour != "paper" else _GREY,
                fontsize=8,
            )
    axes.set(xscale="log", xlabel="percent of the host without FSA (log scale)")
    axes.set_xlim(least, axes.get_xlim()[1] * 6)
    names = [f"{_HOST_LABELS.get(row['host'], row['host'])}\n{row['backbone']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, **_SMALL)
    axes.invert_yaxis()
    axes.minorticks_off()
    ticks = [t for t in (0.1, 1, 10, 100, 1000) if t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}%" for t in ticks])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.985), ncols=3, frameon=False, **_SMALL)


def _host_rows(record: Record | None) -> list[Record]:
    rows = data.rows(record, "host") if record else []
    return [row for row in rows if data.overhead(row, "fsa") is not None]


def _ours(record: Record) -> str:
    return "fsa triton" if record["environment"]["gpu"] else "fsa torch"


def _not_measured(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def _caption(record: Record | None) -> str:
    if record is None:
        return "not measured"
    env = record["environment"]
    machine = env["gpu"] or f"{env['processor']}, CPU threads: {env['cpu_threads']}"
    return (
        f"{machine}, {record['dtype']}, torch {env['torch']}, commit {env['commit']}, "
        f"{env['date'][:10]}. Medians."
    )
