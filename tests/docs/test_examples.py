"""The worked examples run as they stand, and do what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsa import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
SCENE = tiny.demo_scenes()[4]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def labels(folder, stem):
    return np.asarray(Image.open(folder / f"{stem}-labels.png"))


def test_every_example_is_run():
    tested = {name.removeprefix("test_example_") for name in globals() if "test_example_" in name}
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


def test_example_plug_in(run):
    printed = run("plug_in")
    assert "feedback changed the patch features by" in printed
    assert "by 0%" not in printed
    assert "what it did before: True" in printed


def check_two_runs(printed, out):
    """What a run without and a run with feedback printed and wrote."""
    assert [line.split()[0] for line in printed.splitlines()] == ["baseline:", "feedback:"]
    baseline, feedback = (labels(out / part, "scene-5") for part in ("baseline", "feedback"))
    assert baseline.shape == feedback.shape
    assert 0 < (baseline != feedback).mean() < 0.5


def test_example_naclip(run, tmp_path):
    check_two_runs(run("naclip", "--out", "out"), tmp_path / "out")


def test_example_attention_function(run, tmp_path):
    check_two_runs(run("attention_function", "--out", "out"), tmp_path / "out")


def test_example_dinov3_proxy(run, tmp_path):
    printed = run("dinov3_proxy", "--random", "--out", "out")
    assert all(name in printed for name in SCENE.classes)
    assert labels(tmp_path / "out", "scene-5").size


def test_example_transformers_clip(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.support.transformers_models import random_clip, tokenizer

    random_clip(image_size=64, patch_size=16).save_pretrained(tmp_path / "clip")
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer())
    processor.save_pretrained(tmp_path / "clip")
    printed = run("transformers_clip", "clip", SCENE.picture, "cat", "grass", "--out", "out")
    assert "cat" in printed
    assert labels(tmp_path / "out", "scene-5").size
