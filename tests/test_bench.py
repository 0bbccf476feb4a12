"""The contenders compute the same thing, and tables come from the data."""

from __future__ import annotations

import json

import pytest
import torch

from bench import algebra, memory, published, rows, runner, tables
from fsa import reference
from tests.accuracy import RELATIVE_ERROR, relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["op", "step"])
def test_all_contenders_agree_with_the_definition(kind):
    row = rows.Row(kind, 2, 60, 9)
    inputs = rows.make_inputs(row, CPU, torch.float64)
    exact = reference.feedback_attention(inputs.patch_logits, inputs.uniform_logits)
    if kind == "step":
        exact = reference.adapt(inputs.value, exact, inputs.attention)
    functions = rows.contenders(row, CPU, torch.float64, 1 << 34, compiled=False)
    assert set(functions) == {"published", "algebra", "fsa torch"}
    for name, function in functions.items():
        # The plain algebra computes in float32.
        limit = RELATIVE_ERROR[torch.float32 if name == "algebra" else torch.float64]
        assert relative_error(function(inputs), exact) < limit, name


def test_logits_are_realistic():
    row = rows.Row("op", 1, 441, 60)
    inputs = rows.make_inputs(row, CPU, torch.float64)
    probabilities = reference.isolated_probabilities(inputs.patch_logits, inputs.uniform_logits)
    kl = reference.divergence(probabilities)[0]
    off_diagonal = kl[~torch.eye(441, dtype=torch.bool)]
    low, high = off_diagonal.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64))
    assert 1e-3 < low < high < 5
    kept = reference.kept_patches(1 / (1 + kl[None]), reference.FSAConfig())
    assert 0.2 < kept.double().mean() < 0.5


def test_a_run_is_recorded_and_becomes_a_table(tmp_path):
    file = tmp_path / "run.json"
    wanted = (rows.Row("op", 1, 16, 3), rows.Row("step", 1, 16, 3))
    runner.run(wanted, file, device=CPU, dtype=torch.float32, budget=60, compiled=False)
    record = json.loads(file.read_text())
    assert [row["name"] for row in record["rows"]] == [row.name for row in wanted]
    for row in record["rows"]:
        for entry in row["contenders"].values():
            assert 0 < entry["p20"] <= entry["median"] <= entry["p80"]
            assert entry["relative_error"] < RELATIVE_ERROR[torch.float32]
    text = tables.fill(
        "a\n<!-- table x -->\nold\n<!-- end -->\nb", {"x": tables.speed_table(record)}
    )
    assert "old" not in text
    assert "step B=1 N=16 C=3" in text
    assert text.endswith("<!-- end -->\nb")


def test_rows_beyond_the_budget_are_named_not_estimated(tmp_path):
    file = tmp_path / "run.json"
    wanted = (rows.Row("op", 1, 16, 3),)
    record = runner.run(wanted, file, device=CPU, dtype=torch.float32, budget=-1)
    assert record["not_measured"] == ["op B=1 N=16 C=3"]
    assert record["rows"] == []


def test_what_does_not_fit_is_left_out():
    row = rows.Row("op", 40, 8192, 847)
    functions = rows.contenders(row, CPU, torch.float16, 64 << 30, compiled=False)
    assert "published" not in functions


def test_memory_of_the_torch_path_stays_below_four_matrices():
    N, C = 2048, 171
    taken = memory.peak_extra_bytes(N, C)
    # The result alone is one matrix; less would mean that nothing was measured.
    assert 0.9 * N * N * 4 < taken < 4 * N * N * 4


def test_published_and_algebra_are_written_out_differently():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 30, 4, generator=generator)
    uniform = torch.randn(1, 1, 4, generator=generator)
    plain = published.feedback_attention(logits, uniform)
    assert relative_error(algebra.feedback_attention(logits, uniform), plain) < 1e-4
