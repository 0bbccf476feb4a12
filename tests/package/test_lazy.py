"""`import fsa` is enough for every module, and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fsa

HEAVY = ("torch", "PIL", "numpy", "open_clip", "timm", "transformers", "triton", "typer")


def in_a_new_process(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name",
    [
        "reference",
        "config.FSAConfig",
        "classes.parse_classes",
        "models.transformers.CLIPTower",
        "models.loading.load_model",
        "segment.segmentor.Segmentor",
        "pictures.reading.read_image",
        "draw.figures.overlay",
        "evaluation.metrics",
        "integrations.published.plug_in",
        "showcase.demonstration",
        "cli.app.main",
        "hosts.build",
        "ops.adapt",
        "tiny.demo_scenes",
    ],
)
@pytest.mark.slow
def test_a_module_is_reached_after_import_fsa(name):
    in_a_new_process(f"import fsa\nfsa.{name}")


def test_import_fsa_is_light():
    in_a_new_process(
        "import sys\nbefore = set(sys.modules)\nimport fsa\nfsa.config\n"
        f"assert not set({HEAVY}) & (set(sys.modules) - before)"
    )


def test_what_is_not_there_is_an_attribute_error():
    for module in (fsa, fsa.models, fsa.evaluation):
        assert not hasattr(module, "nonsense")
        assert not hasattr(module, "_private")
        assert not hasattr(module, "__nonsense__")


def test_a_package_that_a_module_misses_is_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in [name for name in sys.modules if name.startswith("fsa.draw")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fsa, "draw", raising=False)
    with pytest.raises(ImportError, match="PIL"):
        fsa.draw.figures  # noqa: B018
