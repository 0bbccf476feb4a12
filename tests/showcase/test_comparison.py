"""`fsa compare`, and the attention of one patch behind it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fsa import load_segmentor, tiny
from fsa.errors import InputError
from fsa.showcase import comparison

SCENE = tiny.demo_scenes()[0]
CLASSES = ["grass", "brick", "castle", "rocket", "mushroom"]
SIZES = {"short_side": 160, "window": 96, "stride": 48}


@pytest.fixture(scope="module")
def segmentor():
    return load_segmentor("sclip", device="cpu")


@pytest.mark.parametrize("place", [[], ["--patch", "3, 5"]])
def test_a_figure_is_written(run, tmp_path, place):
    file = tmp_path / "new" / "compare.png"
    options = ["--host", "proxyclip", "--short-side", "112", "--out", file, *place]
    code, stdout, _ = run("compare", SCENE.picture, "--classes", "; ".join(CLASSES), *options)
    assert code == 0
    assert f"patch {'3,5' if place else '3,4'}: " in stdout
    assert f"wrote {file}" in stdout
    with Image.open(file) as figure:
        assert figure.width > 3 * 300
        assert figure.height > 2 * 300


@pytest.mark.parametrize("size", [(300, 1), (3000, 2), (1, 1), (2, 90)])
def test_pictures_of_any_shape_make_a_figure(run, tmp_path, size):
    picture, file = tmp_path / "thin.png", tmp_path / "compare.png"
    Image.new("RGB", size, "green").save(picture)
    options = ["--short-side", "16", "--window", "64", "--stride", "64", "--out", file]
    code, _, stderr = run("compare", picture, "--classes", "cat; dog", *options)
    assert (code, stderr) == (0, "")
    with Image.open(file) as figure:
        assert figure.width > 3 * 300
        assert figure.height < 8 * 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patch", "3"], "patch='3' must be ROW,COL"),
        (["--patch", "40,0"], "it has rows 0 to 6 and columns 0 to 9"),
    ],
)
def test_a_patch_that_is_not_there_is_refused(run, tmp_path, options, message):
    file = tmp_path / "compare.png"
    options = ["--short-side", "112", "--out", file, *options]
    code, _, stderr = run("compare", SCENE.picture, "--classes", "sand; snow", *options)
    assert code == 1
    assert message in stderr
    assert not file.exists()


def test_a_name_that_cannot_be_written_has_its_number_in_the_list(segmentor):
    result = segmentor.segment(SCENE.picture, ["sand", "\ue000", "snow"], **SIZES)
    labels = np.ones_like(result.labels)
    labels[0] = 2
    result = replace(result, label_tensor=torch.from_numpy(labels))
    order, names = comparison._largest_first(result, result)
    assert names == ["class 1", "snow"]
    assert order.tolist() == [2, 0, 1]


def test_the_proxy_of_a_figure_comes_from_a_file_too(run, tmp_path):
    options = ["--host", "proxyclip", "--vfm", "dino", "--vfm-pretrained", tmp_path / "gone.pt"]
    code, _, stderr = run("compare", SCENE.picture, "--classes", "sand; snow", *options)
    assert (code, "gone.pt': no such file" in stderr) == (1, True)


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3", "-1,2", "1.5,2"])
def test_a_place_is_two_whole_numbers(text):
    with pytest.raises(InputError, match="ROW,COL"):
        comparison.parse_patch(text)


@pytest.mark.parametrize("host", ["maskclip", "sclip", "proxyclip"])
def test_a_patch_is_looked_at_in_the_window_around_it(segmentor, host):
    segmentor = segmentor.with_host(host)
    for patch in ((0, 0), (5, 7), (9, 12)):
        seen = segmentor.attentions_at(SCENE.picture, CLASSES, patch, **SIZES)
        assert seen.size == (160, 213)
        assert seen.host.shape == seen.feedback.shape == seen.adapted.shape == (6, 6)
        # The patch of the window lies over the one that was named.
        middle = np.array(seen.patch) * 16 + 8 + (seen.area.top, seen.area.left)
        assert np.abs(middle - (np.array(patch) * 16 + 8)).max() < 16
        assert seen.feedback.sum() == pytest.approx(1, abs=1e-5)
        assert seen.kept[seen.patch]
        assert 1 <= seen.kept.sum() < seen.kept.size
    if host == "maskclip":
        assert seen.host[seen.patch] == pytest.approx(1)
        np.testing.assert_allclose(seen.adapted, seen.feedback, atol=1e-6)
    else:
        assert not np.allclose(seen.adapted, seen.host, atol=1e-3)


def test_there_is_nothing_to_look_at_without_feedback(segmentor):
    with pytest.raises(InputError, match="no feedback"):
        segmentor.with_feedback(False).attentions_at(SCENE.picture, CLASSES, (0, 0))
