"""Markdown tables from committed results, written between markers of the README and the card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import quality_tables
from bench.runner import RESULTS

_ROOT = Path(__file__).parent.parent
README = _ROOT / "README.md"
MODEL_CARD = _ROOT / "fsa" / "tiny" / "weights" / "MODEL_CARD.md"
ORDER = ("published", "algebra", "torch.compile", "fsa torch", "fsa triton")
NOT_MEASURED = "not measured"


def speed_table(record: dict[str, Any]) -> str:
    """One line a row of the benchmark: medians in ms, and how often ours fits into published."""
    present = [name for name in ORDER if any(name in row["contenders"] for row in record["rows"])]
    ours = "fsa triton" if "fsa triton" in present else "fsa torch"
    lines = [
        f"| {' | '.join(['row', *present, 'speedup over published', 'relative error'])} |",
        f"|{'---|' + '---:|' * (len(present) + 2)}",
    ]
    for row in record["rows"]:
        cells = [row["name"]]
        entries = row["contenders"]
        cells += [
            f"{entries[name]['median']:.3g}" if name in entries else "does not fit"
            for name in present
        ]
        if "published" in entries:
            cells.append(f"{entries['published']['median'] / entries[ours]['median']:.0f}×")
        else:
            cells.append("-")
        cells.append(f"{entries[ours]['relative_error']:.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    env = record["environment"]
    lines += [
        "",
        f"Medians in ms, {record['dtype']} inputs, {env['device']}, {env['cpu_threads']} CPU "
        f"threads, torch {env['torch']}, commit {env['commit']}, {env['date'][:10]}, "
        f"`{env['command']}`. The error is that of this library against float64.",
    ]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """marker -> Markdown, for every result that is there."""
    made = {}
    for name in ("cpu", "gpu"):
        file = RESULTS / f"{name}.json"
        made[f"speed-{name}"] = (
            speed_table(json.loads(file.read_text())) if file.exists() else NOT_MEASURED
        )
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


def main() -> int:
    """Regenerates the tables of the README and the model card."""
    made = tables()
    for file in (README, MODEL_CARD):
        file.write_text(fill(file.read_text(), made))
    return 0
