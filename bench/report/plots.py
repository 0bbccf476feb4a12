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
_MARKERS = {"published": "s", "torch.compile": "^", "here": "o", "paper": "D"}
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
    hosts = len(_host_rows(record))
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure(figsize=(12, 5.2 if hosts <= 6 else 7.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _step(left, record)
        _overheads(right, record)
        figure.supxlabel(_caption(record), color=_GREY, fontsize=8)
        if record is not None and record.get("rehearsal"):
            mark = {"ha": "center", "va": "center", "rotation": 25, "alpha": 0.25}
            figure.text(0.5, 0.5, "REHEARSAL, NOT MEASURED", color="red", fontsize=48, **mark)
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
    """How much longer whole forwards take with FSA: medians, and what their ranges allow."""
    axes.set_title("A whole forward with FSA, over one without", loc="left", weight="bold", pad=24)
    rows = _host_rows(record)
    if not rows:
        _not_measured(axes)
        return
    series = (
        ("published code", "published", lambda row: _stretched(row, "published")),
        ("by the paper, on its own GPU", "paper", _stretched_by_paper),
        ("this library", "here", lambda row: _stretched(row, "fsa")),
    )
    for offset, (label, name, value) in enumerate(series):
        for number, row in enumerate(rows):
            found = value(row)
            if found is None:
                continue
            middle, low, high = found
            height = number + (offset - 1) * 0.26
            axes.errorbar(
                middle,
                height,
                xerr=[[middle - low], [high - middle]],
                color=_COLOURS[name],
                marker=_MARKERS[name],
                capsize=3,
                label=label if number == 0 else None,
            )
            axes.annotate(
                f"{100 * (middle - 1):+.1f}%",
                (high, height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=_COLOURS[name] if name != "paper" else _GREY,
                fontsize=8,
            )
    axes.axvline(1, color=_GREY, lw=1)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.99), high + 0.12 * (high - low))
    axes.set(xlabel="times the time without FSA (linear scale; 1 is free)")
    names = [f"{_HOST_LABELS.get(row['host'], row['host'])}\n{row['backbone']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, **_SMALL)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.985), ncols=3, frameon=False, **_SMALL)


def _stretched(row: Record, name: str) -> tuple[float, float, float] | None:
    """Time with FSA over time without: of the medians, and the least and most of their ranges.

    The ranges are from the 20th to the 80th percentile of each.
    """
    entries = [row["contenders"].get(f"{name} {mode}", {}).get("series") for mode in ("on", "off")]
    if not all(entry and "median" in entry for entry in entries):
        return None
    on, off = entries
    middle = on["median"] / off["median"]
    low = on.get("p20", on["median"]) / off.get("p80", off["median"])
    high = on.get("p80", on["median"]) / off.get("p20", off["median"])
    return middle, low, high


def _stretched_by_paper(row: Record) -> tuple[float, float, float] | None:
    percent = overhead(row["host"], row["backbone"])
    return None if percent is None else (1 + percent / 100,) * 3


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
        f"{machine}, {record['dtype']}, torch {env['torch']}, "
        f"{data.commit_text(record).strip('*')}, {env['date'][:10]}. Medians; bars span what the "
        "20th and 80th percentiles allow."
    )
