"""The Python blocks of the documentation run as they stand.

The blocks of a page run in order, in one namespace, in a directory of the test's. Nothing is
downloaded: weights that a page names are replaced by small random ones of the same kind, made here.
"""

from __future__ import annotations

import functools
import re
from contextlib import nullcontext
from importlib.util import find_spec

import open_clip
import pytest
import timm
import torch
from torch.nn import functional

import fsa
from fsa.models import guides, loading
from tests.integrations.test_published import EMBED, ProxyTower
from tests.integrations.test_published import pictures as published_inputs
from tests.support.documents import PAGES, ROOT, blocks, name_of
from tests.support.towers import SMALL_CLIP

WITH_PYTHON = [file for file in PAGES if blocks(file, "python")]

# What else a page may hold: what is not code, and directives of the site.
OTHER_LANGUAGES = {"bash", "text", "bibtex", "{toctree}", "{eval-rst}"}

# What would be code in a block of text.
CODE = re.compile(r"^\s*(fsa |import |from \w+ import|pip |python )", flags=re.MULTILINE)

# Blocks that need what this machine may lack, by a line of theirs: what, and whether it is there.
NEEDS = {
    'device="cuda"': ("a CUDA device", torch.cuda.is_available()),
    ".to_detections()": ("supervision", find_spec("supervision") is not None),
    '"rle"': ("pycocotools", find_spec("pycocotools") is not None),
    "torch.export.export(": ("torch 2.7 or newer", torch.__version__ >= (2, 7)),
}


