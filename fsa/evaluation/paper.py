"""The numbers of the paper's Tables 2, 3 and 4, and the command that repeats each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

_AVERAGE = "average"


@dataclass(frozen=True)
class Cell:
    """A host on a benchmark, without and with FSA.

    Attributes:
        table: number in the paper.
        host, model, pretrained, vfm: as `fsa.load_segmentor` takes them.
        dataset: a benchmark.
        without, with_fsa: mIoU in percent, as printed.
        note: what is odd about the printed numbers, or "".
    """

    table: int
    host: str
    model: str
    pretrained: str
    vfm: str | None
    dataset: str
    without: float
    with_fsa: float
    note: str = ""

    def command(self, feedback: bool = True) -> str:
        """The command line that repeats it; DIR is where the benchmark lies."""
        words = ["fsa", "eval", self.dataset, "--root", "DIR", "--host", self.host]
        words += ["--model", self.model, "--pretrained", self.pretrained]
        words += ["--vfm", self.vfm] if self.vfm else []
        words += [] if feedback else ["--no-feedback"]
        return shlex.join(words)


def cells() -> Iterator[Cell]:
    """Every cell, in the tables' order, without the averages."""
    data = _data()
    for row in data["rows"]:
        for dataset, without in row["without"].items():
            if dataset != _AVERAGE:
                yield Cell(
                    row["table"],
                    row["host"],
                    row["model"],
                    data["pretrained"][row["model"]],
                    row["vfm"],
                    dataset,
                    without,
                    row["with"][dataset],
                    row.get("notes", {}).get(dataset, ""),
                )


def find(host: str, model: str, vfm: str | None, dataset: str) -> Cell | None:
    """The cell of a host on a benchmark, or None where the paper has none."""
    wanted = (host, model, vfm, dataset)
    for cell in cells():
        if (cell.host, cell.model, cell.vfm, cell.dataset) == wanted:
            return cell
    return None


def ablation(name: str, row: str, host: str, model: str) -> float | None:
    """A row of an ablation table: mIoU in percent, averaged over the eight benchmarks.

    Args:
        name: "pruning" (Table 5), "isolation" (6), "adaptations" (7) or "similarity" (S9).
        row: as the data file calls it.
        host, model: for which; None is returned where the paper has no number.
    """
    return _data()["ablations"].get(name, {}).get(row, {}).get(f"{host}/{model}")


@lru_cache
def _data() -> dict[str, Any]:
    return json.loads(resources.files("fsa.evaluation").joinpath("paper.json").read_text("utf-8"))
