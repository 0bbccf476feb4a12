"""Every row of the benchmark, in order of importance: the marks first, then the coverage.

"gpu" measures memory and numerics of a row while its contenders are at hand; on the CPU memory
takes a process for every contender and comes in jobs of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.rows.contenders import Job, Row
from bench.rows.dtypes import LabelsRow, TypedStepRow, WindowRow
from bench.rows.hosts import HostRow
from bench.rows.op import OpRow
from bench.rows.pictures import PictureRow

HOSTS = ("proxyclip", "clearclip", "maskclip", "sclip")
LABEL_HOSTS = ("clearclip", "sclip", "proxyclip", "pearl")
PATCHES = (196, 441, 784, 1024, 1764, 4096, 8192)
CLASSES = (21, 150, 171, 847)

# From here on a step is measured with A_f kept and with A_f streamed.
_WAYS_FROM = 8192

_TIME = ("time",)
_TIME_AND_NUMERICS = ("time", "numerics")
_ALL = ("time", "numerics", "memory")


def _street(host: str) -> PictureRow:
    return PictureRow(host, "ViT-B/16", 448, 896, window=224, stride=80, C=19)


def _photograph(host: str) -> PictureRow:
    return PictureRow(host, "ViT-B/16", 336, 448, window=336, stride=112, C=21)


def _jobs(rows: Iterable[Row], measures: tuple[str, ...]) -> list[Job]:
    return [Job(row, measures) for row in rows]


def _once(jobs: Iterable[Job]) -> tuple[Job, ...]:
    """Without the rows that came before."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    kept = []
    for job in jobs:
        if (job.row.name, job.measures) not in seen:
            seen.add((job.row.name, job.measures))
            kept.append(job)
    return tuple(kept)


# The rows of `bench.marks`, then the coverage.
MARKS_GPU = [
    *_jobs(
        [
            OpRow("op", 1, 1764, 171, compiled=True),
            OpRow("op", 1, 196, 171, compiled=True),
            OpRow("op", 40, 784, 19, compiled=True),
            OpRow("step", 1, 1764, 171, compiled=True),
            OpRow("step", 1, 196, 171, compiled=True),
            OpRow("op", 1, 16384, 171),
            OpRow("step", 1, 16384, 171, ways=True),
            OpRow("step", 1, 8192, 171, compiled=True, ways=True),
        ],
        _ALL,
    ),
    *_jobs([HostRow(host, "ViT-B/16") for host in HOSTS], _ALL),
    *_jobs([_street("proxyclip"), _photograph("proxyclip")], _TIME),
    *_jobs(
        [HostRow(host, name) for name in ("ViT-L/14", "ViT-H/14") for host in HOSTS],
        _ALL,
    ),
]
_COVERAGE_GPU = [
    # Compiling takes seconds a row: torch.compile is given the sizes of the plot, and two more.
    *_jobs(
        [OpRow("step", 1, N, 171, compiled=True) for N in (784, 4096, 441, 1024)]
        + [OpRow("op", 1, N, 171, compiled=True) for N in (784, 4096)],
        _ALL,
    ),
    *_jobs([_street("clearclip"), _photograph("clearclip")], _TIME),
    *_jobs(
        [
            OpRow(kind, B, N, C, ways=kind == "step" and N >= _WAYS_FROM)
            for kind in ("op", "step")
            for B in (1, 8, 40)
            for C in CLASSES
            for N in PATCHES
        ],
        _ALL,
    ),
]

GPU: tuple[Job, ...] = _once([*MARKS_GPU, *_COVERAGE_GPU])


def labels(folder: Path | None = None) -> tuple[Job, ...]:
    """Rows of the labels in half precision, of the shipped pictures or of a folder's."""
    return tuple(_jobs([LabelsRow(host, folder) for host in LABEL_HOSTS], ("labels",)))


# What two cores do in about ten minutes.
_CPU_PROXY_SIDE = 224
CPU: tuple[Job, ...] = _once(
    [
        *_jobs(
            [
                OpRow(kind, 1, N, C, compiled=True)
                for kind in ("step", "op")
                for N, C in ((1764, 171), (784, 171), (196, 171), (1764, 21))
            ],
            _TIME_AND_NUMERICS,
        ),
        *_jobs(
            [HostRow(host, "ViT-B/16") for host in HOSTS if host != "proxyclip"]
            # ProxyCLIP's DINO sees four times the patches: a smaller picture.
            + [HostRow("proxyclip", "ViT-B/16", side=_CPU_PROXY_SIDE)],
            _TIME,
        ),
        *_jobs([_photograph("clearclip"), _street("clearclip")], _TIME),
        *_jobs([WindowRow("ViT-B/16"), *(TypedStepRow(N) for N in (784, 1764))], _TIME),
        *labels(),
        *_jobs([OpRow("op", 1, N, 171) for N in (1764, 4096, 16384)], ("memory",)),
        *_jobs(
            [OpRow("step", 1, N, 171, ways=N >= _WAYS_FROM) for N in (1764, 4096, 8192)],
            ("memory",),
        ),
        *_jobs(
            [
                OpRow(kind, 1, N, C)
                for N in (1764, 784, 196)
                for C in (150, 60, 21, 171)
                for kind in ("step", "op")
            ],
            _TIME_AND_NUMERICS,
        ),
        *_jobs(
            [HostRow(host, "ViT-B/16") for host in ("clearclip", "sclip")]
            + [HostRow("proxyclip", "ViT-B/16", side=_CPU_PROXY_SIDE)],
            ("memory",),
        ),
    ]
)
