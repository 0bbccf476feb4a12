"""Many pictures: read ahead, windows batched across them, results in order, errors apart."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import fsa
from fsa.errors import FSAError, InputError, NotFiniteError, OutOfMemoryError
from fsa.pictures import ahead
from fsa.pictures.ahead import read_ahead
from fsa.pictures.reading import Picture

CLASSES = ["cat", ["dog", "hound"], "grass"]
SMALL = {"short_side": 64, "window": 48, "stride": 24}


@pytest.fixture
def segmentor():
    return fsa.load_segmentor(device="cpu")


@pytest.fixture
def files(tmp_path):
    paths = []
    for number, size in enumerate([(90, 60), (60, 60), (70, 140), (20, 30), (64, 64)]):
        values = np.random.default_rng(number).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        paths.append(tmp_path / f"p{number}.png")
        Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def same(result, expected):
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=2e-5)
    assert (result.labels == expected.labels).mean() > 0.999
    assert result.picture.path == expected.picture.path
    differing = {"seconds"}
    assert {k: v for k, v in result.settings.items() if k not in differing} == {
        k: v for k, v in expected.settings.items() if k not in differing
    }


@pytest.mark.parametrize("window_batch", [1, 4, 64])
def test_many_are_segmented_as_each_by_itself(window_batch, segmentor, files):
    expected = [segmentor.segment(file, CLASSES, prob_thd=0.3, **SMALL) for file in files]
    results = list(
        segmentor.segment_many(files, CLASSES, prob_thd=0.3, window_batch=window_batch, **SMALL)
    )
    for result, alike in zip(results, expected, strict=True):
        same(result, alike)


def test_a_batch_is_filled_across_pictures(segmentor, files, monkeypatch):
    batches = []
    original = segmentor.window_cosines

    def remember(crops, queries):
        batches.append(len(crops))
        return original(crops, queries)

    monkeypatch.setattr(segmentor, "window_cosines", remember)
    seen = []
    progress = lambda *call: seen.append(call)  # noqa: E731
    list(segmentor.segment_many(files, CLASSES, window_batch=8, progress=progress, **SMALL))
    assert batches[:-1] == [8] * (len(batches) - 1)
    windows = {number: total for number, _, total in seen}
    assert sum(batches) == sum(windows.values())
    assert seen == [(n, i + 1, windows[n]) for n in range(5) for i in range(windows[n])]


def test_errors_come_in_their_place_and_stop_nobody(segmentor, files, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    given = [tmp_path / "gone.png", files[0], tmp_path / "bad.png", 17, *files[1:3], files[3]]
    results = list(segmentor.segment_many(given, CLASSES, **SMALL))
    kinds = [isinstance(result, FSAError) for result in results]
    assert kinds == [True, False, True, True, False, False, False]
    assert "gone.png: no such file" in str(results[0])
    assert "bad.png: not a picture" in str(results[2])
    assert "not int" in str(results[3])
    assert [r.picture.name for r in results[4:]] == ["p1", "p2", "p3"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotFiniteError("NaN"), r"p2\.png: tiny with the weights embedded makes NaN"),
        (MemoryError(), "out of memory: windows of 48 pixels, 8 at once"),
    ],
)
def test_a_picture_that_breaks_its_batch_leaves_the_others(
    error, message, segmentor, files, monkeypatch
):
    expected = [segmentor.segment(file, CLASSES, **SMALL) for file in files]
    original = segmentor.window_cosines
    # Known by its first pixels, wherever in a batch it lies.
    working = fsa.segment.sizes.resized(
        fsa.pictures.reading.read_image(files[2]), 64, torch.device("cpu")
    )
    marked = segmentor.normalise(working)[:, :48, :48]

    def breaking(crops, queries):
        if any(torch.equal(crop, marked) for crop in crops):
            raise error
        return original(crops, queries)

    monkeypatch.setattr(segmentor, "window_cosines", breaking)
    results = list(segmentor.segment_many(files, CLASSES, window_batch=8, **SMALL))
    kind = NotFiniteError if isinstance(error, NotFiniteError) else OutOfMemoryError
    assert isinstance(results[2], kind)
    with pytest.raises(kind, match=message):
        raise results[2]
    for number in (0, 1, 3, 4):
        same(results[number], expected[number])


def test_what_no_picture_is_accepted_with_is_raised_at_once(segmentor, files):
    for options, message in (
        ({"window": 3}, "window=3"),
        ({"window_batch": 0}, "window_batch=0"),
        ({"prob_thd": 2}, "prob_thd=2"),
    ):
        with pytest.raises(InputError, match=message):
            segmentor.segment_many(files, CLASSES, **options)
    with pytest.raises(InputError, match="must be several"):
        segmentor.segment_many("folder", CLASSES)


def test_pictures_may_be_endless_and_few_are_held(segmentor):
    given = []

    def stream():
        frame = np.zeros((48, 48, 3), np.uint8)
        for number in itertools.count():
            given.append(number)
            # The same array again and again, as a camera fills it.
            frame[:] = number
            yield frame

    results = segmentor.segment_many(stream(), CLASSES, **SMALL | {"window_batch": 2})
    for number, result in enumerate(itertools.islice(results, 12)):
        assert int(result.picture.rgb[0, 0, 0]) == number
        assert len(given) <= number + 10
    results.close()


def test_the_caller_is_not_put_into_inference_mode(segmentor, files):
    for _ in segmentor.segment_many(files[:2], CLASSES, **SMALL):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_files_are_read_ahead_in_the_background_in_order(files, monkeypatch):
    threads = []
    original = ahead.read_image

    def remember(source):
        threads.append(threading.current_thread().name)
        return original(source)

    monkeypatch.setattr(ahead, "read_image", remember)
    names = [picture.name for picture in read_ahead(files * 4)]
    assert names == [file.stem for file in files] * 4
    assert all(name.startswith("fsa-read") for name in threads)


def test_few_large_pictures_wait(monkeypatch):
    begun = []
    monkeypatch.setattr(
        ahead, "read_image", lambda s: Picture(torch.zeros(3, 6000, 6000, dtype=torch.uint8), s)
    )

    def sources():
        for number in range(6):
            begun.append(number)
            yield object()

    pictures = read_ahead(sources())
    for number, _ in enumerate(pictures):
        assert len(begun) <= number + 2
