"""What the pages name is there: files, modules, symbols, links, and the figures they quote."""

from __future__ import annotations

import importlib
import json
import re
import shlex

import numpy as np
import open_clip
import pytest
from PIL import Image

from bench.__main__ import COMMANDS as BENCHMARKS
from fsa import hosts
from tests.support.documents import PAGES, README, ROOT, blocks, name_of

TENSOR = ROOT / "docs" / "design" / "tensor.md"
KERNELS = ROOT / "docs" / "design" / "kernels.md"
_SPAN = re.compile(r"`([^`\n]+)`")
_NAME = re.compile(r"(?:fsa|fsa_kernels)(?:\.\w+)+")
_PATH = re.compile(r"(?:fsa|fsa_kernels|bench|tests|docs|examples|\.ci)/[\w./-]*")


def prose(file):
    """A page without its fenced blocks."""
    text = file.read_text(encoding="utf-8")
    for block in blocks(file):
        text = text.replace(block.text, "")
    return text


def spans(file, form):
    """What stands between single backquotes and has a form from its beginning."""
    found = (form.match(span) for span in _SPAN.findall(prose(file)))
    return sorted({match[0].rstrip(".") for match in found if match})


def resolve(name):
    """The object of a dotted name, be it a module, a member or a field of a class."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        for word in words[count:]:
            if word in getattr(found, "__annotations__", {}):
                return found
            found = getattr(found, word)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_every_name_of_ours_exists(file):
    for name in spans(file, _NAME):
        resolve(name)


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(file):
    # Made by the commands beside them.
    made = {"fsa-out/", "fsa-eval/"}
    named = [path for path in spans(file, _PATH) if path not in made]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_a_name_that_is_gone_is_found():
    with pytest.raises(AttributeError):
        resolve("fsa.hosts.base.Host.no_such_method")
    with pytest.raises(AttributeError):
        resolve("fsa.no_such_module.anything")


def test_the_path_of_a_tensor_names_every_floor_and_every_kernel():
    """A module added to a floor that a tensor passes has its place in the story."""
    text = TENSOR.read_text() + KERNELS.read_text()
    assert len(spans(TENSOR, _NAME)) >= 15
    passed = {name.split(".")[1] for name in spans(TENSOR, _NAME) if name.count(".") > 1}
    assert passed >= {"pictures", "classes", "models", "hosts", "segment"}
    for folder in ("fsa/ops", "fsa/hosts", "fsa_kernels"):
        for file in (ROOT / folder).glob("*.py"):
            path = f"{folder}/{file.name}"
            dotted = path.removesuffix(".py").replace("/", ".")
            helper = file.name in ("__init__.py", "tiles.py", "runtime.py", "warmup.py")
            assert helper or path in text or dotted in text, path


def anchors(file):
    """What links to the headings of a page end in."""
    titles = re.findall(r"^#+ (.*)$", prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_every_link_to_a_file_leads_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_the_readme_is_one_screen_after_another():
    assert len(README.read_text().splitlines()) <= 160


def test_the_readme_quotes_the_committed_measurement():
    record = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    text = " ".join(README.read_text().split())
    name, command = re.search(r"Row `([^`]+)` of .*?, written by `([^`]+)`", text).groups()
    environment = record["environment"]
    assert command == environment["command"]
    assert environment["processor"] in text
    assert environment["cpu_threads"] == 2
    assert "on two CPU threads" in text
    timed = {
        who: entry["series"]["median"]
        for row in record["rows"]
        if row["name"] == name
        for who, entry in row["contenders"].items()
        if "series" in entry
    }
    ours, published = timed["fsa torch"], timed["published"]
    assert f"takes {ours:.3g} ms instead of {published:.0f} ms" in text
    assert f"**{published / ours:.0f} times faster" in text


def test_the_command_of_every_benchmark_is_described():
    text = (ROOT / "docs" / "performance.md").read_text()
    named = set(re.findall(r"python -m bench (\w+)", text))
    # The margins of the tests are regenerated by those who train the included model.
    assert named == set(BENCHMARKS) - {"guards"}


def test_the_table_of_options_is_what_the_hosts_take():
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    section = page.split("## Options of a host")[1].split("## ")[0]
    stated = set()
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        options, names, defaults, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        options = [option.strip("` ") for option in options.split(",")]
        named = set(re.findall(r"`(\w+)`", names))
        named = set(hosts.names()) - named if names.startswith("all but") else named
        for name in named:
            if options == ["residual"]:
                assert "residual" in hosts.host_class(name).default_options()
                stated.add((name, "residual", None))
                continue
            values = [value.strip("` ") for value in defaults.split(",")]
            given = (f"{o}={v}" for o, v in zip(options, values, strict=True))
            parsed = hosts.parsed_options(name, given)
            stated |= {(name, option, value) for option, value in parsed.items()}
    taken = {
        (name, option, None if option == "residual" else value)
        for name in hosts.names()
        for option, value in hosts.host_class(name).default_options().items()
    }
    assert stated == taken


def test_the_table_of_models_is_what_the_command_prints(run):
    _, printed, _ = run("models", "--markdown")
    if f"open_clip {open_clip.__version__} " not in (page := prose(ROOT / "docs" / "hosts.md")):
        pytest.skip("the page has the models of another version of open_clip")
    assert printed.strip() in page


def test_the_picture_of_the_first_page_is_what_its_command_draws(run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = (
        line
        for block in blocks(ROOT / "docs" / "segmenting.md", "bash")
        for line in block.commands
        if line.startswith("fsa compare fsa/tiny")
    )
    code, _, err = run(*shlex.split(line)[1:], "--out", tmp_path / "compare.png")
    assert code == 0, err
    drawn, committed = (
        np.asarray(Image.open(file).convert("RGB"), dtype=float)
        for file in (tmp_path / "compare.png", ROOT / "docs" / "images" / "compare.png")
    )
    assert drawn.shape == committed.shape
    # Rounding may turn a pixel between two classes.
    assert np.abs(drawn - committed).mean() < 0.5
