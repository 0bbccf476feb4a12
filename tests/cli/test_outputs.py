"""What the command reads and writes: nothing overwritten, nothing skipped without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import fsa
from fsa import InputError
from fsa.classes import parse_class_text, read_class_file
from fsa.errors import FSAWarning
from fsa.pictures.reading import EXTENSIONS, list_pictures, read_image

SMALL = ["--short-side", "64", "--window", "48", "--stride", "24", "--device", "cpu"]


def draw(file, colour="green"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (70, 50), colour).save(file)
    return file


@pytest.fixture
def segment(run):
    return lambda *arguments: run("segment", *arguments, "--classes", "cat; dog", *SMALL)


def records(out):
    return {
        file.stem: json.loads(file.read_text())["picture"]["path"] for file in out.glob("*.json")
    }


def test_pictures_of_one_name_do_not_overwrite_each_other_in_any_run(segment, tmp_path):
    out = tmp_path / "out"
    png, jpg = draw(tmp_path / "photo.png"), draw(tmp_path / "photo.jpg", "blue")
    for file in (png, jpg, png, jpg):
        assert segment(file, "--out", out)[0] == 0
    assert records(out) == {"photo": str(png), "photo-2": str(jpg)}


def test_the_library_does_not_overwrite_another_pictures_result(tmp_path):
    segmentor = fsa.load_segmentor(device="cpu")
    for file in (draw(tmp_path / "a" / "x.png"), draw(tmp_path / "b" / "x.png")):
        result = segmentor.segment(file, ["cat"], short_side=48, window=48)
        result.save(tmp_path / "out")
        result.save(tmp_path / "out")
    assert sorted(records(tmp_path / "out")) == ["x", "x-2"]


def test_results_are_not_segmented_again(segment, tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b-labels.png")
    monkeypatch.chdir(tmp_path)
    assert segment(".", "--out", ".")[0] == 0
    first = sorted(path.name for path in tmp_path.iterdir())
    code, stdout, stderr = segment(".", "--out", ".")
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == first
    assert [line.split(":")[0] for line in stdout.splitlines()] == ["a.png", "b-labels.png"]
    assert "4 results of earlier segmentations are left out, such as a-labels.png" in stderr


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"settings": 3}', ""])
def test_pictures_that_only_look_like_results_are_segmented(content, tmp_path):
    for name in ("a-labels.png", "a-overlay.png"):
        draw(tmp_path / name)
    (tmp_path / "a.json").write_text(content)
    names = [path.name for path in list_pictures([tmp_path])]
    assert names == ["a-labels.png", "a-overlay.png"]


def test_an_empty_name_is_not_the_current_directory(segment, tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    code, _, stderr = segment("")
    assert (code, stderr) == (1, "fsa: a picture or a directory has an empty name\n")
    with pytest.raises(InputError, match="empty name"):
        list_pictures([""])


def test_folders_in_a_directory_are_named_and_looked_into_when_asked(segment, tmp_path):
    draw(tmp_path / "in" / "a.png")
    draw(tmp_path / "in" / "sub" / "deep" / "b.png")
    draw(tmp_path / "in" / ".hidden" / "c.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    out = tmp_path / "out"
    code, _, stderr = segment(tmp_path / "in", "--out", out)
    assert (code, list(records(out))) == (0, ["a"])
    assert stderr.startswith("fsa: warning: ")
    assert "1 folders in it are not looked into, such as sub; recursive=True" in stderr
    code, _, stderr = segment(tmp_path / "in", "--out", out, "--recursive")
    assert (code, stderr, sorted(records(out))) == (0, "", ["a", "b"])


def test_a_link_that_leads_nowhere_is_named(segment, tmp_path):
    draw(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "gone.png")
    code, stdout, stderr = segment(tmp_path / "in", "--out", tmp_path / "out")
    assert (code, stdout.startswith("a.png: ")) == (1, True)
    assert "1 of 2 pictures failed" in stderr
    assert "b.png: no such file" in stderr


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_that_is_looked_for_is_read(extension, tmp_path):
    mode = "1" if extension == ".pbm" else "RGB"
    file = tmp_path / f"a{extension}"
    Image.new(mode, (8, 6)).save(file, "PPM" if extension in (".pnm", ".pbm") else None)
    assert list_pictures([tmp_path]) == [file]
    assert read_image(file).rgb.shape == (3, 6, 8)
    assert {".jp2", ".png"} <= set(EXTENSIONS)


def test_what_has_its_results_is_skipped_when_asked(segment, tmp_path):
    out = tmp_path / "out"
    draw(tmp_path / "in" / "a.png")
    segment(tmp_path / "in", "--out", out)
    draw(tmp_path / "in" / "b.png")
    code, stdout, _ = segment(tmp_path / "in", "--out", out, "--skip-existing")
    assert code == 0
    assert stdout.splitlines()[0] == "1 of 2 pictures have their results already"
    assert [line.split(":")[0] for line in stdout.splitlines()[1:]] == ["b.png"]
    # Other settings, or a result that is not whole, are done again.
    (out / "a-overlay.png").unlink()
    stdout = segment(tmp_path / "in", "--out", out, "--skip-existing")[1]
    assert [line.split(":")[0] for line in stdout.splitlines()[1:]] == ["a.png"]
    stdout = segment(tmp_path / "in", "--out", out, "--skip-existing", "--beta", "1")[1]
    assert [line.split(":")[0] for line in stdout.splitlines()] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat; dog, puppy", [["cat"], ["dog", "puppy"]]),
        (r"Paris\, Texas, Paris; a\;b", [["Paris, Texas", "Paris"], ["a;b"]]),
        (r"back\\; slash", [["back\\"], ["slash"]]),
        (r"C:\folder, \n", [["C:\\folder", r"\n"]]),
        ("end\\", [["end\\"]]),
        (";; cat ;", [["cat"]]),
    ],
)
def test_names_may_hold_commas_and_semicolons(text, expected, tmp_path):
    assert parse_class_text(text) == expected
    file = tmp_path / "classes.txt"
    file.write_text(f"{text.strip('; ')}\nlast")
    assert read_class_file(file) == [*expected, ["last"]]


def test_version(run):
    assert run("--version") == (0, f"fsa {fsa.__version__}\n", "")


def test_completion_is_offered():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv = ['fsa']; from fsa.cli.app import main; main()",
        ],
        env={
            **os.environ,
            "_FSA_COMPLETE": "complete_bash",
            "COMP_WORDS": "fsa seg",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
    )
    assert "segment" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("command", [["data", "list"], ["--help"], ["info"]])
def test_a_full_disk_is_one_line(command):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "fsa", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (1, "fsa: the output: No space left on device\n")


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_are_one_line(device, run, tmp_path):
    file = draw(tmp_path / "a.png")
    out = tmp_path / "out"
    code, _, stderr = run("segment", file, "--classes", "cat", "--device", device, "--out", out)
    assert code == 1
    assert stderr.startswith(f"fsa: device='{device}' is not accepted")
    assert len(stderr.splitlines()) == 1


def test_warnings_of_the_library_are_warnings(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    with pytest.warns(FSAWarning, match="not looked into") as caught:
        list_pictures([tmp_path])
    assert len(caught) == 1


def test_no_window_batch_is_no_default(run, tmp_path):
    for folder in ("images", "masks"):
        draw(tmp_path / folder / "a.png", "black")
    Image.new("L", (70, 50)).save(tmp_path / "masks" / "a.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    options = ["--root", tmp_path, "--out", tmp_path / "out", "--device", "cpu"]
    code, _, stderr = run("eval", "folder", *options, "--window-batch", "0")
    assert (code, "window_batch=0 must be an integer >= 1" in stderr) == (1, True)
