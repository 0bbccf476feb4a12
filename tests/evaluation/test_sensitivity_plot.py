"""The plot of a sweep: the baseline, the published value, axes that make no cliff of noise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fsa.config import FSAConfig
from fsa.evaluation import sweep

figure = pytest.importorskip("matplotlib.figure")
PROTOCOL = {"host": "proxyclip", "model": "ViT-B-16", "dataset": "voc21", "vfm": "mae"}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a sweep whose rows score 45.00, 45.01, ... and returns its axes."""
    figures = []

    class Kept(figure.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)

    def draw(*names):
        rows = sweep.rows(names, FSAConfig())
        results = [
            SimpleNamespace(
                miou=lambda number=number: 0.45 + 0.0001 * number,
                accuracy=lambda: 0.5,
                protocol=PROTOCOL,
                pictures=3,
                skipped={},
            )
            for number in range(len(rows))
        ]
        assert sweep._plot(sweep.Swept(tuple(rows), tuple(results)), tmp_path / "plot.png")
        return figures[-1].axes

    return draw


def test_axes_are_honest_and_the_same(drawn):
    axes = drawn("confidence", "beta")
    assert len({axis.get_ylim() for axis in axes}) == 1
    low, high = axes[0].get_ylim()
    assert high - low == pytest.approx(10)
    assert low < 45 < high


@pytest.mark.parametrize(("values", "limits"), [([0.1], (0, 10)), ([99.9], (90, 100))])
def test_axes_end_where_percents_do(values, limits):
    assert sweep._honest_limits(values) == pytest.approx(limits)


def test_the_published_value_is_marked(drawn):
    labels = [
        text.get_text() for axis in drawn("confidence", "beta") for text in axis.get_legend().texts
    ]
    baseline = "baseline without FSA"
    assert labels == [
        *("with FSA", "published: 0.45", baseline),
        *("with FSA", "published: 4.5", baseline),
    ]


@pytest.mark.parametrize("name", ["confidence", "beta"])
def test_the_baseline_is_measured_and_shown(drawn, name):
    (axis,) = drawn(name)
    # The host without feedback is the first row, 45.00; no point of the curve.
    assert any(list(line.get_ydata()) == [45, 45] for line in axis.lines)
    (curve,) = (line for line in axis.lines if line.get_label() == "with FSA")
    assert 45 not in list(curve.get_ydata())
    assert len(curve.get_ydata()) == len(sweep.rows([name], FSAConfig())) - 1
