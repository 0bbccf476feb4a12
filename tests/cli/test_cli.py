"""The command, as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fsa
from fsa import hosts, ops, tiny
from fsa.cli import app as cli
from fsa.cli import options as cli_options
from fsa.models import loading
from fsa.ops import processor
from fsa.segment import sizes

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


def test_options_of_the_host_reach_it(run, picture, tmp_path):
    arguments = ["segment", picture, "--classes", "cat; dog", *SMALL, "--quiet", "--host", "sclip"]
    for name, option in (("published", "false"), ("matched", "true")):
        out = tmp_path / name
        assert run(*arguments, "--out", out, "--host-option", f"match_mass={option}")[0] == 0
        settings = json.loads((out / "cat.json").read_text())["settings"]
        assert settings["host_options"] == {"match_mass": option == "true", "residual": True}
    # What was segmented with other options is segmented again.
    again = [*arguments, "--out", tmp_path / "matched", "--skip-existing"]
    before = (tmp_path / "matched/cat-labels.png").stat().st_mtime_ns
    assert run(*again, "--host-option", "match_mass=true")[0] == 0
    assert (tmp_path / "matched/cat-labels.png").stat().st_mtime_ns == before
    assert run(*again)[0] == 0
    assert (tmp_path / "matched/cat-labels.png").stat().st_mtime_ns != before


@pytest.mark.parametrize("command", ["segment", "compare", "explore"])
def test_options_that_the_host_does_not_have_are_answered_with_its_own(command, run, picture):
    code, stdout, stderr = run(
        command, picture, "--classes", "cat; dog", "--host", "naclip", "--host-option", "sigma=5"
    )
    assert (code, stdout) == (1, "")
    assert stderr == (
        "fsa: host 'naclip' has no option 'sigma'; those it has, with their defaults: std=5.0, "
        "residual=False\n"
    )


def test_the_cache_directory_reaches_the_loader(run, picture, tmp_path, monkeypatch):
    seen = []

    def download(*_, cache_dir):
        seen.append(cache_dir)

    monkeypatch.setattr("fsa.models.loading.download_pretrained", download)
    monkeypatch.setattr("fsa.models.hub._hub_answers", lambda: True)
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
    file.write_text("cat, kitty\ngrass\n\n")
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
        (["--classes", "cat", "--vfm", "dino"], "takes no vfm"),
        (["--classes", "cat", "--device", "cuda:77"], "is not there"),
        (["--classes", "cat", "--beta", "nan"], "beta=nan"),
        (["--classes", "cat", "--confidence", "2"], "confidence=2.0"),
        (["--classes", "cat", "--prob-thd", "2"], "prob_thd=2.0"),
        (["--classes", "cat", "--prob-thd", "0.5", "--background", " "], "background=' '"),
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
    assert (code, "taken: cannot write there (not a directory)" in stderr) == (1, True)
    code, _, stderr = run("demo", "--out", taken / "x.png")
    assert (code, "taken: cannot write there" in stderr) == (1, True)


@pytest.mark.parametrize("name", ["figure.jpg", "figure", "", "."])
def test_a_figure_has_the_name_of_a_png(name, run, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["demo"], ["compare", picture, "--classes", "cat"]):
        code, _, stderr = run(*command, "--out", name)
        assert (code, stderr.endswith("it must end in .png\n")) == (1, True)
        assert len(stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_names_that_differ_in_case_are_written_apart(run, picture, tmp_path):
    Image.new("RGB", (40, 60)).save(picture.with_name("CAT.png"))
    out = tmp_path / "out"
    assert run("segment", picture.parent, "--classes", "cat", "--out", out, *SMALL)[0] == 0
    assert sorted(path.name for path in out.glob("*.json")) == ["CAT.json", "cat-2.json"]


def test_a_long_name_is_shortened_in_the_summary_and_progress_is_for_terminals(
    run, picture, tmp_path
):
    code, stdout, stderr = run(
        "segment", picture, "--classes", "x" * 300, "--out", tmp_path / "out", *SMALL
    )
    assert (code, stderr) == (0, "")
    assert f"cat.png: {'x' * 39}… 100% -> " in stdout


@pytest.mark.parametrize("option", ["--window", "--stride", "--short-side", "--window-batch"])
def test_options_that_no_picture_takes_are_said_once(option, run, picture, tmp_path):
    Image.new("RGB", (70, 50)).save(picture.with_name("dog.png"))
    arguments = [picture.parent, "--classes", "cat", "--out", tmp_path / "out"]
    code, stdout, stderr = run("segment", *arguments, option, "-1")
    assert (code, stdout) == (1, "")
    assert "-1 must be an integer" in stderr
    assert stderr.startswith("fsa: ")
    assert len(stderr.splitlines()) == 1


def test_a_file_name_does_not_speak_to_the_terminal(run, tmp_path):
    name = "\x1b[31mred\x07\udcff.png"
    Image.new("RGB", (70, 50)).save(tmp_path / name)
    (tmp_path / f"bad {name}").write_bytes(b"no picture")
    (tmp_path / "café.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    code, stdout, stderr = run("segment", tmp_path, "--classes", "cat", "--out", out, *SMALL)
    assert code == 1
    assert "\\x1b[31mred\\x07\\udcff.png: cat 100%" in stdout
    assert "bad \\x1b[31mred\\x07\\udcff.png: not a picture" in stderr
    assert "café.png" in stderr
    stderr = run("segment", tmp_path / f"gone {name}", "--classes", "cat", "--out", out)[2]
    assert (
        stderr == f"fsa: {tmp_path}/gone \\x1b[31mred\\x07\\udcff.png: no such file or directory\n"
    )


def test_names_beyond_the_encoding_of_the_output_do_not_stop_it(picture, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "fsa", "segment", picture, "--classes", "猫", *SMALL],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path.cwd())},
    )
    assert result.returncode == 0
    assert b"cat.png: \\u732b 100%" in result.stdout


def test_choices_are_those_of_the_library():
    assert tuple(host.value for host in cli_options.HostName) == hosts.names()
    assert tuple(backend.value for backend in cli_options.BackendName) == ops.BACKENDS


def test_help_says_the_defaults_of_the_segmentor(run):
    stdout = " ".join(run("segment", "--help")[1].split())
    paper, embedded = sizes.PAPER_SIZES, sizes.TINY_SIZES
    for of_paper, of_tiny in zip(astuple(paper), astuple(embedded), strict=True):
        assert f"default {of_paper}, with tiny {of_tiny}." in stdout


@pytest.mark.parametrize("command", ["segment", "compare", "eval", "data", "info", "demo"])
def test_no_option_is_cut_in_the_help_of_a_narrow_terminal(command, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, _ = run(command, "--help")
    assert code == 0
    assert max(map(len, stdout.splitlines())) <= 80
    assert "…" not in stdout
    overview = run("--help")[1]
    line = next(line for line in overview.splitlines() if line.startswith(f"  {command} "))
    assert line.endswith(".")
    assert not line.endswith("...")


def test_info_says_what_runs_and_why(run):
    code, stdout, _ = run("info")
    assert code == 0
    assert f"fsa-kernels      {fsa.__version__}\n" in stdout
    assert max(map(len, stdout.splitlines())) <= 80
    assert torch.__version__ in stdout
    assert "auto runs torch: the tensors are on the CPU" in stdout
    assert "embedded model, as shipped" in stdout


@pytest.mark.parametrize(
    ("units", "line", "dtype"),
    [
        (("AMX", "AVX512-BF16"), "units for bfloat16: AMX and AVX512-BF16;", "bfloat16"),
        ((), "no units for bfloat16 (AMX, AVX512-BF16);", "float32"),
    ],
)
def test_the_fastest_type_is_told_and_taken(run, monkeypatch, tmp_path, units, line, dtype):
    monkeypatch.setattr(processor, "bfloat16_units", lambda: units)
    monkeypatch.setattr(loading, "bfloat16_units", lambda: units)
    stdout = " ".join(run("info")[1].split())
    assert f"{line} --dtype auto takes {dtype}" in stdout
    Image.new("RGB", (40, 32)).save(tmp_path / "a.png")
    sizes = ["--short-side", "32", "--window", "32", "--stride", "16"]
    options = ["--classes", "cat;dog", "--dtype", "auto", "--out", tmp_path / "out", *sizes]
    code, _, stderr = run("segment", tmp_path / "a.png", *options)
    assert code == 0
    assert f"--dtype auto takes {dtype}: the processor " in stderr
    record = json.loads((tmp_path / "out/a.json").read_text())
    assert record["settings"]["dtype"] == dtype
    code, _, stderr = run("segment", tmp_path / "a.png", *options, "--quiet")
    assert (code, stderr) == (0, "")


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
        cwd=Path(__file__).parents[2],
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
        host_score, adapted, gain = (float(word) for word in line.split()[1:4])
        assert 0 <= host_score <= 100
        assert 0 <= adapted <= 100
        assert abs(adapted - host_score - gain) < 0.11
    with Image.open(file) as figure:
        assert figure.width > 10 * 200
