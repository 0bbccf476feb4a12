"""The drawings that training sees beside pictographs: gathered, and painted anew."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsa.tiny import paint
from fsa.tiny.pictographs import (
    DRAWN,
    GLYPHS,
    LICENCES,
    PAINTED,
    UNSEEN_STYLE,
    drawings,
    gather_drawings,
)
from fsa.tiny.vocabulary import OBJECTS


def drawn(size=(96, 96), lines=True, colours=("red", "navy", "yellow")):
    """Two rings beside each other, or two discs in a frame."""
    picture = Image.new("RGBA", size)
    draw = ImageDraw.Draw(picture)
    if lines:
        draw.ellipse((2, 2, 60, 93), outline="black", width=6)
        draw.ellipse((64, 30, 93, 60), outline="black", width=6)
    else:
        draw.rectangle((4, 4, 91, 91), fill=colours[0])
        draw.ellipse((10, 10, 50, 80), fill=colours[1])
        draw.ellipse((60, 30, 88, 60), fill=colours[2])
    return picture


OWN = [np.array([[200, 30, 20], [40, 160, 60], [20, 40, 200]] * 2, np.uint8)]


def test_all_drawings_that_are_named_are_of_objects_and_none_is_of_the_unseen_style():
    chosen = drawings()
    assert set(chosen) == {entry.codepoint for entry in OBJECTS}
    names = [name for own in chosen.values() for name in own]
    assert len(names) == len(set(names)) > 2000
    assert min(map(len, chosen.values())) >= 5
    groups = {group for group, _ in names}
    assert not any(group.startswith((UNSEEN_STYLE, "emojitwo", "joypixels")) for group in groups)


def modules(folder, licence="MIT"):
    """A made-up @iconify/json of two sets, one of them in colour."""
    package = folder / "@iconify" / "json"
    (package / "json").mkdir(parents=True)
    known = {
        name: {"author": {"name": "Nobody"}, "license": {"spdx": licence}, "palette": colour}
        for name, colour in (("lines", False), ("paints", True))
    }
    (package / "collections.json").write_text(json.dumps(known))
    body = '<path fill="{}" d="M2 2h20v10H2z"/>'
    for name, fill in (("lines", "#000"), ("paints", "#f00")):
        icons = {"icons": {"cat": {"body": body.format(fill)}}, "width": 24, "height": 24}
        icons["aliases"] = {"kitty": {"parent": "cat"}}
        (package / "json" / f"{name}.json").write_text(json.dumps(icons))
    clipart = folder / "clipart"
    clipart.mkdir()
    start = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">'
    (clipart / "puss.svg").write_text(f'{start}<circle r="4" fill="blue"/></svg>')
    return clipart


CHOSEN = {"1f408": [("lines", "kitty"), ("paints", "cat"), ("openclipart", "puss")]}


def test_drawings_are_gathered_by_set_and_kind(tmp_path):
    pytest.importorskip("resvg_py")
    clipart = modules(tmp_path)
    credits = gather_drawings(tmp_path / "out", tmp_path, clipart, CHOSEN)
    assert credits["lines"] == ("Nobody", "MIT", 1)
    assert credits["openclipart"][1:] == ("public domain", 1)
    files = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.png")}
    assert files == {
        f"{GLYPHS}/1f408-lines-kitty.png",
        f"{DRAWN}/1f408-paints-cat.png",
        f"{DRAWN}/1f408-openclipart-puss.png",
    }
    with Image.open(tmp_path / "out" / DRAWN / "1f408-paints-cat.png") as picture:
        assert picture.size == (128, 64)
        assert picture.getpixel((64, 32)) == (255, 0, 0, 255)


def test_a_set_that_may_not_be_used_is_refused(tmp_path):
    pytest.importorskip("resvg_py")
    clipart = modules(tmp_path, licence="CC-BY-NC-4.0")
    with pytest.raises(ValueError, match=r"'lines' has the licence CC-BY-NC-4\.0"):
        gather_drawings(tmp_path / "out", tmp_path, clipart, CHOSEN)
    assert not any("SA" in licence or "NC" in licence for licence in LICENCES)


def test_regions_are_what_lines_enclose():
    opacity = np.asarray(drawn().getchannel("A"))
    found, count = paint.regions(opacity)
    assert count == 2
    assert found[48, 30] == 1  # the larger
    assert found[45, 78] == 2
    assert found[90, 90] == 0
    open_ = drawn()
    ImageDraw.Draw(open_).rectangle((20, 80, 40, 96), fill=(0, 0, 0, 0))
    found, count = paint.regions(np.asarray(open_.getchannel("A")))
    assert count == 1
    assert found[48, 30] == 0


def test_a_glyph_is_filled_in_the_colours_of_its_object():
    rng = np.random.default_rng(0)
    pictures = [np.asarray(paint.paint_glyph(drawn(), OWN, rng)) for _ in range(60)]
    assert np.mean([p[48, 30, 3] == 255 for p in pictures]) > 0.6  # mostly filled
    assert all(p[90, 90, 3] == 0 for p in pictures)
    inside = np.array([p[48, 30, :3] for p in pictures if p[48, 30, 3] == 255]).astype(int)
    distance = np.abs(inside[:, None] - OWN[0].astype(int)).max(axis=-1).min(axis=1)
    assert np.mean(distance < 45) > 0.4
    lines = np.array([p[48, 4, :3] for p in pictures]).astype(int)
    assert np.mean(lines.max(axis=-1) < 60) > 0.4  # most are dark
    # The fill differs from the lines that enclose it.
    assert (
        np.mean(np.abs(inside - [p[48, 4, :3] for p in pictures if p[48, 30, 3]]).max(-1) < 5) < 0.3
    )


def test_a_palette_lists_the_colours_from_the_most_frequent():
    colours = paint.palette(drawn(lines=False))
    assert colours.shape == (paint.COLOURS, 3)
    expected = [(255, 0, 0), (0, 0, 128), (255, 255, 0)]
    np.testing.assert_allclose(colours[:3], expected, atol=3)
    np.testing.assert_array_equal(colours[3:], np.broadcast_to(colours[0], (3, 3)))


def test_a_drawing_takes_the_palette_of_another():
    """The darkest colour becomes the darkest, and the shape stays."""
    picture = drawn(lines=False)
    greys = [np.array([[10, 10, 10]] * 2 + [[120, 120, 120]] * 2 + [[240, 240, 240]] * 2, np.uint8)]
    rng = np.random.default_rng(1)
    made = [np.asarray(paint.repaint(picture, greys, rng)).astype(int) for _ in range(20)]
    for array in made:
        np.testing.assert_array_equal(array[..., 3], np.asarray(picture)[..., 3])
    navy = np.array([a[45, 30, :3].mean() for a in made])
    yellow = np.array([a[45, 74, :3].mean() for a in made])
    assert np.mean(navy < yellow) > 0.9
    assert np.mean([np.ptp(a[45, 30, :3]) < 60 for a in made]) > 0.5  # grey, most of the time


def test_finishing_changes_some_drawings_and_keeps_their_size():
    rng = np.random.default_rng(2)
    picture = drawn(lines=False)
    made = [paint.finish(picture, rng) for _ in range(40)]
    assert {p.size for p in made} == {picture.size}
    same = np.mean([np.array_equal(np.asarray(p), np.asarray(picture)) for p in made])
    assert 0.15 < same < 0.6
    rimmed = paint._outlined(picture, np.random.default_rng(3))
    opacity = [np.asarray(p.getchannel("A")) > 128 for p in (rimmed, picture)]
    # The drawing shrinks to make room, and its rim fills the room again.
    assert abs(int(opacity[0].sum()) - int(opacity[1].sum())) < 0.15 * opacity[1].sum()


def test_every_drawing_is_painted_as_often_as_said(tmp_path):
    for entry in OBJECTS:
        for style, lines in (("style", False), (DRAWN, False), (GLYPHS, True)):
            (tmp_path / style).mkdir(exist_ok=True)
            name = entry.codepoint if style == "style" else f"{entry.codepoint}-set-name"
            drawn(lines=lines).save(tmp_path / style / f"{name}.png")
    count = paint.paint(tmp_path, ["style"], seed=4)
    each = 2 * paint.COLOUR_TIMES + paint.GLYPH_TIMES
    assert count == len(OBJECTS) * each
    first = {f.name: f.read_bytes() for f in (tmp_path / PAINTED).iterdir()}
    assert len(first) == count
    paint.paint(tmp_path, ["style"], seed=4)
    assert {f.name: f.read_bytes() for f in (tmp_path / PAINTED).iterdir()} == first
