from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fsa import viz
from fsa.metrics import confusion, iou, mean_iou


@pytest.mark.parametrize("count", [1, 7, 171, 847])
def test_colours_are_distinct_and_do_not_depend_on_the_count(count):
    colours = viz.palette(count)
    assert colours.shape == (count, 3)
    assert len({tuple(c) for c in colours.tolist()}) == count
    assert np.array_equal(colours, viz.palette(1000)[:count])


def test_regions_are_tinted_and_the_rest_is_left():
    rgb = np.full((20, 20, 3), 100, np.uint8)
    labels = np.zeros((20, 20), np.int32)
    labels[:, 10:] = -1
    painted = viz.paint(rgb, labels, 2, alpha=1.0)
    assert (painted[:, :9] == viz.palette(1)[0]).all()
    assert (painted[:, 11:] == 100).all()
    assert (painted[:, 10] < 100).all()  # The line between them.
    assert (viz.paint(rgb, np.zeros_like(labels), 2, alpha=0.0) == 100).all()


@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_legend_names_what_is_there(count):
    labels = np.arange(count).repeat(40)[None].repeat(200, axis=0)
    picture = Image.new("RGB", labels.shape[::-1])
    names = [f"class number {i}" for i in range(count + 2)]
    beside = viz.beside_legend(picture, labels, names)
    assert beside.width > picture.width
    assert beside.height >= picture.height
    drawn = {tuple(c) for c in np.asarray(beside).reshape(-1, 3).tolist()}
    assert {tuple(c) for c in viz.palette(count).tolist()} <= drawn
    absent = {tuple(c) for c in viz.palette(count + 2)[count:].tolist()}
    assert not absent & drawn


def test_a_grid_holds_every_panel():
    colours = [(10 * i, 0, 200) for i in range(6)]
    rows = [
        [viz.Panel(Image.new("RGB", (40, 30), colour), "text") for colour in colours[i : i + 3]]
        for i in (0, 3)
    ]
    legend = [("cat", (1, 2, 3))] * 30
    figure = viz.grid(rows, ["a", "b", "c"], heading="h", panel_width=60, legends=[legend, []])
    drawn = {tuple(c) for c in np.asarray(figure).reshape(-1, 3).tolist()}
    assert set(colours) | {(1, 2, 3)} <= drawn
    assert figure.width == 3 * 60 + 4 * 10


def test_iou_by_hand():
    mask = np.array([[0, 0, 1, 1], [2, 2, 255, 1]])
    labels = np.array([[0, 1, 1, 1], [2, 0, 0, 1]])
    matrix = confusion(labels, mask, 4)
    assert matrix.sum() == 7
    assert matrix[0].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(iou(matrix), [1 / 3, 3 / 4, 1 / 2, np.nan])
    assert mean_iou(matrix) == pytest.approx((1 / 3 + 3 / 4 + 1 / 2) / 3)


def test_rows_of_a_grid_are_labelled():
    picture = Image.new("RGB", (40, 40), (200, 0, 0))
    plain = viz.grid([[viz.Panel(picture)]] * 2, panel_width=100)
    labelled = viz.grid([[viz.Panel(picture)]] * 2, panel_width=100, labels=["one", "two"])
    margin = labelled.width - plain.width
    assert margin > 10
    ink = np.asarray(labelled.convert("L"))[:, :margin] < 128
    assert ink[: ink.shape[0] // 2].any()
    assert ink[ink.shape[0] // 2 :].any()


def test_an_attention_map_shows_where_attention_goes_and_what_was_pruned():
    rgb = np.full((80, 120, 3), 128, np.uint8)
    row = np.array([[0.5, 0.0, 0.1], [0.2, 0.0, 0.0]])
    drawn = np.asarray(viz.attention_map(rgb, row, (0, 0), alpha=1.0)).astype(int)
    none, half, largest = viz.heat_colours(np.array([0, 0.5, 1])).astype(int)
    for (patch_row, column), colour in (
        ((0, 1), none),
        ((0, 2), half),
        ((1, 0), largest),
    ):
        middle = drawn[patch_row * 40 + 20, column * 40 + 20]
        assert np.abs(middle - colour).max() <= 1
    assert (drawn[:4, :40] == 255).all(axis=-1).any()  # The outline.

    kept = row > 0
    hatched = np.asarray(viz.attention_map(rgb, row, (0, 0), kept=kept))
    for at, is_kept in np.ndenumerate(kept):
        if at != (0, 0):
            tile = hatched[at[0] * 40 + 8 : at[0] * 40 + 32, at[1] * 40 + 8 : at[1] * 40 + 32]
            assert (len(np.unique(tile.reshape(-1, 3), axis=0)) == 1) == is_kept


def test_heat_grows_lighter_throughout():
    lightness = viz.heat_colours(np.linspace(0, 1, 20)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()
