"""What calls cost in Python is timed by parts that add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import ROOT
from bench.measure import driver
from bench.measure.overhead import MARKS, Cost, table

COSTS = {
    "feedback_attention from logits": 3,
    "feedback_attention from features": 3,
    "ClearCLIP step": 3,
    "ClearCLIP after the trunk, baseline": 0,
    "ClearCLIP after the trunk, with FSA": 4,
    "ProxyCLIP step": 4,
    "ProxyCLIP after the trunk, baseline": 4,
    "ProxyCLIP after the trunk, with FSA": 8,
}


@pytest.mark.skipif(driver.obstacle() is not None, reason=f"no driver: {driver.obstacle()}")
def test_every_call_is_timed_in_parts(tmp_path):
    file = tmp_path / "overhead.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "overhead", "--rounds", "4", "--out", str(file)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    costs = json.loads(file.read_text())["costs"]
    # The launches are those that `bench launches` counts, by kernels that were really launched.
    assert {one["call"]: one["launches"] for one in costs} == COSTS
    assert set(MARKS) <= set(COSTS)
    for one in costs:
        assert 0 < one["p20"] <= one["median"] <= one["p80"]
        if one["launches"]:
            assert 0 < one["in_launches"] < one["median"], one
        else:
            assert one["in_launches"] is None


def test_the_table_splits_a_call():
    text = table([Cost("a", 90.0, 100.0, 120.0, 3, 60.0, 45.0), Cost("b", 1, 2, 3, 0, None, None)])
    assert text.splitlines()[1].split() == ["a", "100", "90", "120", "3", "60", "20", "40", "45"]
    assert text.splitlines()[2].split() == ["b", "2", "1", "3", "0", "-", "-", "-", "-"]
