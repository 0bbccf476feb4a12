"""A run never answers from what it counted of other files, under other names or beside another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import fsa
from fsa import InputError
from fsa.evaluation import datasets, fingerprint, locking, protocol, runner, state
from fsa.evaluation.processes import Group
from tests.evaluation.test_runner import KILLED, OPTIONS, command, environment
from tests.support.evaluation_data import counts, folder, write_mask, write_picture


@pytest.fixture(scope="module")
def segmentor():
    return fsa.load_segmentor()


@pytest.fixture
def evaluate(segmentor, tmp_path):
    """Evaluates the folder at tmp_path/data."""

    def evaluate(ignore=(), **options):
        dataset = datasets.open_dataset("folder", tmp_path / "data", ignore=ignore)
        preset = protocol.preset("tiny", "folder").override(short_side=64, window=48, stride=24)
        options = {"workers": 0, "quiet": True, "window_batch": 3, "chunk": 2, **options}
        return runner.evaluate(segmentor, dataset, preset, tmp_path / "out", **options)

    return evaluate


# --------------------------------------------------------------------------------------------------
# What is counted


def test_a_corrected_mask_is_noticed(evaluate, tmp_path):
    root = folder(tmp_path / "data", pictures=5)
    first = evaluate()
    mask = root / "masks/p2.png"
    write_mask(mask, np.zeros((52, 50), np.uint8))
    with pytest.raises(InputError, match=r"out holds an .*: masks have changed .* as .*p2\.png\."):
        evaluate()
    assert not np.array_equal(evaluate(restart=True).counts, first.counts)


def test_a_mask_of_the_same_size_in_bytes_is_noticed(evaluate, tmp_path):
    root = folder(tmp_path / "data", pictures=1)
    mask = root / "masks/p0.png"
    mask.write_bytes(mask.read_bytes())
    evaluate()
    later = mask.stat().st_mtime_ns + 1
    os.utime(mask, ns=(later, later))
    with pytest.raises(InputError, match="masks have changed"):
        evaluate()


def test_other_pictures_of_the_same_names_are_noticed(evaluate, tmp_path):
    root = folder(tmp_path / "data", pictures=3)
    evaluate()
    for number in range(3):
        size = (40 + 6 * number, 50 + 9 * (number % 2))
        write_picture(root / "images" / f"p{number}.jpg", size, seed=100 + number)
    with pytest.raises(InputError, match=r"pictures have changed .*p\d\.jpg"):
        evaluate()
    (root / "images/p2.jpg").unlink()
    with pytest.raises(InputError, match="names: other pictures"):
        evaluate()


def test_what_was_not_counted_yet_may_be_mended(evaluate, tmp_path):
    root = folder(tmp_path / "data", pictures=5)
    good = (root / "masks/p4.png").read_bytes()
    (root / "masks/p4.png").write_bytes(b"no mask")
    with pytest.raises(InputError, match=r"p4\.png: the mask cannot be read"):
        evaluate()
    (root / "masks/p4.png").write_bytes(good)
    assert evaluate().pictures == 5


def test_other_weights_under_the_same_name_are_noticed(evaluate, segmentor, tmp_path):
    folder(tmp_path / "data", pictures=1)
    evaluate()
    weight = next(segmentor.loaded.model.parameters())
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.view(-1)[0] += 1
        with pytest.raises(InputError, match="weights: the model's are others now"):
            evaluate()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    evaluate()


def test_an_overwritten_checkpoint_of_a_vfm_is_noticed(tmp_path, monkeypatch):
    from fsa.models import guides

    known = guides._Known("vit_tiny_patch16_224", position_offset=0.1)
    monkeypatch.setitem(guides._KNOWN, "dino", known)
    root, file = folder(tmp_path / "data", pictures=1), tmp_path / "vfm.pt"
    dataset = datasets.open_dataset("folder", root)
    preset = protocol.preset("tiny", "folder").override(short_side=64, window=48, stride=24)

    def evaluate(seed):
        torch.manual_seed(seed)
        torch.save(guides.timm.create_model(known.timm_name, num_classes=0).state_dict(), file)
        model = fsa.load_segmentor("proxyclip", vfm="dino", vfm_pretrained=str(file))
        options = {"workers": 0, "quiet": True, "vfm_pretrained": str(file)}
        runner.evaluate(model, dataset, preset, tmp_path / "out", **options)

    evaluate(0)
    evaluate(0)
    with pytest.raises(InputError, match="vfm_weights: the vfm's are others now"):
        evaluate(1)


def test_weights_are_hashed_once(monkeypatch):
    model = torch.nn.Linear(3, 4)
    first = fingerprint.of_weights(model)
    reads = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: reads.append(1) or original(t))
    assert fingerprint.of_weights(model) == first
    assert not reads
    model.load_state_dict({"weight": torch.ones(4, 3), "bias": torch.ones(4)})
    assert fingerprint.of_weights(model) != first
    assert reads
    same = torch.nn.Linear(3, 4)
    same.load_state_dict(model.state_dict())
    assert fingerprint.of_weights(same) == fingerprint.of_weights(model)
    assert fingerprint.of_weights(same.half()) != fingerprint.of_weights(model)


def test_hashing_that_takes_long_is_said(monkeypatch, capsys):
    monkeypatch.setattr(fingerprint, "_LARGE_BYTES", 10)
    fingerprint.of_weights(torch.nn.Linear(3, 4), quiet=True)
    assert capsys.readouterr().err == ""
    fingerprint.of_weights(torch.nn.Linear(3, 4), quiet=False)
    assert "hashing 0.0 GB of weights" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# States


def test_a_run_that_counted_nothing_leaves_no_state(evaluate, tmp_path):
    root = folder(tmp_path / "data", pictures=2)
    write_mask(root / "masks/p0.png", np.full((40, 50), 11, np.uint8))
    with pytest.raises(InputError, match=r"label 11.*--ignore 11"):
        evaluate()
    assert state.state_files(tmp_path / "out") == []
    assert evaluate(ignore=[11]).pictures == 2


def test_an_empty_state_is_no_state(evaluate, tmp_path):
    folder(tmp_path / "data", pictures=2)
    (tmp_path / "out").mkdir()
    file = state.state_file(tmp_path / "out", 0)
    state.save(file, state.State.empty(3), {"classes": [["cat"]] * 3, "another": "protocol"})
    assert evaluate().pictures == 2


def test_a_truncated_state_is_one_line(evaluate, tmp_path):
    folder(tmp_path / "data", pictures=2)
    evaluate()
    file = tmp_path / "out/state-0.npz"
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"state-0\.npz: not the state .*; use --restart$"):
            evaluate()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="not the state of an evaluation"):
        evaluate()


# --------------------------------------------------------------------------------------------------
# Two at once


def start_slowly(root, out):
    """An evaluation in a process of its own that is at work in `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *command(root, out, "--workers", "2")],
        env=environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (out / "state-0.npz").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_second_evaluation_in_a_folder_is_refused(run, tmp_path):
    root, out = folder(tmp_path / "data", pictures=20), tmp_path / "out"
    process = start_slowly(root, out)
    try:
        code, stdout, stderr = run(*command(root, out))
        assert (code, stdout) == (1, "")
        expected = f"{out}: another evaluation is running there (process {process.pid}); wait"
        assert stderr.startswith(f"fsa: {expected}")
        assert process.poll() is None
    finally:
        # Without the processes that decode: they notice later that it is gone.
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    code, stdout, stderr = run(*command(root, out))
    assert (code, stderr) == (0, "")
    assert counts(out).sum() > 0


def test_a_folder_is_locked_within_a_process_too(tmp_path):
    with locking.exclusive(tmp_path, Group()):
        with (
            pytest.raises(InputError, match=rf"process {os.getpid()}\)"),
            locking.exclusive(tmp_path, Group()),
        ):
            pass
        with (
            pytest.raises(InputError, match="another evaluation"),
            locking.exclusive(tmp_path, Group()),
        ):
            pass
    with locking.exclusive(tmp_path, Group()):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(stream):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locking, "_system_lock", refuse)
    with locking.exclusive(tmp_path, Group()):
        pass
    assert "cannot be locked (No locks available): see to it" in capsys.readouterr().err


def test_sweeps_of_different_things_have_folders_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data", pictures=1)
    arguments = ["eval", "folder", "--root", "data", *OPTIONS, "--quiet", "--workers", "0"]
    for swept in ("isolation", "similarity, isolation"):
        assert run(*arguments, "--sweep", swept)[0] == 0
    written = {path.parent.name for path in tmp_path.glob("fsa-eval/*/sweep.json")}
    assert written == {
        "data-clearclip-tiny-sweep-isolation",
        "data-clearclip-tiny-sweep-similarity-isolation",
    }
    for name in written:
        record = json.loads((tmp_path / "fsa-eval" / name / "sweep.json").read_text())
        assert len(record["rows"]) == 3 + 2 * ("similarity" in name)


# --------------------------------------------------------------------------------------------------
# Class files and masks


@pytest.fixture
def classes(tmp_path):
    """Opens a folder whose classes.txt holds these bytes, and gives its classes."""
    root = folder(tmp_path / "data", pictures=1)

    def classes(content):
        (root / "classes.txt").write_bytes(content)
        return datasets.open_dataset("folder", root).classes

    return classes


def test_a_byte_order_mark_is_no_part_of_a_name(classes):
    assert classes(b"\xef\xbb\xbfcat\ndog, hound\n") == (("cat",), ("dog", "hound"))


@pytest.mark.parametrize(("content", "line"), [(b"cat\n\ndog\n", 2), (b"\ncat\n", 1)])
def test_an_empty_line_before_a_class_is_refused(content, line, classes):
    with pytest.raises(InputError, match=rf"classes\.txt: line {line} is empty"):
        classes(content)


def test_empty_lines_at_the_end_are_fine(classes):
    assert classes(b"cat\r\ndog\r\n\r\n  \r\n") == (("cat",), ("dog",))


def test_semicolons_part_classes_too(classes):
    assert classes(b"cat; dog, hound\ngrass\n") == (("cat",), ("dog", "hound"), ("grass",))


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="devices have names on POSIX only")
def test_class_files_that_never_end_are_refused(tmp_path):
    root = folder(tmp_path / "data", pictures=1)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="the classes cannot be read"):
            datasets.open_dataset("folder", root, classes_file=path)
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="more than 16 MiB"):
        datasets.open_dataset("folder", root, classes_file=tmp_path / "long")


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 50 40
%%EndComments
%%EOF
"""


def test_a_mask_in_postscript_runs_no_program(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    root = folder(tmp_path / "data", pictures=1)
    (root / "masks/p0.png").write_bytes(EPS)
    dataset = datasets.open_dataset("folder", root)
    with pytest.raises(InputError, match=r"p0\.png: the mask cannot be read .not one of PNG, TIFF"):
        dataset.read_mask(dataset.samples[0].mask)
    assert not started


# --------------------------------------------------------------------------------------------------
# What to do next


def test_the_check_says_the_next_step_and_not_itself(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = run("data", "check", "voc21", ".")
    assert code == 1
    assert "there is no JPEGImages/ and no SegmentationClass/" in stdout
    assert "VOCtrainval_11-May-2012.tar" in stdout
    assert "VOCdevkit/VOC2012/JPEGImages and VOCdevkit/VOC2012/SegmentationClass" in stdout
    assert "fsa data check" not in stdout
    stderr = run("eval", "voc21", "--root", ".")[2]
    assert "`fsa data check voc21 .` says where it comes from" in stderr
    assert "root is where 'voc21' lies" in run("data", "check", "voc21", "nowhere")[1]
