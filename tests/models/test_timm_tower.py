"""The towers that open_clip takes from timm, against the models' own forward."""

from __future__ import annotations

import copy
import math

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from torch import nn
from torch.nn import functional

from fsa import FSAConfig, InputError, hosts
from fsa.models.loading import load_model
from fsa.models.timm_tower import TimmTower, tower_of
from fsa.models.tower import Tower
from tests.support.accuracy import relative_error
from tests.support.compilers import needs_cpp
from tests.support.timm_models import FAMILIES, NAMES, random_timm_model
from tests.support.towers import random_tower

CONFIG = FSAConfig()
# What float32 may differ by where the same products are grouped in another way.
CLOSE = 1e-5


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def pictures(name, rows=4, columns=4, B=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    patch = FAMILIES[name].patch
    images = torch.randn(B, 3, rows * patch, columns * patch, generator=generator)
    return images.to(dtype)


def queries(name, C=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(C, FAMILIES[name].width, generator=generator)
    return functional.normalize(text, dim=-1).to(dtype)


def last_tokens(tower, images):
    """What leaves the last block under the attention of the host "clip", for every token."""
    tokens = tower.trunk(images)
    projected = tower.project(tokens, "qkv", tower.grid(*images.shape[-2:]))
    heads = functional.scaled_dot_product_attention(*(projected[name] for name in "qkv"))
    return tower.residual_branches(tokens, tower.attention_branch(heads))


def pooled(tower, model, images):
    """The host "clip" run through to the pooled output, by the model's own head."""
    trunk = model.trunk
    return model.head(trunk.forward_head(trunk.norm(last_tokens(tower, images))))


def resized(model, images):
    """A copy of the model, made by timm for pictures of this size."""
    model = copy.deepcopy(model)
    model.trunk.set_input_size(tuple(images.shape[-2:]))
    return model


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (6, 5)], ids=str)
def test_the_pooled_output_is_the_models_own(family, grid):
    model = random_timm_model(family)
    images = pictures(family, *grid)
    expected = resized(model, images)(images)
    assert expected.shape == (2, FAMILIES[family].width)
    tower = TimmTower(model)
    assert tower.output_dim == expected.shape[1]
    assert relative_error(pooled(tower, model, images), expected) < CLOSE


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)], ids=str)
def test_patches_of_the_host_clip_go_through_the_models_own_head(family, grid):
    model = random_timm_model(family)
    images = pictures(family, *grid)
    own = resized(model, images)
    patches = own.trunk.forward_features(images)[:, own.trunk.num_prefix_tokens :]
    if FAMILIES[family].pool in ("", "avg"):
        own.trunk.num_prefix_tokens = 0
    expected = [own.head(own.trunk.forward_head(patch[:, None])) for patch in patches.unbind(1)]
    features = hosts.build("clip", model).features(images, queries(family))
    assert relative_error(features, torch.stack(expected, dim=1)) < CLOSE


@pytest.mark.parametrize("name", ["eva02", "pe", "norms", "siglip"])
def test_queries_and_keys_are_those_the_model_attends_with(name, monkeypatch):
    model = random_timm_model(name)
    images = pictures(name, 3, 5)
    tower = TimmTower(model)
    projected = tower.project(tower.trunk(images), "qkv", (3, 5))
    seen = []
    original = functional.scaled_dot_product_attention

    def record(query, key, value, **options):
        seen.append((query, key, value))
        return original(query, key, value, **options)

    own = resized(model, images)
    for attention in (block.attn for block in own.trunk.blocks):
        attention.fused_attn = True
    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    own.trunk.forward_features(images)
    for name, expected in zip("qkv", seen[-1], strict=True):
        assert relative_error(projected[name], expected) < CLOSE


# Each of these is left out of the last block, or of what comes before and after the blocks.
PARTS = [
    ("pe", "rotary"),
    ("pe", "trunk.norm_pre"),
    ("eva02", "rotary"),
    ("eva02", "last.norm1"),
    ("eva02", "last.attn.norm"),
    ("eva02", "last.mlp.norm"),
    ("eva02-post-norm", "last.norm1"),
    ("eva02-post-norm", "last.norm2"),
    ("registers", "rotary"),
    ("registers", "last.gamma_1"),
    ("registers", "last.gamma_2"),
    ("norms", "last.attn.q_norm"),
    ("norms", "last.attn.k_norm"),
    ("norms", "last.ls1"),
    ("norms", "last.ls2"),
    ("siglip", "last.norm2"),
    ("vitamin", "last.mlp.norm"),
    ("mobileclip", "last.norm1"),
]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_without_a_part_the_pooled_output_is_another(name, part):
    model = random_timm_model(name)
    images = pictures(name, 3, 7)
    tower = TimmTower(copy.deepcopy(model))
    path, _, leaf = part.rpartition(".")
    if part == "rotary":
        tower.rotary = None
    else:
        owner = tower.visual.get_submodule(path) if path.startswith("trunk") else tower.last
        for step in path.split(".")[1:] if path.startswith("last") else []:
            owner = getattr(owner, step)
        setattr(owner, leaf, None if leaf.startswith("gamma") else nn.Identity())
    error = relative_error(pooled(tower, model, images), resized(model, images)(images))
    assert error > 100 * CLOSE


@pytest.mark.parametrize(("name", "part"), [("siglip", "norm"), ("vitamin", "fc_norm")])
def test_without_the_final_norm_the_features_are_others(name, part):
    model = random_timm_model(name)
    without = copy.deepcopy(model)
    setattr(without.trunk, part, nn.Identity())
    features, others = (
        hosts.build("clip", visual).features(pictures(name), queries(name))
        for visual in (model, without)
    )
    assert relative_error(others, features) > 100 * CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", hosts.names())
