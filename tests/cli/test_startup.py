"""What the command imports of the model libraries, and what it leaves as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fsa.cli import startup

ROOT = Path(__file__).parents[2]
PROBE = """
import sys
from fsa.cli.startup import import_model_libraries
import_model_libraries({model!r})
import fsa, torch
segmentor = fsa.load_segmentor(cache_text=False)
segmentor.segment(torch.zeros(3, 40, 40, dtype=torch.uint8), ["cat"], short_side=48, window=48)
for name in ("torch._dynamo", "transformers"):
    print(name, name in sys.modules)
import open_clip, torch._dynamo.utils, transformers
from torchvision.ops import roi_align
boxes = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
print(roi_align(torch.ones(1, 1, 4, 4), boxes, 1).item())
print(torch.compiler.disable(lambda: 3)(), torch.compiler.disable.__module__)
print(open_clip.hf_model.transformers is not None)
"""


@pytest.mark.parametrize(
    ("model", "with_transformers"), [("tiny", False), ("roberta-ViT-B-32", True)]
)
def test_what_a_model_does_not_need_is_not_imported_and_can_be_later(model, with_transformers):
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(model=model)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    dynamo, *others = result.stdout.splitlines()
    # transformers itself may import it.
    assert with_transformers or dynamo == "torch._dynamo False"
    assert others == [
        f"transformers {with_transformers}",
        "1.0",
        "3 torch.compiler",
        str(with_transformers),
    ]


@pytest.mark.parametrize(
    ("model", "needs"),
    [
        ("tiny", False),
        ("ViT-B-16", False),
        ("ViT-L-14-quickgelu", False),
        ("roberta-ViT-B-32", True),
        ("ViT-B-16-SigLIP", True),
        ("no such model", True),
        ("../model_configs/ViT-B-16", True),
    ],
)
def test_transformers_is_imported_for_the_models_that_need_it(model, needs):
    assert startup._needs_transformers(model) == needs
