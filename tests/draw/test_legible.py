"""Pictures that people can read: colours apart, lines that grow, names of any script."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image, ImageFont

from fsa.draw import figures, lettering
from fsa.draw.colours import colours_of_classes, palette
from fsa.draw.figures import overlay, paint
from fsa.errors import FSAWarning
from fsa.pictures.reading import Picture
from tests.support.results import made_result

torch = pytest.importorskip("torch")


def lab(rgb):
    """CIELAB under D65, written out."""
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175]]
    xyz = linear @ np.array([*to_xyz, [0.0193339, 0.119192, 0.9503041]]).T
    scaled = xyz / [0.95047, 1, 1.08883]
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1
    )


@pytest.mark.parametrize(("count", "apart"), [(8, 20), (21, 20), (60, 12), (200, 6), (847, 3)])
def test_no_two_colours_look_alike(count, apart):
    places = lab(palette(count).astype(float))
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    distances[np.diag_indices(count)] = np.inf
    assert distances.min() > apart


@pytest.mark.parametrize(("few", "many"), [(3, 300), (8, 9), (64, 65), (100, 900)])
def test_a_colour_is_the_same_whatever_the_count(few, many):
    assert np.array_equal(palette(few), palette(many)[:few])
    palette(many)[:] = 0
    assert palette(many).any()


def test_of_many_classes_the_largest_get_the_safest_colours():
    areas = np.zeros(30, np.int64)
    areas[[25, 11, 17]] = 50, 70, 60
    assert np.array_equal(colours_of_classes(areas)[[11, 17, 25]], palette(3))
    assert len(np.unique(colours_of_classes(areas), axis=0)) == 30
    # Few keep their own, in every picture.
    assert np.array_equal(colours_of_classes(areas[4:12]), palette(8))


def test_overlay_legend_and_label_picture_share_their_colours():
    labels = np.zeros((60, 80), np.int32)
    labels[:, 30:] = 19
    rgb = np.full((60, 80, 3), 128, np.uint8)
    names = [f"class {i}" for i in range(20)]
    result = made_result(labels, names, Picture(torch.from_numpy(rgb).permute(2, 0, 1), "x"))
    image = result.label_image().convert("RGB")
    assert image.getpixel((70, 30)) == tuple(palette(1)[0].tolist())
    drawn = np.asarray(overlay(rgb, labels, names))
    tint = (0.4 * 128 + 0.6 * palette(1)[0]).round().astype(int)
    assert np.abs(drawn[30, 60].astype(int) - tint).max() <= 1
    assert (drawn[:, 80:] == palette(1)[0]).all(axis=-1).any()


def line_width(side):
    labels = np.zeros((side, side), np.int32)
    labels[:, side // 2 :] = 1
    row = paint(np.full((side, side, 3), 200, np.uint8), labels, 2)[side // 3].astype(int).sum(-1)
    return int((row < 0.6 * row.max()).sum())


def test_lines_grow_with_the_picture(monkeypatch):
    assert [line_width(side) for side in (100, 640, 1300, 2600)] == [1, 1, 2, 4]
    # Strips leave no seam: horizontal lines are the same where one begins.
    labels = np.repeat(np.arange(40) // 5 % 2, 33)[:, None] * np.ones((1, 1300), int)
    rgb = np.full((1320, 1300, 3), 200, np.uint8)
    whole = paint(rgb, labels, 2)
    monkeypatch.setattr(figures, "_STRIP_PIXELS", 1300 * 7)
    assert np.array_equal(paint(rgb, labels, 2), whole)


def test_legends_grow_with_the_picture():
    def legend_width(side):
        labels = np.zeros((side, side), np.int32)
        picture = overlay(np.zeros((side, side, 3), np.uint8), labels, ["grass"])
        return (picture.width - side) / side

    small, large = legend_width(880), legend_width(3000)
    assert large == pytest.approx(small, rel=0.1)


@pytest.fixture
def font_of_a_cat(tmp_path):
    """A folder with a font that has two Chinese letters and no others."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (600, 700), (600, 0)):
        pen.lineTo(corner)
    pen.closePath()
    box = pen.glyph()
    pen = type(pen)(None)
    pen.moveTo((0, 0))
    pen.lineTo((300, 300))
    pen.lineTo((300, 0))
    pen.closePath()
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat", ord("狗"): "cat"})
    builder.setupGlyf({".notdef": pen.glyph(), "cat": box})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "cat": (700, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "broken.ttf").write_bytes(b"no font")
    builder.save(tmp_path / "deep" / "cats.ttf")
    return tmp_path


@pytest.fixture
def only_fonts_of(monkeypatch):
    """Takes the fonts of one folder for those of the system, besides Pillow's own."""

    def take(folder):
        for cached in (lettering._file_with, lettering._warn_of, lettering._font_files):
            cached.cache_clear()
        monkeypatch.setattr(lettering, "_font_folders", lambda: (folder,))
        monkeypatch.setattr(lettering, "fonts", lambda size: (ImageFont.load_default(size),))

    yield take
    for cached in (lettering._file_with, lettering._warn_of, lettering._font_files):
        cached.cache_clear()


def test_a_name_is_written_in_a_font_of_the_system_that_has_its_letters(
    font_of_a_cat, only_fonts_of
):
    only_fonts_of(font_of_a_cat)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FSAWarning)
        name, font = lettering.written("猫", "class 2", 20)
    assert (name, font.getname()[0], font.size) == ("猫", "Cats", 20)
    # Not in a font that lacks one of them.
    with pytest.warns(FSAWarning):
        assert lettering.written("猫鸟", "class 2", 20)[0] == "class 2"


def test_a_name_that_no_font_has_is_said_once(tmp_path, only_fonts_of):
    only_fonts_of(tmp_path)
    with pytest.warns(FSAWarning, match="can write the class name '猫'") as caught:
        names = [lettering.written("猫", "class 2", size)[0] for size in (12, 20, 12)]
    assert names == ["class 2"] * 3
    assert len(caught) == 1


def test_the_text_of_panels_may_be_set():
    panel = figures.Panel(Image.new("RGB", (40, 30)), "45.2 mIoU, 120 ms")
    small = figures.panel_grid([[panel]], panel_width=240)
    large = figures.panel_grid([[panel]], panel_width=240, text_size=22)
    assert large.height > small.height
