"""Benchmarks: `python -m bench --help`.

    rows/      what is compared: problems, and the ways of solving them
    measure/   how: processes, clocks, memory, errors, launches, machine code
    report/    what comes out: marks, tables, plots
    quality/   the embedded model's segmentations
    results/   what was measured, as data

`measure` and `report` use `rows`; `rows` uses neither.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
