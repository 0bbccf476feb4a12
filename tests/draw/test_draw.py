from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fsa import InputError
from fsa.draw.colours import heat_colours, palette
from fsa.draw.figures import (
    _GAP,
    _INK,
    Panel,
    attention_map,
    beside_legend,
    fitted,
    outlined,
    overlay,
    paint,
    panel_grid,
)
from fsa.draw.lettering import fonts, legible
from fsa.evaluation.metrics import confusion, iou, mean_iou


@pytest.mark.parametrize("count", [1, 7, 171, 847])
def test_colours_are_distinct_and_do_not_depend_on_the_count(count):
    colours = palette(count)
    assert colours.shape == (count, 3)
    assert len({tuple(c) for c in colours.tolist()}) == count
    assert np.array_equal(colours, palette(1000)[:count])


def test_regions_are_tinted_and_the_rest_is_left():
    rgb = np.full((20, 20, 3), 100, np.uint8)
    labels = np.zeros((20, 20), np.int32)
    labels[:, 10:] = -1
    painted = paint(rgb, labels, 2, alpha=1.0)
    assert (painted[:, :9] == palette(1)[0]).all()
    assert (painted[:, 11:] == 100).all()
    assert (painted[:, 10] < 100).all()  # The line between them.
    assert (paint(rgb, np.zeros_like(labels), 2, alpha=0.0) == 100).all()


# How those who lack one kind of cone see linear RGB (Machado, Oliveira and Fernandes, 2009).
COLOUR_BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "normal": np.eye(3),
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB (n,3), D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    f = np.cbrt(linear.clip(0, 1) @ np.transpose(to_xyz) / [0.9505, 1, 1.089])
    return np.stack(
        [116 * f[:, 1] - 16, *(500 * np.diff(-f[:, :2]).T), *(-200 * np.diff(f[:, 1:]).T)], -1
    )


@pytest.mark.parametrize("sight", COLOUR_BLIND)
def test_the_first_colours_are_told_apart_by_all_readers(sight):
    coded = palette(8) / 255
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    seen = lab(linear @ np.transpose(COLOUR_BLIND[sight]))
    distances = np.linalg.norm(seen[:, None] - seen, axis=-1)[np.triu_indices(8, 1)]
    # A difference of 2.3 is just noticeable; of 10, noticed at a glance.
    assert distances.min() > 10


def test_strips_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)
    labels = rng.integers(-1, 5, (40, 30)).repeat(3, axis=0)[:40]
    whole = paint(rgb, labels, 4, 0.55)
    assert whole.dtype == np.uint8
    # The formula, written out once more in float64.
    known = (labels >= 0) & (labels < 4)
    colours = palette(4)[np.where(known, labels, 0)]
    grey = rgb.mean(axis=-1, keepdims=True)
    expected = np.where(known[..., None], 0.45 * grey + 0.55 * colours, rgb)
    inner = np.zeros(labels.shape, bool)
    inner[:, 1:] = labels[:, 1:] == labels[:, :-1]
    inner[1:] &= labels[1:] == labels[:-1]
    inner[:, 0] = False
    inner[0] = False
    assert np.abs(whole - expected)[inner].max() < 0.51
    for pixels in (1, 30 * 7):
        monkeypatch.setattr("fsa.draw.figures._STRIP_PIXELS", pixels)
        assert np.array_equal(paint(rgb, labels, 4, 0.55), whole)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "1", None, True])
def test_an_alpha_that_is_none_is_refused(alpha):
    with pytest.raises(InputError, match=r"alpha=.* must be a number from 0 to 1"):
        overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), ["a"], alpha=alpha)


def test_the_legend_beside_a_small_picture_is_a_column_first():
    labels = np.arange(60).reshape(6, 10)
    beside = beside_legend(Image.new("RGB", (10, 6)), labels, [f"class {i}" for i in range(60)])
    assert beside.width < 2 * beside.height
    few = beside_legend(Image.new("RGB", (10, 6)), labels % 2, ["a", "b"])
    assert few.height < 80


@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_legend_names_what_is_there(count):
    labels = np.arange(count).repeat(40)[None].repeat(200, axis=0)
    picture = Image.new("RGB", labels.shape[::-1])
    names = [f"class number {i}" for i in range(count + 2)]
    beside = beside_legend(picture, labels, names)
    assert beside.width > picture.width
    assert beside.height >= picture.height
    drawn = {tuple(c) for c in np.asarray(beside).reshape(-1, 3).tolist()}
    assert {tuple(c) for c in palette(count).tolist()} <= drawn
    absent = {tuple(c) for c in palette(count + 2)[count:].tolist()}
    assert not absent & drawn


@dataclass
class Text:
    """A text as it was drawn."""

    words: str
    at: tuple[float, float]
    anchor: str
    font: ImageFont.FreeTypeFont

    @property
    def ends(self) -> tuple[float, float]:
        """Where it begins and ends from left to right."""
        length = self.font.getlength(self.words)
        left = self.at[0] - (length if self.anchor[0] == "r" else 0)
        return left, left + length


