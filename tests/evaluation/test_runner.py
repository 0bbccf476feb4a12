"""The count: right, the same however the work is cut, and never twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import fsa
from fsa import FSAConfig, InputError
from fsa.evaluation import datasets, loading, protocol, runner, state
from fsa.evaluation.metrics import ConfusionMatrix, confusion, mean_iou
from fsa.evaluation.resizing import resize
from fsa.pictures.reading import read_image
from fsa.segment import batching
from tests.support.evaluation_data import counts, folder, write_mask, write_picture

ROOT = Path(__file__).parents[2]
# Of the published configurations.
CLIP_MEAN, CLIP_STD = (122.771, 116.746, 104.094), (68.501, 66.632, 70.323)
SMALL = {"short_side": 64, "window": 48, "stride": 24}
OPTIONS = ["--short-side", "64", "--window", "48", "--stride", "24", "--chunk", "2"]


@pytest.fixture(scope="module")
def segmentor():
    return fsa.load_segmentor()


@pytest.fixture
def preset():
    return protocol.preset("tiny", "folder").override(**SMALL)


@pytest.fixture
def evaluate(segmentor, preset, tmp_path):
    """Evaluates the folder at tmp_path/data; keyword arguments as `runner.evaluate` has them."""

    def evaluate(out="out", settings=preset, ignore=(), model=segmentor, **options):
        dataset = datasets.open_dataset("folder", tmp_path / "data", ignore=ignore)
        options = {"workers": 0, "quiet": True, "window_batch": 3, "chunk": 2, **options}
        return runner.evaluate(model, dataset, settings, tmp_path / out, **options)

    return evaluate


def iou_by_sets(pictures, count):
    """Each class's IoU from the sets of its pixels; None where it is nowhere."""
    scores = []
    for number in range(count):
        true, said = set(), set()
        for index, (labels, mask) in enumerate(pictures):
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    if mask[y, x] == 255:
                        continue
                    if mask[y, x] == number:
                        true.add((index, y, x))
                    if labels[y, x] == number:
                        said.add((index, y, x))
        union = true | said
        scores.append(len(true & said) / len(union) if union else None)
    return scores


def test_the_matrix_against_sets_of_pixels(evaluate, monkeypatch, tmp_path):
    # The last class is in no mask, and with a name so unlike the others in no label either.
    root = folder(tmp_path / "data", pictures=3, classes="cat\ndog, hound\ngrass\nsky\n")
    for path in (root / "masks").iterdir():
        mask = np.random.default_rng(len(path.name)).integers(0, 2, (40, 50), dtype=np.uint8)
        mask[5:9] = 255
        write_mask(path, mask)
        write_picture(root / "images" / f"{path.stem}.jpg", (40, 50), 5)
    seen = []
    original = runner.label_map

    def remember(*arguments, **options):
        labels = original(*arguments, **options) % 3
        seen.append(labels.numpy())
        return labels

    monkeypatch.setattr(runner, "label_map", remember)
    result = evaluate()
    dataset = datasets.open_dataset("folder", root)
    stored = [dataset.read_mask(sample.mask) for sample in dataset.samples]
    masks = [np.where(mask < 0, 255, mask) for mask in stored]
    expected = iou_by_sets(list(zip(seen, masks, strict=True)), 4)
    assert expected[3] is None
    for value, reference in zip(result.iou(), expected, strict=True):
        assert (
            np.isnan(value) if reference is None else value == pytest.approx(reference, abs=1e-12)
        )
    present = [score for score in expected if score is not None]
    assert result.miou() == pytest.approx(sum(present) / len(present), abs=1e-12)
    assert result.counts.sum() == 3 * 36 * 50


def test_the_matrix_by_hand():
    matrix = ConfusionMatrix(3, "cpu")
    mask = torch.tensor([[0, 0, 1], [1, -1, -1]], dtype=torch.int32)
    labels = torch.tensor([[0, 1, 1], [1, 2, 0]], dtype=torch.int32)
    matrix.add(labels, mask)
    assert matrix.counts().tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    # (1/2 + 2/3) / 2: the third class is nowhere.
    assert mean_iou(matrix.counts().numpy()) == pytest.approx(7 / 12)
    stored = np.where(mask.numpy() < 0, 255, mask.numpy())
    assert np.array_equal(matrix.counts().numpy(), confusion(labels.numpy(), stored, 3))


