"""What FSA should add to each host on an H200: predicted from counts and shapes, never measured.

The time of a forward is taken to be the sum over its ops of the larger of two floors, plus what its
launches cost. The floors: bytes over the bandwidth; products over the rate of the tensor cores and
other operations over the rate of float32, together. `python -m bench launches` counts bytes,
products, operations and launches. No op reaches its floor, of the baseline's as of FSA's, so the
times mean little and their ratio is what is reported: for launches that cost nothing, as in a CUDA
graph that hides them, and for launches that cost 3 us each, as where nothing hides them.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.report import h200
from bench.report.paper import LATENCY_MS
from bench.report.results_data import Record


@dataclass(frozen=True)
class Forward:
    """One forward, from counts.

    Attributes:
        launches: how many.
        bytes, products, operations: as `bench.measure.launches.Work` counts them.
        floor: seconds that its ops take at least.
    """

    launches: int
    bytes: int
    products: int
    operations: int
    floor: float

    @classmethod
    def of(cls, counted: Record) -> Forward:
        """From what the results hold of one host in one mode."""
        totals = [0, 0, 0]
        floor = 0.0
        for _, count, *work in counted["work"]:
            totals = [total + count * one for total, one in zip(totals, work, strict=True)]
            floor += count * h200.floor_seconds(*work)
        return cls(sum(counted["launches"].values()), *totals, floor)

    def seconds(self, a_launch: float) -> float:
        """Predicted, with what a launch costs in seconds."""
        return self.floor + self.launches * a_launch


@dataclass(frozen=True)
class Prediction:
    """A host without and with FSA."""

    host: str
    backbone: str
    off: Forward
    on: Forward

    def overhead(self, a_launch: float) -> float:
        """What FSA adds, in percent of the baseline, with what a launch costs in seconds."""
        return 100 * (self.on.seconds(a_launch) / self.off.seconds(a_launch) - 1)


def predictions(launches: Record | None) -> list[Prediction]:
    """Of the hosts and backbones of the paper, those that were counted.

    Args:
        launches: what `python -m bench launches` counted.
    """
    backbones = {} if launches is None else launches["backbones"]
    return [
        Prediction(
            host, backbone, *(Forward.of(backbones[backbone][host][mode]) for mode in ("off", "on"))
        )
        for host, backbone in LATENCY_MS
        if host in backbones.get(backbone, {})
    ]
