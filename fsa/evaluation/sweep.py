"""The paper's ablations and the sensitivity of its two constants, over any dataset."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fsa.config import ADAPTATIONS, FSAConfig
from fsa.errors import InputError
from fsa.evaluation import paper
from fsa.evaluation.result import Result
from fsa.files import write_whole

# Points of mIoU that the plot of a sweep shows at least.
_LEAST_SPAN = 10.0
CONFIDENCES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.9)
BETAS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class Row:
    """A row of an ablation table.

    Attributes:
        table: "pruning", "isolation", "adaptations", "similarity", "confidence" or "beta".
        row: as the paper's data file calls it, or the value.
        cells: what the row says in the columns of `HEADS`.
        config: of feedback, or None for the host alone.
    """

    table: str
    row: str
    cells: tuple[str, ...]
    config: FSAConfig | None


HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pruning": ("Scaling and pruning (Table 5)", ("Scaling", "Pruning")),
    "isolation": ("Attention isolation (Table 6)", ("Attention isolation",)),
    "adaptations": ("Adaptations (Table 7)", ("A_f A V", "A A_f V", "A_f V")),
    "similarity": ("Similarity of patches (Table S9)", ("Similarity",)),
    "confidence": ("Sensitivity of p", ("p",)),
    "beta": ("Sensitivity of beta", ("beta",)),
}

SWEEPS = ("scaling", "pruning", "isolation", "adaptations", "similarity", "confidence", "beta")

_YES, _NO = "✓", "✗"
_BASELINE = "w/o FSA (baseline)"


def rows(names: Sequence[str], base: FSAConfig) -> list[Row]:
    """The rows of the sweeps asked for, in the paper's order.

    Args:
        names: out of `SWEEPS`; "scaling" and "pruning" share a table.
        base: what the other settings are.

    Raises:
        InputError: a name that is not known, or none at all.
    """
    unknown = [name for name in names if name not in SWEEPS]
    if unknown or not names:
        raise InputError(
            f"sweep {', '.join(unknown) or 'without a name'} is not known: {', '.join(SWEEPS)}"
        )
    found: list[Row] = []
    found += _pruning_rows("scaling" in names, "pruning" in names, base)
    if "isolation" in names:
        found += [
            Row("isolation", "host", (_BASELINE,), None),
            Row("isolation", "off", (_NO,), base.replace(isolation=False)),
            Row("isolation", "on", (_YES,), base.replace(isolation=True)),
        ]
    if "adaptations" in names:
        found.append(Row("adaptations", "host", (_BASELINE, "", ""), None))
        for kind in ADAPTATIONS:
            ticks = tuple(_YES if kind == other else "" for other in ADAPTATIONS)
            found.append(Row("adaptations", kind, ticks, base.replace(adaptations=(kind,))))
        ensemble = base.replace(adaptations=ADAPTATIONS)
        found.append(Row("adaptations", "ensemble", (_YES, _YES, _YES), ensemble))
    if "similarity" in names:
        found += [
            Row("similarity", "cosine", ("Cosine",), base.replace(similarity="cosine")),
            Row("similarity", "kl", ("KL divergence",), base.replace(similarity="kl")),
        ]
    for name, values in (("confidence", CONFIDENCES), ("beta", BETAS)):
        if name in names:
            own = getattr(base, name)
            found.append(Row(name, "host", (_BASELINE,), None))
            for value in sorted({*values, own}):
                found.append(
                    Row(name, f"{value:g}", (f"{value:g}",), base.replace(**{name: value}))
                )
    return found


def _pruning_rows(scaling: bool, pruning: bool, base: FSAConfig) -> list[Row]:
    plain = base.replace(scaling=False)
    found = []
    if pruning:
        found += [
            Row("pruning", "none", (_NO, _NO), plain.replace(pruning=None)),
            Row("pruning", "ratio", (_NO, "Fixed ratio"), plain.replace(pruning="ratio")),
            Row(
                "pruning", "threshold", (_NO, "Fixed threshold"), plain.replace(pruning="threshold")
            ),
        ]
    if scaling or pruning:
        kept = "Confidence-based"
        found += [
            Row("pruning", "confidence", (_NO, kept), plain.replace(pruning="confidence")),
            Row(
                "pruning", "scaled", (_YES, kept), base.replace(scaling=True, pruning="confidence")
            ),
        ]
    return found


@dataclass(frozen=True)
class Swept:
    """The rows with what each gave."""

    rows: tuple[Row, ...]
    results: tuple[Result, ...]

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a row; mIoU in percent, and the paper's average where it has one."""
        records = []
        for row, result in zip(self.rows, self.results, strict=True):
            protocol = result.protocol
            records.append(
                {
                    "table": row.table,
                    "row": row.row,
                    "miou": round(100 * result.miou(), 4),
                    "pixel_accuracy": round(100 * result.accuracy(), 4),
                    "paper_average": paper.ablation(
                        row.table, row.row, protocol["host"], protocol["model"]
                    ),
                    "pictures": result.pictures,
                    "skipped": len(result.skipped),
                    "feedback": row.config.to_dict() if row.config else None,
                }
            )
        return records

    def markdown(self) -> str:
        """The tables in the paper's form."""
        records = self.records()
        protocol = self.results[0].protocol
        vfm = f" ({protocol['vfm']})" if protocol["vfm"] else ""
        lines = [
            f"{protocol['host']}{vfm}, {protocol['model']}, {protocol['dataset']}: "
            f"{self.results[0].pictures} pictures, preset {protocol['preset']['name']}. "
            "mIoU in percent; the paper's column is its average over eight benchmarks."
        ]
        for table, (title, columns) in HEADS.items():
            chosen = [
                (row, record)
                for row, record in zip(self.rows, records, strict=True)
                if row.table == table
            ]
            if not chosen:
                continue
            with_paper = any(record["paper_average"] is not None for _, record in chosen)
            head = [*columns, "mIoU", *(["paper"] if with_paper else [])]
            lines += ["", f"### {title}", "", _markdown_row(head)]
            lines.append(
                _markdown_row(["---"] * len(columns) + ["---:"] * (len(head) - len(columns)))
            )
            for row, record in chosen:
                published = record["paper_average"]
                cells = [*row.cells, f"{record['miou']:.2f}"]
                if with_paper:
                    cells.append("" if published is None else f"{published:.1f}")
                lines.append(_markdown_row(cells))
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> list[Path]:
        """Writes sweep.json, sweep.csv, sweep.md, and sensitivity.png where p or beta was swept.

        The picture needs matplotlib; without it, it is left out.
        """
        records = self.records()
        protocol = self.results[0].protocol | {"feedback": None}
        text = json.dumps({"protocol": protocol, "rows": records}, indent=1) + "\n"
        table = io.StringIO()
        columns = [name for name in records[0] if name != "feedback"]
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        files = []
        for name, content in (
            ("sweep.json", text),
            ("sweep.csv", table.getvalue()),
            ("sweep.md", self.markdown()),
        ):
            files.append(folder / name)
            write_whole(files[-1], partial(_write_text, content))
        if any(row.table in ("confidence", "beta") for row in self.rows):
            picture = folder / "sensitivity.png"
            if _plot(self, picture):
                files.append(picture)
        return files


