"""The command, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fsa
from fsa import cli, hosts, ops, tiny

SMALL = ["--short-side", "64", "--window", "48", "--stride", "24"]


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "pictures" / "cat.png"
    file.parent.mkdir()
    Image.new("RGB", (70, 50), "green").save(file)
    return file


def test_pictures_are_segmented_and_written(run, picture, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = run("segment", picture, "--classes", "cat; grass, lawn", "--out", out, *SMALL)
    assert code == 0
    assert "cat.png: " in stdout
    assert str(out / "cat-overlay.png") in stdout
    record = json.loads((out / "cat.json").read_text())
    assert record["settings"]["classes"] == [["cat"], ["grass", "lawn"]]
    assert record["settings"]["feedback"]["beta"] == 3.0
    assert Image.open(out / "cat-labels.png").size == (70, 50)


def test_options_reach_the_segmentor(run, picture, tmp_path):
    out = tmp_path / "out"
    options = ["--host", "proxyclip", "--vfm", "layer:2", "--beta", "1.5", "--confidence", "0.3"]
    options += ["--prob-thd", "0.5", "--background", "nothing", "--backend", "torch", "--quiet"]
    code, stdout, stderr = run(
        "segment", picture, "--classes", "cat; dog", "--out", out, *SMALL, *options
    )
    assert (code, stdout, stderr) == (0, "", "")
    record = json.loads((out / "cat.json").read_text())
    settings = record["settings"]
    assert (settings["host"], settings["vfm"], settings["stride"]) == ("proxyclip", "layer:2", 24)
    assert (settings["feedback"]["beta"], settings["feedback"]["confidence"]) == (1.5, 0.3)
    assert record["classes"] == ["cat", "dog", "nothing"]


def test_the_cache_directory_reaches_the_loader(run, picture, tmp_path, monkeypatch):
    seen = []

    def download(*_, cache_dir):
        seen.append(cache_dir)

    monkeypatch.setattr("fsa.models.download_pretrained", download)
    monkeypatch.setattr("fsa.models._hub_answers", lambda: True)
    options = ["--model", "ViT-B-16", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "out"]
    code, _, stderr = run("segment", picture, "--classes", "cat", *options)
    assert (code, "cannot be reached" in stderr) == (1, True)
    assert seen == [str(tmp_path / "cache")]


def test_without_feedback(run, picture, tmp_path):
    out = tmp_path / "out"
    arguments = ["segment", picture, "--classes", "cat; dog", "--no-feedback", "--out", out]
    assert run(*arguments, *SMALL)[0] == 0
    assert json.loads((out / "cat.json").read_text())["settings"]["feedback"] is None
    code, _, stderr = run(*arguments, "--beta", "2")
    assert code == 1
    assert "--no-feedback" in stderr


def test_classes_from_a_file(run, picture, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("cat, kitty\n\ngrass\n")
    out = tmp_path / "out"
    assert run("segment", picture, "--classes-file", file, "--out", out, *SMALL)[0] == 0
    assert json.loads((out / "cat.json").read_text())["classes"] == ["cat", "grass"]


def test_one_bad_picture_does_not_stop_the_others(run, picture, tmp_path):
    bad = picture.parent / "bad.png"
    bad.write_bytes(b"no picture")
    twin = tmp_path / "twin" / "cat.png"
    twin.parent.mkdir()
    Image.new("RGB", (40, 60), "blue").save(twin)
    out = tmp_path / "out"
    code, stdout, stderr = run(
        "segment", picture.parent, twin, "--classes", "cat; sky", "--out", out, *SMALL
    )
    assert code == 1
    assert "1 of 3 pictures failed" in stderr
    assert "bad.png: not a picture" in stderr
    assert stdout.count("cat.png") == 2
    # Pictures of the same name do not overwrite each other.
    assert Image.open(out / "cat-labels.png").size == (70, 50)
    assert Image.open(out / "cat-2-labels.png").size == (40, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", ""], "pass the classes"),
        (["--classes", "cat", "--classes-file", "x"], "pass the classes"),
        (["--classes-file", "gone.txt"], "gone.txt: the classes cannot be read"),
        (["--classes", " ; "], "classes is empty"),
        (["--classes", "cat; cat"], "'cat' twice"),
        (["--classes", "cat; dog,"], "not a name"),
        (["--classes", "cat", "--model", "ViT-B-61"], "close to it: ViT-B-16"),
        (["--classes", "cat", "--model", "ViT-B-16", "--pretrained", "x.pt"], "no such file"),
        (["--classes", "cat", "--vfm", "dino"], "takes none"),
        (["--classes", "cat", "--device", "cuda:77"], "is not there"),
        (["--classes", "cat", "--beta", "nan"], "beta=nan"),
        (["--classes", "cat", "--confidence", "2"], "confidence=2.0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(options, message, run, picture, tmp_path):
    code, _, stderr = run("segment", picture, "--out", tmp_path / "out", *options)
    assert code == 1
    assert stderr.startswith("fsa: ")
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_paths_that_cannot_be_used_are_one_line(run, picture, tmp_path):
    classes = ["--classes", "cat"]
    code, _, stderr = run("segment", tmp_path / "gone.png", *classes)
    assert (code, "gone.png: no such file" in stderr) == (1, True)
    taken = tmp_path / "taken"
    taken.write_text("")
    code, _, stderr = run("segment", picture, *classes, "--out", taken)
    assert (code, "taken: cannot write there" in stderr) == (1, True)
    code, _, stderr = run("demo", "--out", taken / "x.png")
    assert (code, "taken: cannot write there" in stderr) == (1, True)


def test_a_picture_with_all_options_wrong_fails_alone(run, picture, tmp_path):
    code, _, stderr = run(
        "segment", picture, "--classes", "cat", "--out", tmp_path / "out", "--window", "3"
    )
    assert code == 1
    assert "window=3 must be an integer from 16" in stderr


def test_choices_are_those_of_the_library():
    assert tuple(host.value for host in cli.HostName) == hosts.names()
    assert tuple(backend.value for backend in cli.Backend) == ops.BACKENDS


def test_info_says_what_runs_and_why(run):
    code, stdout, _ = run("info")
    assert code == 0
    assert f"fsa-kernels  {fsa.__version__}" in stdout
    assert torch.__version__ in stdout
    assert "auto runs torch: the tensors are on the CPU" in stdout
    assert "embedded model, as shipped" in stdout


def test_help_does_not_wait_for_torch():
    probe = "import sys; sys.argv = ['fsa', '--help']\nimport fsa.cli\n"
    probe += "assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
    result = CliRunner().invoke(cli.app, ["--help"])
    assert all(word in result.stdout for word in ("segment", "demo", "info"))


def test_the_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "fsa", "segment", "gone.png", "--classes", "cat"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 1
    assert result.stderr == "fsa: gone.png: no such file or directory\n"


def test_the_demo_shows_every_host_with_and_without(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "demo_scenes", lambda scenes=tiny.demo_scenes: scenes()[:1])
    file = tmp_path / "new" / "demo.png"
    code, stdout, _ = run("demo", "--out", file)
    assert code == 0
    for name in ("MaskCLIP", "SCLIP", "ClearCLIP", "ProxyCLIP"):
        line = next(line for line in stdout.splitlines() if line.startswith(name))
        alone, adapted, gain = (float(word) for word in line.split()[1:4])
        assert 0 <= alone <= 100
        assert 0 <= adapted <= 100
        assert abs(adapted - alone - gain) < 0.11
    with Image.open(file) as figure:
        assert figure.width > 10 * 200
