"""Never silently wrong: NaN is an error by name, autocast changes nothing, copies are whole."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import sys

import numpy as np
import pytest
import torch

import fsa
from fsa.errors import NotFiniteError
from fsa.models.text import TextEncoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = ["cat", ["grass", "lawn"]]
SMALL = {"short_side": 64, "window": 48, "stride": 24}
HOSTS = ["clearclip", "sclip", "proxyclip"]


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0))


def loaded(host="clearclip", feedback=True, **options):
    return fsa.load_segmentor(host, feedback=feedback, device=DEVICE, **options)


@pytest.fixture
def damaged():
    """Makes a segmentor's tower answer NaN for every picture, as overflowing weights would."""

    def damage(segmentor):
        with torch.no_grad():
            segmentor.loaded.model.visual.ln_post.bias.fill_(float("nan"))
        return segmentor

    return damage


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_nan_is_an_error_that_names_picture_and_checkpoint(
    host, feedback, damaged, picture, tmp_path
):
    from PIL import Image

    file = tmp_path / "night.png"
    Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(file)
    segmentor = damaged(loaded(host, feedback))
    with pytest.raises(NotFiniteError, match=r"night\.png: tiny with the weights embedded makes"):
        segmentor.segment(file, CLASSES, prob_thd=0.3, **SMALL)
    with pytest.raises(NotFiniteError, match="the picture: tiny with"):
        segmentor.segment(picture, CLASSES, **SMALL)


def test_nan_in_what_a_patch_attends_to_is_an_error_too(damaged, picture):
    with pytest.raises(NotFiniteError, match="the picture: tiny"):
        damaged(loaded()).attentions_at(picture, CLASSES, (1, 1), **SMALL)


def test_nan_in_the_text_is_an_error_that_names_the_checkpoint():
    segmentor = loaded()
    with torch.no_grad():
        segmentor.loaded.model.ln_final.bias.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="the class names: tiny with the weights embedded"):
        segmentor.encode(CLASSES)


def test_the_command_names_what_is_damaged(run, tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (64, 48), "green").save(tmp_path / "a.png")
    monkeypatch.setattr(
        TextEncoder, "_encode_texts", lambda self, texts: torch.full((len(texts), 192), torch.nan)
    )
    options = ["--device", "cpu", "--no-cache", "--out", tmp_path / "out"]
    code, _, stderr = run("segment", tmp_path, "--classes", "cat; dog", *options)
    assert code == 1
    assert "the class names: tiny with the weights embedded makes NaN or inf" in stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("host", HOSTS)
def test_autocast_changes_no_bit(host, dtype, picture):
    segmentor = loaded(host, dtype="float32")
    expected = segmentor.segment(picture, CLASSES, **SMALL)
    seen = segmentor.attentions_at(picture, CLASSES, (1, 1), **SMALL)
    fresh = loaded(host, dtype="float32")
    with torch.autocast(DEVICE, dtype=dtype):
        result = fresh.segment(picture, CLASSES, **SMALL)
        seen_again = fresh.attentions_at(picture, CLASSES, (1, 1), **SMALL)
    assert np.array_equal(result.scores, expected.scores)
    assert np.array_equal(result.labels, expected.labels)
    assert np.array_equal(seen_again.adapted, seen.adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [None, fsa.FSAConfig()])
def test_autocast_changes_no_bit_of_a_hosts_features(config, dtype):
    segmentor = loaded("sclip", dtype="float32")
    images = torch.rand(2, 3, 64, 48, device=DEVICE)
    texts = segmentor.encode(CLASSES).features
    expected = segmentor.host.features(images, texts, config=config)
    with torch.autocast(DEVICE, dtype=dtype):
        result = segmentor.host.features(images, texts, config=config)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def in_a_process(segmentor, picture):
    return segmentor.segment(picture, CLASSES, **SMALL).labels


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("host", HOSTS)
def test_a_segmentor_is_copied_whole(host, copied, picture):
    segmentor = loaded(host)
    expected = segmentor.segment(picture, CLASSES, **SMALL)
    again = copied(segmentor)
    assert again.loaded.model is not segmentor.loaded.model
    result = again.segment(picture, CLASSES, **SMALL)
    assert np.array_equal(result.labels, expected.labels)
    # Of its own: what one is told, the other does not hear.
    again.encode(["another class"])
    assert len(again._text._cache) == len(segmentor._text._cache) + 1


@pytest.mark.skipif(sys.platform == "win32" or DEVICE == "cuda", reason="fork and a device")
def test_a_segmentor_goes_to_another_process(picture):
    segmentor = loaded()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        labels = pool.apply(in_a_process, (segmentor, picture))
    assert np.array_equal(labels, segmentor.segment(picture, CLASSES, **SMALL).labels)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
def test_a_segmentor_with_graphs_is_copied_without_them(picture):
    segmentor = loaded(cuda_graph=True)
    expected = segmentor.segment(picture, CLASSES, **SMALL)
    again = pickle.loads(pickle.dumps(segmentor))
    assert len(again.graphs) == 0
    assert np.array_equal(again.segment(picture, CLASSES, **SMALL).labels, expected.labels)
    assert len(again.graphs) > 0
    with torch.no_grad():
        segmentor.loaded.model.visual.ln_post.bias.fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        segmentor.segment(picture, CLASSES, **SMALL)


def test_numbers_of_numpy_are_written_down(picture, tmp_path):
    sizes = {name: np.int64(size) for name, size in SMALL.items()}
    result = loaded().segment(
        picture, CLASSES, prob_thd=np.float32(0.25), window_batch=np.int32(3), **sizes
    )
    result.save(tmp_path)
    assert result.settings["prob_thd"] == 0.25
    assert type(result.settings["window"]) is int