def run(
    chosen: Sequence[Row], out: Path, evaluate: Callable[[FSAConfig | None, Path], Result]
) -> Swept:
    """Evaluates each row once; rows with the same configuration share a run.

    Args:
        chosen: from `rows`.
        out: each configuration gets a directory in it, and goes on where it was when the sweep is
            started again.
        evaluate: a configuration and a directory -> the result.
    """
    done: dict[FSAConfig | None, Result] = {}
    for row in chosen:
        if row.config not in done:
            done[row.config] = evaluate(row.config, out / f"{row.table}-{row.row}")
    return Swept(tuple(chosen), tuple(done[row.config] for row in chosen))


def can_plot() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _write_text(text: str, out: BinaryIO) -> None:
    out.write(text.encode())


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plot(swept: Swept, file: Path) -> bool:
    """mIoU over p and beta on one scale, with the published value and the baseline marked."""
    if not can_plot():
        return False
    from matplotlib.figure import Figure

    records = list(zip(swept.rows, swept.records(), strict=True))
    baseline = next(record["miou"] for row, record in records if row.config is None)
    tables = [t for t in ("confidence", "beta") if any(row.table == t for row, _ in records)]
    protocol = swept.results[0].protocol
    published = FSAConfig.preset(vfm=protocol["vfm"], model=protocol["model"])
    figure = Figure(figsize=(4.5 * len(tables), 3.4), layout="constrained")
    # One scale for both, on which a difference looks as large as it is.
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    values = [record["miou"] for row, record in records if row.table in tables]
    lowest, highest = _honest_limits(values)
    for table, axis in zip(tables, axes, strict=True):
        points = [
            (float(row.row), record["miou"])
            for row, record in records
            if row.table == table and row.config is not None
        ]
        axis.plot(*zip(*points, strict=True), marker="o", label="with FSA")
        default = getattr(published, table)
        axis.axvline(default, color="0.5", linestyle=":", label=f"published: {default:g}")
        axis.axhline(baseline, color="black", linestyle="--", label="baseline without FSA")
        axis.set_xlabel("p, cumulative confidence kept" if table == "confidence" else "beta")
        axis.set_ylim(lowest, highest)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("mIoU, %")
    figure.suptitle(f"{protocol['host']}, {protocol['model']}, {protocol['dataset']}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(file, lambda out: out.write(buffer.getvalue()))
    return True


def _honest_limits(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis of percents around values: never so narrow that noise looks like a cliff."""
    found = [value for value in values if math.isfinite(value)] or [50.0]
    middle = (min(found) + max(found)) / 2
    half = max(_LEAST_SPAN, 1.2 * (max(found) - min(found))) / 2
    lowest = min(max(middle - half, 0.0), 100 - 2 * half)
    return max(lowest, 0.0), max(lowest, 0.0) + 2 * half
