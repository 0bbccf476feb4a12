"""What an evaluation found, and how it is written down."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from fsa.evaluation.metrics import iou, mean_iou
from fsa.files import write_whole


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        counts: (C,C) int64: entry [t, p] is how many pixels of class t were labelled p.
        class_names: one per class.
        pictures: how many were counted.
        skipped: name of each picture that could not be -> why.
        seconds: time spent, over all runs that led here.
        protocol: what was done.
    """

    counts: np.ndarray
    class_names: tuple[str, ...]
    pictures: int
    skipped: dict[str, str]
    seconds: float
    protocol: dict[str, Any]

    def iou(self) -> np.ndarray:
        """Intersection over union of each class, NaN where a class is nowhere."""
        return iou(self.counts)

    def miou(self) -> float:
        """Mean IoU over the classes that occur, in [0, 1]; NaN if no pixel was counted."""
        return mean_iou(self.counts) if self.counts.any() else float("nan")

    def accuracy(self) -> float:
        """Share of the counted pixels that are right; NaN if there are none."""
        total = self.counts.sum()
        return float(np.diag(self.counts).sum() / total) if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; classes that are nowhere have None."""
        scores = {
            name: None if np.isnan(value) else round(float(value), 6)
            for name, value in zip(self.class_names, self.iou(), strict=True)
        }
        return {
            "miou": _number(self.miou()),
            "pixel_accuracy": _number(self.accuracy()),
            "pixels": int(self.counts.sum()),
            "pictures": self.pictures,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 1),
            "iou": scores,
            "protocol": self.protocol,
            "confusion": self.counts.tolist(),
        }

    def save(self, folder: Path) -> None:
        """Writes result.json and per_class.csv."""
        record = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        text = json.dumps(record | self.to_dict()) + "\n"
        write_whole(folder / "result.json", lambda out: out.write(text.encode()))
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["class", "iou", "true pixels", "labelled pixels", "right pixels"])
        for index, (name, value) in enumerate(zip(self.class_names, self.iou(), strict=True)):
            writer.writerow(
                [
                    name,
                    "" if np.isnan(value) else f"{value:.6f}",
                    int(self.counts[index].sum()),
                    int(self.counts[:, index].sum()),
                    int(self.counts[index, index]),
                ]
            )
        write_whole(folder / "per_class.csv", lambda out: out.write(rows.getvalue().encode()))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