@pytest.fixture
def drawn(monkeypatch):
    """The texts that are drawn from now on."""
    texts = []
    draw = ImageDraw.ImageDraw.text

    def record(self, xy, text, *, anchor, font, **options):
        texts.append(Text(text, xy, anchor, font))
        draw(self, xy, text, anchor=anchor, font=font, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


@pytest.fixture
def no_other_fonts(monkeypatch):
    monkeypatch.setattr("fsa.draw.lettering._FONT_FILES", ())
    fonts.cache_clear()
    yield
    fonts.cache_clear()


def test_a_share_is_a_text_of_its_own_at_the_end_of_its_line(drawn):
    labels = np.array([[0] * 2 + [1] * 30 + [2] * 68]).repeat(50, axis=0)
    names = ["cat", "שמיים", "a name that is longer"]
    beside = beside_legend(Image.new("RGB", (100, 50)), labels, names)
    texts = {text.words: text for text in drawn}
    lines = [
        (texts[name], texts[share]) for name, share in zip(names, ("2%", "30%", "68%"), strict=True)
    ]
    for name, share in lines:
        assert name.at[1] == share.at[1]
        assert 100 < name.ends[0] < name.ends[1] < share.ends[0] < share.ends[1] < beside.width
    assert len({name.ends[0] for name, _ in lines}) == 1
    assert len({share.ends[1] for _, share in lines}) == 1


def test_what_can_be_written_of_a_name_follows_its_number(no_other_fonts, drawn):
    names = ["\ue000 (cat)", "\ue000 3", "plain"]
    written = ["class 0: (cat)", "class 1", "plain"]
    labels = np.arange(3)[None].repeat(4, axis=0)
    beside_legend(Image.new("RGB", (9, 9)), labels, names)
    assert [text.words for text in drawn[::2]] == written
    assert [legible(name, number) for number, name in enumerate(names)] == written


def test_the_legend_of_a_grid_shortens_names_and_finds_fonts_for_them(monkeypatch, drawn):
    own, other = ImageFont.load_default(13), ImageFont.load_default(13)
    monkeypatch.setattr("fsa.draw.lettering.fonts", lambda size: (own, other))
    monkeypatch.setattr(
        "fsa.draw.lettering._missing", lambda name, font: name == "кот" and font is own
    )
    legend = [("cat", (1, 2, 3)), ("кот", (4, 5, 6)), ("x" * 99, (7, 8, 9))]
    panel_grid([[Panel(Image.new("RGB", (40, 30)))]], panel_width=500, legends=[legend])
    fonts = {text.words: text.font for text in drawn}
    assert fonts["cat"] is own
    assert fonts["кот"] is other
    assert "x" * 39 + "…" in fonts


def test_a_grid_holds_every_panel():
    colours = [(10 * i, 0, 200) for i in range(6)]
    rows = [
        [Panel(Image.new("RGB", (40, 30), colour), "text") for colour in colours[i : i + 3]]
        for i in (0, 3)
    ]
    legend = [("cat", (1, 2, 3))] * 30
    figure = panel_grid(rows, ["a", "b", "c"], heading="h", panel_width=60, legends=[legend, []])
    drawn = {tuple(c) for c in np.asarray(figure).reshape(-1, 3).tolist()}
    assert set(colours) | {(1, 2, 3)} <= drawn
    assert figure.width == 3 * 60 + 4 * 10


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((40, 30), (100, 75)),
        ((30, 40), (100, 133)),
        ((3000, 2), (100, 1)),
        ((10, 50), (80, 400)),
        ((1, 9000), (1, 400)),
    ],
)
def test_a_panel_shows_a_picture_of_any_shape(size, shown):
    assert fitted(size, 100) == shown
    figure = np.asarray(panel_grid([[Panel(Image.new("RGB", size, (9, 8, 7)))]], panel_width=100))
    rows, columns = (figure == (9, 8, 7)).all(axis=-1).nonzero()
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == shown
    # In the middle of the panel, which begins after the margin.
    assert abs((columns.min() + columns.max() + 1) / 2 - (_GAP + 50)) <= 1


@pytest.mark.parametrize("box", [(5, 5, 30, 30), (5, 5, 6, 5), (4, 9, 30, 10), (5, 5, 5.2, 5.1)])
def test_a_box_of_any_size_is_outlined(box):
    drawn = np.asarray(outlined(Image.new("RGB", (40, 40), (99, 99, 99)), box))
    assert (drawn == _INK).all(axis=-1).any()
    assert (drawn[0] == 99).all()


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
    plain = panel_grid([[Panel(picture)]] * 2, panel_width=100)
    labelled = panel_grid([[Panel(picture)]] * 2, panel_width=100, labels=["one", "two"])
    margin = labelled.width - plain.width
    assert margin > 10
    ink = np.asarray(labelled.convert("L"))[:, :margin] < 128
    assert ink[: ink.shape[0] // 2].any()
    assert ink[ink.shape[0] // 2 :].any()


def test_an_attention_map_shows_where_attention_goes_and_what_was_pruned():
    rgb = np.full((80, 120, 3), 128, np.uint8)
    row = np.array([[0.5, 0.0, 0.1], [0.2, 0.0, 0.0]])
    drawn = np.asarray(attention_map(rgb, row, (0, 0), alpha=1.0)).astype(int)
    none, half, largest = heat_colours(np.array([0, 0.5, 1])).astype(int)
    for (patch_row, column), colour in (
        ((0, 1), none),
        ((0, 2), half),
        ((1, 0), largest),
    ):
        middle = drawn[patch_row * 40 + 20, column * 40 + 20]
        assert np.abs(middle - colour).max() <= 1
    assert (drawn[:4, :40] == 255).all(axis=-1).any()  # The outline.

    kept = row > 0
    hatched = np.asarray(attention_map(rgb, row, (0, 0), kept=kept))
    for at, is_kept in np.ndenumerate(kept):
        if at != (0, 0):
            tile = hatched[at[0] * 40 + 8 : at[0] * 40 + 32, at[1] * 40 + 8 : at[1] * 40 + 32]
            assert (len(np.unique(tile.reshape(-1, 3), axis=0)) == 1) == is_kept


def test_heat_grows_lighter_throughout():
    lightness = heat_colours(np.linspace(0, 1, 20)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()
