"""Every command line of the documentation exists, and those that need no download run."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from bench.__main__ import COMMANDS as BENCHMARKS
from fsa.cli.app import app
from tests.support.documents import PAGES, ROOT, blocks, name_of
from tests.support.evaluation_data import folder, write_mask

CLI = get_command(app)
# What needs weights of others or a benchmark on disk is parsed and not run. The demo takes a while,
# and tests/cli runs it.
NEEDS_MORE = {"--model", "/data", "ROOT", "demo"}
CHECKS = (
    ".ci/lint",
    "pip install pre-commit",
    "pre-commit install --hook-type pre-commit --hook-type pre-push",
)
SITE = "python -m sphinx -n -W --keep-going -b html docs docs/_build/html"


def command_lines():
    """(where, words, comment) of each command line of the pages' bash blocks."""
    for file in PAGES:
        for block in blocks(file, "bash"):
            for number, line in enumerate(block.commands):
                code, _, comment = line.partition("  #")
                where = f"{name_of(file)}:{block.line}+{number}"
                yield where, shlex.split(code), comment.strip()


LINES = list(command_lines())
# Each command line once, wherever it stands.
OURS = {tuple(words): (where, comment) for where, words, comment in LINES if words[0] == "fsa"}
RUN = [words for words in OURS if not NEEDS_MORE & {*words}]


def parse(words):
    """Parses a command line of ours as the command does, and runs nothing."""
    name, *rest = words
    command = CLI.get_command(None, name)
    assert command is not None, f"fsa has no command {name}"
    if hasattr(command, "get_command"):
        name, *rest = rest
        command = command.get_command(None, name)
        assert command is not None, f"fsa data has no command {name}"
    command.make_context(name, rest)


def check_fsa(words):
    parse(words[1:])


def check_torchrun(words):
    at = words.index("-m")
    assert words[at + 1] == "fsa"
    parse(words[at + 2 :])


def check_pip(words):
    if shlex.join(words) in CHECKS:
        return
    if "wheels" in words or "wheels/*.whl" in words:
        # What a machine with a GPU and without a network gets.
        assert words[1] in ("download", "install")
        assert "--no-deps" in words
        return
    options = [word for word in words[2:] if word != "-e"]
    (target,) = options
    found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
    assert words[1] == "install"
    assert found
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    known = set(re.findall(r"^(\w+) = \[", section.partition("\n[")[0], flags=re.MULTILINE))
    assert set((found[1] or "test").split(",")) <= known


def check_pytest(words):
    words = list(words)
    if "-n" in words:
        at = words.index("-n")
        assert words.pop(at + 1).isdigit()
        words.pop(at)
    *paths, marked = (*words[1:], "") if "-m" not in words else (*words[1:-2], words[-1])
    for word in paths:
        assert word == "--benchmark-only" or (ROOT / word).exists(), word
    section = (ROOT / "pyproject.toml").read_text().partition("markers = [")[2].partition("]")[0]
    markers = set(re.findall(r'"(\w+):', section))
    assert set(re.findall(r"\w+", marked)) <= markers | {"and", "or", "not"}


def check_python(words):
    if words[2] == "bench":
        assert words[3] in BENCHMARKS
    elif words[2] == "pytest":
        check_pytest(words[2:])
    else:
        assert shlex.join(words) == SITE


def check_tool(words):
    assert shlex.join(words) in CHECKS


PROGRAMS = {
    "fsa": check_fsa,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    ".ci/lint": check_tool,
    "pre-commit": check_tool,
}


@pytest.mark.parametrize(("where", "words", "comment"), LINES, ids=[line[0] for line in LINES])
def test_a_command_line_exists(where, words, comment):
    assert words[0] in PROGRAMS, "a program that nothing here knows how to check"
    PROGRAMS[words[0]](words)


def test_a_wrong_option_is_found():
    with pytest.raises(Exception, match="No such option"):
        parse(["segment", "photo.jpg", "--colour", "red"])


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A directory with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fsa").symlink_to(ROOT / "fsa")
    picture = Image.open(ROOT / "fsa" / "tiny" / "demo" / "scene-3.png").convert("RGB")
    (tmp_path / "holiday").mkdir()
    picture.save(tmp_path / "photo.jpg")
    picture.resize((96, 64)).save(tmp_path / "holiday" / "beach.png")
    (tmp_path / "classes.txt").write_text("cat\ndog, puppy\n")
    classes = "sky\nbuilding, house, facade\nroad, street\ncar, truck, bus\n"
    folder(tmp_path / "street", pictures=2, classes=classes)
    camvid = folder(tmp_path / "camvid", pictures=2, classes="\n".join("abcdefghijk"))
    mask = np.array(Image.open(camvid / "masks" / "p0.png"))
    mask[-5:] = 11
    write_mask(camvid / "masks" / "p0.png", mask)
    return tmp_path


def test_the_lines_that_need_no_download_run(somewhere, run):
    codes = []
    for words in RUN:
        where, comment = OURS[words]
        code, _, err = run(*words[1:])
        codes.append(code)
        assert code == (1 if comment == "exit code 1" else 0), (where, words, err)
    # Of every command at least one line was run, and one line was refused as its page says.
    assert {words[1] for words in RUN} == set(CLI.commands) - {"demo"}
    assert codes.count(1) == 1
    assert (somewhere / "results" / "beach-overlay.png").exists()
    assert (somewhere / "fsa-eval" / "camvid-clearclip-tiny-fsa" / "result.json").exists()
    assert (somewhere / "fsa-eval" / "street-clearclip-tiny-sweep-isolation" / "sweep.md").exists()