def test_the_labels_are_those_of_the_published_loop(segmentor, preset, tmp_path, evaluate):
    """One window after the other, one picture after the other, as the protocol is written down."""
    root = folder(tmp_path / "data", pictures=3)
    dataset = datasets.open_dataset("folder", root)
    result = evaluate()
    queries = segmentor.encode(dataset.classes)
    expected = np.zeros((3, 3), dtype=np.int64)
    for sample in dataset.samples:
        image = read_image(sample.image).rgb
        size = tuple(image.shape[-2:])
        scale = 64 / min(size)
        # As OpenCV does it, which has tests of its own; then with the published mean and deviation.
        small = resize(image, tuple(int(side * scale + 0.5) for side in size)).float()
        mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
        small = (small - mean) / std
        h, w = small.shape[-2:]
        total, times = torch.zeros(4, h, w), torch.zeros(h, w)
        for i in range(max(h - 48 + 23, 0) // 24 + 1):
            for j in range(max(w - 48 + 23, 0) // 24 + 1):
                y, x = min(24 * i, h - 48), min(24 * j, w - 48)
                crop = small[None, :, y : y + 48, x : x + 48]
                with torch.inference_mode():
                    (maps,) = segmentor.window_cosines(crop, queries)
                    total[:, y : y + 48, x : x + 48] += maps.whole()
                times[y : y + 48, x : x + 48] += 1
        maps = functional.interpolate((total / times)[None], size=size, mode="bilinear")[0]
        chances = (maps * 40).softmax(0)
        chances = torch.stack([chances[0], chances[1:3].amax(0), chances[3]])
        mask = dataset.read_mask(sample.mask)
        labels = chances.argmax(0).numpy()
        expected += confusion(labels, np.where(mask < 0, 255, mask), 3)
    assert result.counts.sum() == expected.sum()
    # Batches of other sizes round differently: a pixel may lie on the border of two classes.
    assert np.abs(result.counts - expected).sum() <= 4
    assert np.count_nonzero(expected.sum(axis=0)) > 1


def test_windows_of_several_pictures_share_a_batch(segmentor, monkeypatch):
    sizes = []
    original = segmentor.window_cosines

    def remember(crops, queries):
        sizes.append(tuple(crops.shape))
        return original(crops, queries)

    monkeypatch.setattr(segmentor, "window_cosines", remember)
    generator = torch.Generator().manual_seed(0)
    pictures = [
        (key, torch.randn(3, *size, generator=generator))
        for key, size in enumerate([(48, 96), (48, 72), (48, 48), (32, 40), (48, 48)])
    ]
    queries = segmentor.encode(["cat", "dog"])
    with torch.inference_mode():
        together = list(batching.merged_cosines(segmentor, pictures, queries, 48, 24, 4))
        assert sizes == [(4, 3, 48, 48), (2, 3, 48, 48), (1, 3, 32, 40), (1, 3, 48, 48)]
        assert [key for key, _ in together] == [0, 1, 2, 3, 4]
        for picture, (_, cosines) in zip(pictures, together, strict=True):
            ((_, alone),) = batching.merged_cosines(segmentor, [picture], queries, 48, 24, 1)
            assert cosines.shape == (2, *picture[1].shape[-2:])
            torch.testing.assert_close(cosines, alone, rtol=0, atol=1e-5)


def test_workers_and_chunks_already_done_have_no_influence(evaluate, tmp_path):
    folder(tmp_path / "data")
    whole = evaluate("whole")
    assert whole.pictures == 7
    assert np.array_equal(evaluate("workers", workers=2).counts, whole.counts)
    again = evaluate("whole")
    assert np.array_equal(again.counts, whole.counts)
    assert again.pictures == 7
    assert again.seconds == whole.seconds


def test_a_run_that_stopped_goes_on(evaluate, tmp_path, capsys):
    root = folder(tmp_path / "data")
    whole = evaluate("whole")
    good = (root / "images/p5.jpg").read_bytes()
    (root / "images/p5.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"p5\.jpg: not a picture"):
        evaluate()
    (root / "images/p5.jpg").write_bytes(good)
    with np.load(tmp_path / "out/state-0.npz") as stored:
        assert json.loads(str(stored["record"]))["chunks"] == [0, 1]
    capsys.readouterr()
    resumed = evaluate(quiet=False)
    assert "going on after 4 of 7 pictures" in capsys.readouterr().err
    assert np.array_equal(resumed.counts, whole.counts)
    assert (resumed.pictures, resumed.skipped) == (7, {})


def test_files_that_cannot_be_used_are_skipped_and_counted(evaluate, tmp_path):
    root = folder(tmp_path / "data")
    clean = evaluate("clean", chunk=7, window_batch=1)
    (root / "images/p1.jpg").write_bytes(b"no picture")
    write_mask(root / "masks/p2.png", np.zeros((3, 4), np.uint8))
    (root / "masks/p3.png").unlink()
    write_mask(root / "masks/p4.png", np.full((46, 50), 9, np.uint8))
    with pytest.raises(InputError, match=r"p1\.jpg"):
        evaluate(chunk=7, window_batch=1)
    result = evaluate(on_error="skip", chunk=7, window_batch=1)
    assert result.pictures == 3
    assert list(result.skipped) == ["p1", "p2", "p3", "p4"]
    assert "4 x 3 pixels, but the picture" in result.skipped["p2"]
    assert "no such mask" in result.skipped["p3"]
    assert "label 9" in result.skipped["p4"]
    assert (result.counts <= clean.counts).all()
    assert result.counts.sum() < clean.counts.sum()
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert list(record["skipped"]) == ["p1", "p2", "p3", "p4"]


def test_another_protocol_is_refused(evaluate, segmentor, preset, tmp_path):
    root = folder(tmp_path / "data", pictures=2)
    first = evaluate()
    with pytest.raises(InputError, match=r"another protocol:\n  preset\.name.*\n  preset\.stride"):
        evaluate(settings=preset.override(stride=32))
    with pytest.raises(InputError, match=r"feedback\.beta: 3\.0, now 1\.0"):
        evaluate(model=segmentor.with_feedback(FSAConfig(beta=1.0)))
    with pytest.raises(InputError, match="ignore"):
        evaluate(ignore=[7])
    (root / "classes.txt").write_text("cat\ndog\nmeadow\n")
    with pytest.raises(InputError, match="classes: other names"):
        evaluate()
    changed = evaluate(restart=True)
    assert changed.counts.sum() == first.counts.sum()


def test_a_damaged_state_is_named(evaluate, tmp_path):
    folder(tmp_path / "data", pictures=2)
    evaluate()
    (tmp_path / "out/state-0.npz").write_bytes(b"PK broken")
    with pytest.raises(InputError, match=r"state-0\.npz: not the state of an evaluation"):
        evaluate()


def test_states_of_more_processes_than_now_are_counted(evaluate, tmp_path):
    folder(tmp_path / "data")
    whole = evaluate()
    file = tmp_path / "out/state-0.npz"
    with np.load(file) as stored:
        record = json.loads(str(stored["record"]))["protocol"]
    # As if two processes had been killed after a chunk each: of the first, nothing is left.
    os.rename(file, tmp_path / "out/state-1.npz")
    again = evaluate()
    assert np.array_equal(again.counts, whole.counts)
    assert again.pictures == 7
    # The same chunks in two files would count twice.
    state.save(file, state.load(tmp_path / "out/state-1.npz", record), record)
    with pytest.raises(InputError, match="counted by two processes"):
        evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_batch": 0}, "window_batch=0"),
        ({"workers": -1}, "workers=-1"),
        ({"chunk": 1.5}, "chunk=1.5"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_arguments_that_are_not_accepted(options, message, evaluate, tmp_path):
    folder(tmp_path / "data", pictures=1)
    with pytest.raises(InputError, match=message):
        evaluate(**options)


def test_settings_that_are_not_accepted(evaluate, preset, tmp_path):
    folder(tmp_path / "data", pictures=1)
    for changes, message in (
        ({"window": 0}, "window=0"),
        ({"stride": 49}, "at most the window, 48"),
        ({"prob_thd": 1.5}, r"prob_thd=1\.5"),
        ({"logit_scale": 0.0}, "logit_scale=0"),
    ):
        with pytest.raises(InputError, match=message):
            preset.override(**changes)
    with pytest.raises(InputError, match="at least a patch of the model, 16"):
        evaluate(settings=preset.override(window=8, stride=8))
    with pytest.raises(InputError, match="'folder' has no class of that name"):
        evaluate(settings=preset.override(prob_thd=0.5))


def test_uncertain_pixels_become_background(evaluate, preset, tmp_path):
    folder(tmp_path / "data", pictures=2, classes="cat\ndog\nbackground\n")
    result = evaluate(settings=preset.override(prob_thd=1.0))
    assert result.counts[:, :2].sum() == 0
    assert result.counts[:, 2].sum() > 0
    # A small scale leaves three equal chances, a large one hardly any doubt.
    doubtful = evaluate("flat", settings=preset.override(prob_thd=0.5, logit_scale=0.01))
    assert doubtful.counts[:, :2].sum() == 0
    certain = evaluate("sharp", settings=preset.override(prob_thd=0.5, logit_scale=1e4))
    assert certain.counts[:, :2].sum() > 0


def test_classes_of_small_area_give_way(segmentor):
    queries = segmentor.encode(["background", "cat", "dog", "grass"])
    cosines = torch.zeros(4, 10, 10)
    cosines[0, :5] = 1.0
    cosines[1, 5:, :9] = 1.0
    cosines[2, 5:, 9:] = 1.0
    cosines[3, 5:] = 0.5
    with torch.inference_mode():
        kept = fsa.segment.labels.label_map(cosines, queries, (10, 10), 0.1, 0, area_thd=0.05)
        dropped = fsa.segment.labels.label_map(cosines, queries, (10, 10), 0.1, 0, area_thd=0.1)
    assert kept.unique(return_counts=True)[1].tolist() == [50, 45, 5]
    # dog has 5 of the foreground's 50 pixels; what is left there is too uncertain.
    assert dropped.unique().tolist() == [0, 1]
    assert (dropped == 1).sum() == 45


KILLED = """
import sys, time
from fsa.cli import app as cli
from fsa.evaluation import runner

original = runner.label_map
def slow(*arguments, **options):
    time.sleep(0.3)
    return original(*arguments, **options)
runner.label_map = slow
runner._SECONDS_BETWEEN_SAVES = 0
cli.main()
"""


def command(root, out, *more):
    return ["eval", "folder", "--root", str(root), "--out", str(out), *OPTIONS, "--quiet", *more]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_and_started_again_it_counts_the_same(tmp_path):
    root = folder(tmp_path / "data")
    plain = [sys.executable, "-m", "fsa"]
    subprocess.run(
        [*plain, *command(root, tmp_path / "whole")], env=environment(), check=True, timeout=300
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *command(root, out)],
        env=environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (out / "state-0.npz").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with np.load(out / "state-0.npz") as stored:
        done = json.loads(str(stored["record"]))["chunks"]
    assert 0 < len(done) < 4
    assert not (out / "result.json").exists()
    subprocess.run([*plain, *command(root, out)], env=environment(), check=True, timeout=300)
    assert np.array_equal(counts(out), counts(tmp_path / "whole"))
    assert json.loads((out / "result.json").read_text())["pictures"] == 7


@pytest.mark.slow
def test_two_processes_count_the_same_as_one(tmp_path):
    root = folder(tmp_path / "data")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for size in (1, 2):
        out = tmp_path / f"of-{size}"
        finished = subprocess.run(
            [*launch, str(size), "-m", "fsa", *command(root, out)],
            env=environment(),
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
        # One of them speaks.
        assert len(finished.stdout.split()) == 1
        assert len(state.state_files(out)) == size
    assert np.array_equal(counts(tmp_path / "of-1"), counts(tmp_path / "of-2"))
    assert json.loads((tmp_path / "of-2/result.json").read_text())["pictures"] == 7
    assert counts(tmp_path / "of-2").sum() > 0


LEFT_AT_WORK = """
import torch
from torch import distributed
from fsa.evaluation import processes

store = distributed.HashStore()
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
distributed.all_gather([torch.zeros(10**7)], torch.zeros(10**7), async_op=True)
processes.stop()
"""


def test_leaving_a_group_whose_threads_hold_tensors():
    """Under torch 2.6 a run in several processes had its result, and now and then did not end."""
    subprocess.run([sys.executable, "-c", LEFT_AT_WORK], env=environment(), check=True, timeout=60)


def test_resizing_rounds_and_does_not_smooth():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, ::2] = 255
    half = loading.resize(image, (4, 4), antialias=False)
    assert half.dtype == torch.uint8
    assert half.unique().tolist() == [128]
    assert torch.equal(loading.resize(image, (8, 8), False), image)


def test_a_name_in_two_classes_is_taken_where_it_is_asked_for(segmentor):
    """COCO-Object's background goes by "bed" too."""
    classes = [["sky", "bed"], "cat", "bed"]
    with pytest.raises(InputError, match="'bed' twice"):
        segmentor.encode(classes)
    queries = segmentor.encode(classes, allow_repeats=True)
    assert queries.class_index.tolist() == [0, 0, 1, 2]
    assert torch.equal(queries.features[1], queries.features[3])
