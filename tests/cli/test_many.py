"""`fsa segment` on many pictures: written while others are computed, in order, within bounds."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from fsa.cli import segment as command
from fsa.errors import InputError
from fsa.segment.result import Segmentation

SMALL = ["--short-side", "64", "--window", "48", "--stride", "24", "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(7):
        values = np.random.default_rng(number).integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(values).resize((60 + 5 * number, 50)).save(folder / f"p{number}.png")
    return folder


def test_results_are_written_in_the_background_a_few_at_a_time(
    run, pictures, tmp_path, monkeypatch
):
    original, waiting, most, threads = Segmentation.save, 0, 0, set()
    lock = threading.Lock()

    def slow(self, *arguments, **options):
        nonlocal waiting, most
        threads.add(threading.current_thread().name.rsplit("_")[0])
        with lock:
            waiting += 1
            most = max(most, waiting)
        # The first is the slowest, and is still told of first.
        time.sleep(0.5 if self.picture.name == "p0" else 0.05)
        try:
            return original(self, *arguments, **options)
        finally:
            with lock:
                waiting -= 1

    monkeypatch.setattr(Segmentation, "save", slow)
    out = tmp_path / "out"
    code, stdout, _ = run("segment", pictures, "--classes", "cat; dog", "--out", out, *SMALL)
    assert code == 0
    assert [line.split(":")[0] for line in stdout.splitlines()] == [f"p{n}.png" for n in range(7)]
    assert threads == {"fsa-write"}
    assert most == 2
    assert len(list(out.glob("*.json"))) == 7


def test_what_cannot_be_written_stops_nobody(run, pictures, tmp_path, monkeypatch):
    original = Segmentation.save

    def failing(self, *arguments, **options):
        if self.picture.name == "p2":
            raise InputError("p2.json: cannot be written (disk full)")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Segmentation, "save", failing)
    out = tmp_path / "out"
    code, stdout, stderr = run("segment", pictures, "--classes", "cat", "--out", out, *SMALL)
    assert code == 1
    assert "1 of 7 pictures failed:\n  p2.json: cannot be written (disk full)" in stderr
    assert len(stdout.splitlines()) == 6


def test_results_are_those_of_each_picture_by_itself(run, pictures, tmp_path):
    for file in sorted(pictures.iterdir()):
        run("segment", file, "--classes", "cat; dog", "--out", tmp_path / "each", *SMALL)
    run("segment", pictures, "--classes", "cat; dog", "--out", tmp_path / "all", *SMALL)
    for file in sorted((tmp_path / "each").glob("*-labels.png")):
        each, every = (np.asarray(Image.open(f)) for f in (file, tmp_path / "all" / file.name))
        assert (each == every).mean() > 0.999


def test_the_time_of_large_work_is_estimated_before_it_starts(run, pictures, tmp_path, monkeypatch):
    arguments = ["segment", pictures, "--classes", "cat", *SMALL]
    code, _, stderr = run(*arguments, "--out", tmp_path / "small")
    assert (code, stderr) == (0, "")
    monkeypatch.setattr(command, "_WINDOWS_ESTIMATED", 7)
    monkeypatch.setattr("fsa.segment.estimate.seconds_per_window", lambda *_, **__: 60.0)
    code, stdout, stderr = run(*arguments, "--out", tmp_path / "out")
    windows = sum(
        len(range(0, max(round(64 / 50 * (60 + 5 * n)) - 48, 0) + 23, 24)) * 2 for n in range(7)
    )
    assert (code, stderr) == (0, f"{windows} windows, about {windows} min\n")
    assert len(stdout.splitlines()) == 7
    code, _, stderr = run(*arguments, "--out", tmp_path / "quiet", "--quiet")
    assert stderr == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.4, "3 s"), (89, "89 s"), (100, "2 min"), (9000, "2.5 h")]
)
def test_durations_are_said_in_fitting_units(seconds, said):
    assert command._duration(seconds) == said


def test_polygons_go_into_the_json(run, pictures, tmp_path):
    pytest.importorskip("contourpy")
    out = tmp_path / "out"
    arguments = ["segment", pictures / "p0.png", "--classes", "cat; dog", "--out", out, *SMALL]
    assert run(*arguments, "--polygons")[0] == 0
    masks = json.loads((out / "p0.json").read_text())["masks"]
    assert sum(mask["area"] for mask in masks) == 60 * 50
    assert all(mask["polygons"] and "rle" not in mask for mask in masks)


def test_a_shape_whose_package_is_missing_is_said_before_the_model_is_loaded(
    run, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr("fsa.segment.shapes.find_spec", lambda name: None)
    monkeypatch.setattr("fsa.cli.options.load_segmentor", None)
    code, _, stderr = run("segment", pictures, "--classes", "cat", "--out", tmp_path, "--rle")
    assert (code, stderr.startswith("fsa: shapes='rle' needs pycocotools")) == (1, True)
