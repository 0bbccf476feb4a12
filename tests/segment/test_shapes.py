"""Where people go on from a result: probabilities, tensors, masks, and how it is shown."""

from __future__ import annotations

import io
import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import fsa
from fsa import tiny
from fsa.errors import InputError
from fsa.pictures.reading import Picture
from fsa.segment import shapes
from tests.support.results import made_result

CLASSES = ["cat", ["dog", "hound"], "grass"]
SMALL = {"short_side": 64, "window": 48, "stride": 24}


@pytest.fixture(scope="module")
def segmentor():
    return fsa.load_segmentor(device="cpu")


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def blobs():
    """A result with a ring, an island in it, diagonal neighbours and what touches the edges."""
    labels = np.zeros((12, 17), np.int32)
    labels[2:9, 3:11] = 1
    labels[4:7, 5:9] = 0
    labels[5, 6] = 1
    labels[9, 11] = labels[10, 12] = 1
    labels[:, 15:] = 3
    rgb = torch.zeros(3, 12, 17, dtype=torch.uint8)
    return made_result(labels, ["sand", "ring", "nowhere", "edge"], Picture(rgb, "blobs"))


def test_the_probability_of_a_class_is_at_the_pictures_size(segmentor, picture):
    result = segmentor.segment(picture, CLASSES, **SMALL)
    every = np.stack([result.probabilities(name) for name in ("cat", "dog", "grass")])
    assert every.shape == (3, 70, 90)
    assert every.dtype == np.float32
    assert np.array_equal(result.probabilities(1), every[1])
    assert ((every.argmax(axis=0) == result.labels) | (np.ptp(every, axis=0) < 1e-6)).mean() > 0.999
    # Upsampled before the softmax, as the labels are.
    cosines = result.maps.cosines.values[None]
    full = functional.interpolate(cosines, size=(70, 90), mode="bilinear")[0]
    chances = (full * segmentor.logit_scale).softmax(0)
    np.testing.assert_allclose(every[0], chances[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(every[1], chances[1:3].amax(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hound", "background", 3, -1, True, None, 1.0])
def test_a_class_that_was_not_asked_for_has_no_probability(name, segmentor, picture):
    result = segmentor.segment(picture, CLASSES, prob_thd=0.9, **SMALL)
    with pytest.raises(InputError, match="is not one of the 3 classes that were asked for"):
        result.probabilities(name)


def test_tensors_and_arrays_share_their_memory(segmentor, picture):
    result = segmentor.segment(picture, CLASSES, on_device=True, **SMALL)
    assert result.label_tensor.device == segmentor.loaded.device
    assert result.labels.ctypes.data == result.label_tensor.data_ptr()
    assert result.scores.ctypes.data == result.score_tensor.data_ptr()
    assert result.score_tensor.shape[0] == 3


def test_run_lengths_are_cocos(blobs):
    coco = pytest.importorskip("pycocotools.mask")
    records = blobs.masks(["rle"])
    assert [record["class"] for record in records] == ["sand", "ring", "edge"]
    for record in records:
        mask = blobs.labels == record["number"]
        assert np.array_equal(coco.decode(record["rle"]), mask)
        assert record["area"] == mask.sum() == coco.area(record["rle"])
        assert record["bbox"] == coco.toBbox(record["rle"]).tolist()
        json.dumps(record)


def inside(rings, height, width):
    """Which pixels' middles lie in polygons with holes: an odd number of edges to their right."""
    y, x = np.mgrid[:height, :width] + 0.5
    crossed = np.zeros((height, width), dtype=int)
    for ring in rings:
        assert ring[0] == ring[-1]
        for (x0, y0), (x1, y1) in pairwise(ring):
            if y0 != y1:
                between = (np.minimum(y0, y1) <= y) & (y < np.maximum(y0, y1))
                crossed += between & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return crossed % 2 == 1


def test_polygons_hold_the_middles_of_their_pixels(blobs):
    for record in blobs.masks(["polygons"]):
        found = np.zeros((12, 17), dtype=int)
        for polygon in record["polygons"]:
            found += inside(polygon, 12, 17)
        assert np.array_equal(found, blobs.labels == record["number"])
        points = np.array([point for polygon in record["polygons"] for r in polygon for point in r])
        left, top, width, height = record["bbox"]
        assert points.min(axis=0).tolist() == [left, top]
        assert points.max(axis=0).tolist() == [left + width, top + height]
    ring = blobs.masks(["polygons"])[1]["polygons"]
    assert max(len(polygon) for polygon in ring) == 2
    # A rectangle has its corners cut, and nothing between them.
    edge = blobs.masks(["polygons"])[2]["polygons"]
    assert [len(r) for polygon in edge for r in polygon] == [9]


def test_masks_of_random_labels_are_whole():
    labels = np.random.default_rng(0).integers(0, 3, (23, 31)).astype(np.int32)
    rgb = torch.zeros(3, 23, 31, dtype=torch.uint8)
    result = made_result(labels, ["a", "b", "c"], Picture(rgb, "noise"))
    for record in result.masks(["polygons"]):
        found = sum(inside(polygon, 23, 31).astype(int) for polygon in record["polygons"])
        assert np.array_equal(found, labels == record["number"])


def test_masks_go_into_the_json_on_request(blobs, tmp_path):
    pytest.importorskip("pycocotools")
    plain = json.loads(blobs.save(tmp_path / "plain")["json"].read_text())
    assert "masks" not in plain
    record = json.loads(
        blobs.save(tmp_path / "masks", shapes=["rle", "polygons"])["json"].read_text()
    )
    assert record.pop("masks") == blobs.masks(["rle", "polygons"])
    assert record == plain


def test_what_is_not_installed_or_not_known_is_said(blobs, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="shapes='svg' is not accepted: it must be one of rle"):
        blobs.save(tmp_path / "out", shapes=["svg"])
    monkeypatch.setattr(shapes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="'rle' needs pycocotools, which is not installed: pip"):
        blobs.save(tmp_path / "out", shapes=["rle"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="needs supervision, which is not installed: pip install"):
        blobs.to_detections()


@pytest.mark.parametrize("prob_thd", [0.0, 0.4])
def test_detections_are_supervisions(prob_thd, segmentor):
    supervision = pytest.importorskip("supervision")
    picture = np.asarray(Image.open(tiny.demo_scenes()[4].picture).convert("RGB"))
    result = segmentor.segment(picture, tiny.demo_scenes()[4].classes, prob_thd=prob_thd)
    found = result.to_detections()
    assert isinstance(found, supervision.Detections)
    names = [name for name, share in result.areas().items() if share > 0]
    assert found.data["class_name"].tolist() == names
    assert len(found) == len(names)
    assert len(set(names) - {"background"}) > 1
    for index, name in enumerate(names):
        mask = result.labels == result.class_names.index(name)
        assert np.array_equal(found.mask[index], mask)
        assert found.class_id[index] == result.class_names.index(name)
        left, top, right, bottom = found.xyxy[index].astype(int)
        assert mask.sum() == mask[top:bottom, left:right].sum()
        assert mask[top].any()
        assert mask[:, right - 1].any()
        if name == "background":
            assert np.isnan(found.confidence[index])
        else:
            expected = result.probabilities(name)[mask].mean()
            assert found.confidence[index] == pytest.approx(expected, abs=1e-5)


def test_a_result_is_shown_in_words_and_in_a_notebook(blobs):
    assert repr(blobs).startswith("<Segmentation of the picture, 17 x 12 pixels: sand ")
    assert "nowhere" not in repr(blobs)
    assert "\n" not in repr(blobs)
    with Image.open(io.BytesIO(blobs._repr_png_())) as shown:
        assert shown.size == blobs.overlay().size
    rgb = torch.zeros(3, 1500, 2000, dtype=torch.uint8)
    large = made_result(np.zeros((1500, 2000), np.int32), ["sand"], Picture(rgb, "large"))
    with Image.open(io.BytesIO(large._repr_png_())) as shown:
        assert max(shown.size) == 1024
