"""The marks that the library is held to on an H200, and what was measured against them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from bench.report import h200
from bench.report import results_data as data
from bench.report.paper import LATENCY_MS
from bench.report.results_data import Record

_OURS = "fsa triton"

# Float32 operations an entry of the matrix: the reciprocal, two exponentials, their sums, and some
# nine passes of the search.
_FLOPS_AN_ENTRY = 50


@dataclass(frozen=True)
class Mark:
    """One promise.

    Args:
        text: what is promised.
        value: what was measured, or None.
        limit: the largest value that keeps the promise, or the smallest.
        unit: of both.
        at_least: whether the limit is the smallest.
    """

    text: str
    value: float | None
    limit: float
    unit: str
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """Whether the promise is kept; empty where nothing was measured."""
        if self.value is None:
            return ""
        kept = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if kept else "NOT MET"


def floor_ms(B: int, N: int, C: int) -> float:
    """The larger of the byte and the arithmetic floor of logits -> A_f in half precision, in ms.

    Bytes: the logits once in, A_f once out. Arithmetic: three half-precision products, and the
    float32 work on every entry.
    """
    entries = B * N * N
    moved = 2 * (B * N * C + entries)
    return 1000 * h200.floor_seconds(moved, 3 * 2 * entries * C, _FLOPS_AN_ENTRY * entries)


def marks(record: Record | None, launches: Record | None = None) -> list[Mark]:
    """All marks of the GPU, with the values of a run.

    Args:
        record: of the run.
        launches: what `python -m bench launches` counted, which stands in for the captured graphs
            where there was no run.
    """
    large = data.find(record, kind="op", B=1, N=1764, C=171)
    small = data.find(record, kind="op", B=1, N=196, C=171)
    batch = data.find(record, kind="op", B=40, N=784, C=19)
    ours = data.device_time(large, _OURS)
    found = [
        Mark("logits → A_f, N=1764, C=171", _times(ours, 1000), 25, "µs"),
        Mark(
            "the same, over the published formulation",
            data.ratio(data.device_time(large, "published"), ours),
            100,
            "×",
            at_least=True,
        ),
        Mark(
            "the same, over `torch.compile` of the algebra",
            data.ratio(data.device_time(large, "torch.compile"), ours),
            5,
            "×",
            at_least=True,
        ),
        Mark(
            "logits → A_f, N=196, C=171",
            _times(data.device_time(small, _OURS), 1000),
            12,
            "µs",
        ),
        Mark(
            "logits → A_f, B=40, N=784, C=19, over its floor "
            f"of {1000 * floor_ms(40, 784, 19):.0f} µs",
            data.ratio(data.device_time(batch, _OURS), floor_ms(40, 784, 19)),
            2,
            "×",
        ),
    ]
    for host, backbone in LATENCY_MS:
        row = data.find(record, kind="host", host=host, backbone=backbone)
        eager, graph = (2, 4) if host == "proxyclip" else (3, 6)
        graphs = partial(data.median, figure="graph")
        where = f"{host} {backbone}"
        found += [
            Mark(f"{where}: FSA on against off", data.overhead(row, "fsa"), eager, "%"),
            Mark(f"{where}: the same in graphs", data.overhead(row, "fsa", graphs), graph, "%"),
            Mark(
                f"{where}: the published baseline over the host with FSA here",
                data.ratio(data.median(row, "published off"), data.median(row, "fsa on")),
                1,
                "×",
                at_least=True,
            ),
        ]
    proxy = data.find(record, kind="host", host="proxyclip", backbone="ViT-B/16")
    off, on = (_entry(proxy, name, "launches") for name in ("fsa off", "fsa on"))
    if off is None and launches is not None:
        off, on = (
            sum(launches["backbones"]["ViT-B/16"]["proxyclip"][mode]["launches"].values())
            for mode in ("off", "on")
        )
    street = data.find(record, kind="picture", host="proxyclip", height=448)
    longest = data.find(record, kind="step", B=1, N=16384, C=171)
    extra = _entry(longest, _OURS, "memory")
    long = data.find(record, kind="step", B=1, N=8192, C=171)
    stored, streamed = (data.device_time(long, name) for name in ("fsa stored", "fsa streamed"))
    found += [
        Mark(
            "launches that FSA adds to ProxyCLIP ViT-B/16",
            None if off is None or on is None else on - off,
            8,
            "",
        ),
        Mark(
            "street picture, ProxyCLIP with FSA, over the published loop",
            data.ratio(data.median(street, "published on"), data.median(street, "fsa on")),
            5,
            "×",
            at_least=True,
        ),
        Mark(
            "peak extra memory of the step, N=16384, C=171, in N×N half matrices",
            None if extra is None else extra / (2 * 16384**2),
            0.1,
            "",
        ),
        Mark(
            "the step streamed, over the same stored, N=8192, C=171",
            data.ratio(streamed, stored),
            2,
            "×",
        ),
    ]
    return found


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _entry(row: Record | None, contender: str, key: str) -> int | None:
    return (row or {"contenders": {}})["contenders"].get(contender, {}).get(key)