def test_every_host_runs_with_feedback(family, name, dtype):
    model = random_timm_model(family, dtype)
    images, text = pictures(family, 3, 5, dtype=dtype), queries(family, dtype=dtype)
    host = hosts.build(name, model)
    options = {"vfm_features": host.tower.layer_features(images, 1)} if host.needs_vfm else {}
    plain = host.features(images, text, **options)
    features = host.features(images, text, **options, config=CONFIG)
    assert features.shape == plain.shape == (2, 15, FAMILIES[family].width)
    assert features.dtype == dtype
    assert features.isfinite().all()
    assert relative_error(features, plain) > 1e-3


COMPILED = ["siglip", "pe", "eva02", "vitamin"]


def compiled_is_eager(name, backend, config):
    torch.compiler.reset()
    host = hosts.build("clearclip", random_timm_model(name))

    def run(images, text):
        return host.features(images, text, config=config)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The third is the trained grid, for which positions need no resizing.
        for B, rows, columns, C in [(2, 5, 6, 5), (3, 7, 3, 7), (2, 4, 4, 9)]:
            inputs = pictures(name, rows, columns, B), queries(name, C)
            assert relative_error(compiled(*inputs), run(*inputs)) < CLOSE
    torch.compiler.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_host_is_the_eager_one_at_any_size(name):
    compiled_is_eager(name, "eager", CONFIG)


@needs_cpp
@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("name", COMPILED)
def test_a_host_in_cpp_is_the_eager_one_at_any_size(name):
    # Inductor rounds in its own way, and pruning turns rounding into decisions.
    compiled_is_eager(name, "inductor", FSAConfig(pruning=None))


def test_every_block_runs_once(family, count_calls):
    model = random_timm_model(family)
    tower = TimmTower(model)
    images = pictures(family, 3, 5)
    expected = tower.layer_features(images, 1), tower.trunk(images)
    calls = count_calls(list(model.trunk.blocks))
    features, tokens = tower.layer_and_trunk(images, 1)
    assert calls == list(range(tower.layers - 1))
    assert torch.equal(features, expected[0])
    assert torch.equal(tokens, expected[1])


def test_queries_with_rotary_positions_need_a_grid():
    tower = TimmTower(random_timm_model("pe"))
    tokens = tower.trunk(pictures("pe"))
    assert set(tower.project(tokens, "v")) == {"v"}
    with pytest.raises(InputError, match="pass the grid"):
        tower.project(tokens, "qv")


def test_towers_are_told_apart():
    plain, timm_model = random_tower(), random_timm_model("siglip")
    assert type(tower_of(plain)) is Tower
    assert type(tower_of(timm_model)) is TimmTower
    tower = TimmTower(timm_model)
    assert tower_of(tower) is tower


def gated(model):
    model.trunk.blocks[-1].attn.gate = nn.Linear(48, 48)


def other_rotation(model):
    model.trunk.rope = nn.Identity()


def other_block(model):
    model.trunk.blocks[-1] = nn.Identity()
    model.trunk.blocks[-1].attn = nn.Identity()


def other_attention(model):
    model.trunk.blocks[-1].attn = nn.MultiheadAttention(48, 3)


def other_pool(model):
    model.trunk.attn_pool = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gated, "gated attention"),
        (other_rotation, "rotary positions of the kind Identity"),
        (other_block, "blocks of the kind Identity"),
        (other_attention, "attention of the kind MultiheadAttention"),
        (other_pool, "pooling of the kind Identity"),
    ],
)
def test_parts_that_are_not_supported_are_named(change, message):
    model = random_timm_model("pe")
    change(model)
    with pytest.raises(InputError, match=f"{message}.*such as ViT-B-16-SigLIP2"):
        TimmTower(model)


@pytest.mark.parametrize(
    ("name", "pool", "kind"),
    [("fastvit_t8", "avg", "FastVit"), ("convnext_atto", "", "ConvNeXt")],
)
def test_towers_without_attention_name_a_model_to_take(name, pool, kind):
    model = TimmModel(name, 16, 64, pool, "linear")
    with pytest.raises(InputError, match=f"{kind} is not a plain vision transformer.*ViT-B-16"):
        hosts.build("clearclip", model)


@pytest.mark.parametrize("name", ["siglip", "pe", "eva02"])
def test_a_checkpoint_by_a_name_of_open_clip(name, monkeypatch, tmp_path):
    family = FAMILIES[name]
    config = {
        "embed_dim": family.width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": family.side,
            "timm_model_name": NAMES[name],
            "timm_model_pretrained": False,
            "timm_pool": family.pool,
            "timm_proj": family.proj,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2},
    }
    config["text_cfg"]["layers"] = 1
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-timm", config)
    model = open_clip.create_model("small-timm").eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load_model("small-timm", str(tmp_path / "model.pt"), device="cpu")
    assert loaded.image_size == family.side
    images = pictures(name)
    with torch.no_grad():
        expected = model.encode_image(images)
    tower = tower_of(loaded.model.visual)
    assert relative_error(pooled(tower, loaded.model.visual, images), expected) < CLOSE


@pytest.mark.parametrize("name", ["pe", "eva02"])
def test_a_function_as_the_host_gets_rotated_queries_and_keys(name):
    seen = []

    def diagonal(block):
        seen.append(block)
        N = math.prod(block.grid)
        return torch.eye(N).expand(len(block.images), N, N)

    model, images = random_timm_model(name), pictures(name, 3, 5)
    hosts.build(diagonal, model).features(images, queries(name))
    tower = TimmTower(model)
    projected = tower.project(tower.trunk(images), "qk", (3, 5))
    assert torch.equal(seen[0].query, projected["q"])
    assert torch.equal(seen[0].key, projected["k"])
