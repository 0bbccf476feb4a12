"""The catalogue of open_clip's pretrained models, against the towers themselves."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower

from fsa.errors import InputError
from fsa.models import catalogue as catalogue_module
from fsa.models.catalogue import catalogue, markdown
from fsa.models.timm_tower import tower_of


@pytest.fixture(scope="module")
def pairs():
    return catalogue()


@pytest.mark.skipif(len(open_clip.list_pretrained()) < 196, reason="an older open_clip has fewer")
def test_at_least_155_of_the_pairs_run(pairs):
    assert [(pair.model, pair.pretrained) for pair in pairs] == open_clip.list_pretrained()
    assert sum(pair.runs for pair in pairs) >= 155


_SIZES = ("image_size", "patch_size", "width", "head_width", "mlp_ratio")
# EVA02's "enormous" has blocks of another kind.
_SIZES_OF_TIMM = re.compile(
    r"tiny|small|base|large2?|xlarge|giant(opt)?|gigantic|so400m|patch\d+|\d{3}|(?<=mci)\d"
)


def towers(pairs):
    """Of the models whose vision towers differ in more than size, one each: (pair, tower)."""
    seen = set()
    for pair in pairs:
        config = open_clip.get_model_config(pair.model)
        vision = dict(config["vision_cfg"])
        if isinstance(vision.get("layers"), int):
            vision["layers"] = 1
        kind = _SIZES_OF_TIMM.sub(
            "", str({key: value for key, value in vision.items() if key not in _SIZES})
        )
        if kind not in seen:
            seen.add(kind)
            with torch.device("meta"):
                yield pair, _build_vision_tower(config["embed_dim"], vision)


@pytest.mark.skipif(
    len(open_clip.list_pretrained()) < 196,
    reason="the timm of an older open_clip makes no towers without weights",
)
def test_every_tower_is_accepted_or_refused_as_the_catalogue_says(pairs):
    verdicts = {}
    for pair, visual in towers(pairs):
        try:
            tower_of(visual)
        except InputError as error:
            verdicts[pair.model] = str(error)
        else:
            verdicts[pair.model] = None
        if pair.runs == (verdicts[pair.model] is not None):
            pytest.fail(f"{pair.model}: the catalogue says runs={pair.runs}")
    refusals = [message for message in verdicts.values() if message is not None]
    assert refusals
    assert all("ViT-" in message for message in refusals), "each names a model to take instead"


def test_every_refusal_names_a_pair_that_runs(pairs):
    running = {f"{pair.model} ({pair.pretrained})" for pair in pairs if pair.runs}
    refusals = {pair.refused for pair in pairs if not pair.runs}
    assert len(refusals) == 4
    assert {text.rpartition("; take ")[2] for text in refusals} <= running


def test_models_that_open_clip_may_add():
    family = catalogue_module._family
    assert not family({"timm_model_name": "vit_base_patch16_224"}).refused
    assert (
        "not a plain vision transformer"
        in family({"timm_model_name": "swin_tiny_patch4_window7_224"}).refused
    )


def test_the_table_counts_every_pair_once(pairs):
    rows = markdown(pairs).splitlines()[4:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert sum(int(cells[1]) for cells in cells) == len(pairs)
    runs = sum(int(cells[1]) for cells in cells if cells[3] == "yes")
    assert markdown(pairs).startswith(f"{runs} of the {len(pairs)} pretrained models")


def test_the_command(run, pairs):
    code, out, _ = run("models")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) == len(pairs) + 2
    assert lines[0].split() == ["RN50", "openai", "refused:", *pairs[0].refused.split()]
    (siglip,) = (line for line in lines if line.startswith("ViT-B-16-SigLIP "))
    assert siglip.split(maxsplit=2) == [
        "ViT-B-16-SigLIP",
        "webli",
        "runs, its text with transformers",
    ]
    assert run("models", "--markdown")[1].strip() == markdown(pairs)


def test_the_table_of_the_documentation_is_the_generated_one(pairs):
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    table = page.partition("<!-- models -->\n")[2].partition("\n<!-- end of models -->")[0]
    made_for = re.search(r"open_clip (\S+) run", table).group(1)
    if made_for != open_clip.__version__:
        pytest.skip(f"the table is for open_clip {made_for}")
    assert table == markdown(pairs), "run `fsa models --markdown` again"
