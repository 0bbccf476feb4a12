"""What is installed is all there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_code_types_weights_and_pictures(tmp_path):
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    # Built from a copy: building writes into the tree.
    source = tmp_path / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True)
    (wheel,) = tmp_path.glob("fsa_kernels-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "fsa/py.typed",
        "fsa_kernels/py.typed",
        "fsa/hosts/proxy.py",
        "fsa_kernels/feedback.py",
        "fsa/tiny/weights/tiny.safetensors",
        "fsa/tiny/weights/tiny.sha256",
        "fsa/tiny/weights/MODEL_CARD.md",
        "fsa/tiny/demo/scenes.json",
        "fsa/showcase/explorer/template/explorer.html",
    ):
        assert wanted in names, wanted
    # Every module of the source is in the wheel, and nothing of tests and benchmarks.
    modules = {
        str(p.relative_to(ROOT)) for d in ("fsa", "fsa_kernels") for p in (ROOT / d).rglob("*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")}
    metadata = next(name for name in names if name.endswith("entry_points.txt"))
    assert "fsa = fsa.cli.app:main" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_it_imports_and_works_without_triton():
    probe = """
import sys
sys.modules["triton"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else found(name, *a)
import torch, fsa, fsa_kernels
assert not fsa_kernels.available()
print(fsa.feedback_attention(torch.randn(1, 5, 3)).shape, fsa.explain().backend)
"""
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-1] == "torch"


def test_the_kernels_know_nothing_of_the_layer_above():
    for file in (ROOT / "fsa_kernels").glob("*.py"):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].partition(".")[0] != "fsa", (file, line)


def test_the_definition_imports_nothing_of_ours_but_the_configuration():
    lines = (ROOT / "fsa" / "reference.py").read_text().splitlines()
    ours = [line for line in lines if line.startswith(("from fsa", "import fsa"))]
    assert ours == ["from fsa.config import PROBABILITY_FLOOR, PROXY_GAIN, PROXY_SHIFT, FSAConfig"]