def needs(block):
    """What a block needs and this machine lacks, or None."""
    for line, (what, there) in NEEDS.items():
        if line in block.text and not there:
            return what
    return None


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Small random weights in the place of those that would be downloaded."""
    for name in ("ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, SMALL_CLIP)
    weights = tmp_path / "clip-vit-b-16.pt"
    torch.save(open_clip.create_model("ViT-B-16").state_dict(), weights)
    create = timm.create_model

    def random_weights(name, pretrained, **options):
        assert pretrained, "the pages name models with their weights"
        return create(name, pretrained=False, depth=1, **options)

    for module in (loading, guides):
        monkeypatch.setattr(module, "hub_if_reachable", nullcontext)
    monkeypatch.setattr(loading, "download_pretrained", lambda *_, **__: str(weights))
    monkeypatch.setattr(guides.timm, "create_model", random_weights)
    # Traces as Inductor does, and refuses the same, without writing and compiling C++.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture
def hub_of_transformers(monkeypatch):
    """A small random CLIP model under the name that the page takes from the hub."""
    transformers = pytest.importorskip("transformers")
    from tests.support.transformers_models import random_clip, tokenizer

    def only(name, made):
        def from_pretrained(asked):
            assert asked == name
            return made()

        return from_pretrained

    name = "openai/clip-vit-base-patch16"
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer())
    for cls, made in (
        (transformers.CLIPModel, lambda: random_clip(image_size=64, patch_size=16)),
        (transformers.CLIPProcessor, lambda: processor),
    ):
        monkeypatch.setattr(cls, "from_pretrained", only(name, made))


def published_code():
    """What a reader's own code has: a model with a tower of ProxyCLIP's repository, and inputs."""
    images, text_features, external_features = published_inputs()

    class VisionTransformer(ProxyTower):
        """Under the name that the tower has in the published code."""

    class Model:
        visual = VisionTransformer().double()

        def encode_image(self, images, external_features):
            return self.visual(images, external_features)

    return {
        "model": Model(),
        "images": images,
        "external_features": external_features,
        "text_features": text_features,
        "VisionTransformer": VisionTransformer,
    }


def check_quickstart(scope, folder, printed):
    assert (folder / "fsa-out" / "scene-5-overlay.png").exists()
    assert "% of the picture" in printed


def check_readme(scope, folder, printed):
    assert (folder / "fsa-out" / "scene-5-labels.png").exists()


def check_segmenting(scope, folder, printed):
    assert scope["result"].class_names == ["dog", "frog", "bicycle", "key", "sky", "sand"]
    assert (folder / "results" / "beach.json").exists()
    assert scope["without"].config is None
    assert scope["sharper"].config.beta == 4.5
    assert scope["sclip"].loaded.name == "ViT-B-16"
    assert scope["proxy"].vfm.name == "dino"
    assert scope["local"].loaded.pretrained == "clip-vit-b-16.pt"


def check_op(scope, folder, printed):
    B, H, N, d = (scope[name] for name in "BHNd")
    assert scope["feedback"].shape == (B, N, N)
    assert scope["adapted"].shape == (B, H, N, d)
    assert scope["attended"].shape == (B, N, H * d)
    assert scope["config"].beta == 4.5
    assert "torch: the tensors are on the CPU" in printed


def check_hosts(scope, folder, printed):
    assert scope["features"].shape == (1, 70, 512)
    assert not scope["without_residual"].residual
    assert scope["wider"].std == 7.0
    assert scope["by_layer"].vfm.name == "layer:3"
    assert scope["by_colour"].vfm.name == "colours"


def check_integrations(scope, folder, printed):
    assert scope["VisionTransformer"].FSA is fsa.published_feedback
    assert type(scope["segmentor"].host).__name__ == "ClearCLIP"
    assert scope["features"].shape == (2, 280, 192)
    assert scope["cosines"].shape == (2, 3, 14, 20)
    if "program" in scope:
        images = torch.randn(3, 3, 96, 160)
        text_features = functional.normalize(torch.randn(7, 192), dim=-1)
        again = scope["program"].module()(images, text_features, config=fsa.FSAConfig())
        assert again.shape == (3, 60, 192)


CHECKS = {
    "README.md": check_readme,
    "docs/quickstart.md": check_quickstart,
    "docs/segmenting.md": check_segmenting,
    "docs/op.md": check_op,
    "docs/hosts.md": check_hosts,
    "docs/integrations.md": check_integrations,
}


@pytest.mark.parametrize("file", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs(
    file, stand_ins, hub_of_transformers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fsa").symlink_to(ROOT / "fsa")
    torch.manual_seed(0)
    torch.compiler.reset()
    scope = published_code() if file.stem == "integrations" else {}
    for block in blocks(file, "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(file), "exec")
        if needs(block) == "a CUDA device":
            with pytest.raises(fsa.InputError, match="device='cuda' is not there"):
                exec(code, scope)
        elif not needs(block):
            exec(code, scope)
    CHECKS[name_of(file)](scope, tmp_path, capsys.readouterr().out)


def test_feedback_reaches_the_published_tower_of_the_page():
    scope = published_code()
    model = scope["model"]
    plain = model.encode_image(scope["images"], scope["external_features"])
    first, *_ = blocks(ROOT / "docs" / "integrations.md", "python")
    exec(first.text, {"fsa": fsa, **scope}, scope)
    assert scope["features"].shape == plain.shape
    assert plain.shape[-1] == EMBED
    assert not torch.allclose(scope["features"], plain, atol=1e-3)
    again = model.encode_image(scope["images"], scope["external_features"])
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_no_block_of_a_page_escapes(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    found = blocks(file)
    # Whatever opens or closes a block in some form of Markdown is a fence that is known here.
    fences = sum(line.lstrip(" >-").startswith(("```", "~~~")) for line in lines)
    assert fences == 2 * len(found)
    for block in found:
        language = block.language.split("}")[0] + "}" if "{" in block.language else block.language
        assert language in OTHER_LANGUAGES | {"python"}, block.where
        if language == "text":
            assert not re.search(
                r"^\s*(fsa |import |from \w+ import|pip |python )", block.text, re.M
            )
    # Code by indentation would be seen by nobody.
    before = ["", *lines]
    assert not [
        line
        for previous, line in zip(before, lines, strict=False)
        if line.startswith("    ") and not previous.strip() and line.strip()
    ]


def test_every_page_with_python_is_checked_and_every_need_is_met_somewhere():
    assert {name_of(file) for file in WITH_PYTHON} == set(CHECKS)
    python = "".join(block.text for file in WITH_PYTHON for block in blocks(file, "python"))
    assert [line for line in NEEDS if line not in python] == []
