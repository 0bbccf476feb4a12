"""The hosts on towers of open_clip's own, against the published outputs and against CLIP itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.nn import functional

import fsa
from fsa import FSAConfig, InputError, hosts, reference
from fsa.hosts import LastAttention
from fsa.hosts.self_attention import attention_of_pairs
from tests.support.accuracy import MODEL_VECTORS, relative_error, vector
from tests.support.towers import inputs_of, random_inputs, random_tower

CLIP_HOSTS = [name for name in hosts.names() if name != "proxyclip"]
CONFIG = FSAConfig()


@pytest.fixture(params=MODEL_VECTORS)
def published(request):
    data = vector(request.param)
    sizes = ("image_size", "patch_size", "width", "layers", "heads", "output_dim")
    visual = VisionTransformer(**{key: int(data[key]) for key in sizes}, mlp_ratio=4.0).eval()
    prefix = "state/"
    state = {key[len(prefix) :]: data[key] for key in data if key.startswith(prefix)}
    visual.load_state_dict(state)
    return data, visual


@pytest.mark.parametrize("feedback", [False, True], ids=["host", "host + FSA"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_published_features_come_out(published, feedback, dtype, limit):
    data, visual = published
    config = FSAConfig(beta=float(data["beta"])) if feedback else None
    images, text, vfm_features = (
        data[key].to(dtype) for key in ("image", "text_features", "vfm_features")
    )
    host = hosts.build("proxyclip", visual.to(dtype))
    features = host.features(images, text, vfm_features=vfm_features, config=config)
    expected = data["features_proxy_fsa" if feedback else "features_proxy"]
    assert relative_error(features, expected) < limit


def test_the_host_clip_is_clip():
    visual = random_tower(output_tokens=True)
    (images, text), _ = inputs_of("clip")
    _, tokens = visual(images)
    features = hosts.build("clip", visual).features(images, text)
    torch.testing.assert_close(features, tokens @ visual.proj, rtol=1e-5, atol=1e-5)


def last_attention(visual, images, pairs):
    """Attention matrix (B,H,1+N,1+N) and values (B,H,1+N,d) of the last block, by hand."""
    tower = fsa.models.tower.Tower(visual)
    tokens = tower.trunk(images)
    block = tower.last
    packed = functional.linear(
        block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias
    )
    heads = [
        part.unflatten(-1, (tower.heads, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1)
    ]
    projected = dict(zip("qkv", heads, strict=True))
    width = heads[0].shape[-1]
    matrix = sum(
        (projected[a] @ projected[b].transpose(2, 3) / width**0.5).softmax(dim=-1) for a, b in pairs
    )
    return tower, tokens, matrix, projected["v"]


@pytest.mark.parametrize(
    ("name", "pairs", "residual"),
    [
        ("clip", ("qk",), True),
        ("sclip", ("qq", "kk"), True),
        ("clearclip", ("qq",), False),
        ("qk", ("qk",), False),
        ("qq", ("qq",), False),
        ("kk", ("kk",), False),
        ("vv", ("vv",), False),
    ],
)
def test_a_host_with_feedback_is_the_definition_written_with_matrices(name, pairs, residual):
    visual = random_tower().double()
    images, text, _ = random_inputs(B=2, dtype=torch.float64)
    tower, tokens, matrix, value = last_attention(visual, images, pairs)

    def tail(heads):
        branch = tower.attention_branch(heads[:, :, 1:])
        if residual:
            x = tokens[:, 1:] + branch
            branch = x + tower.last.mlp(tower.last.ln_2(x))
        return tower.embed(branch)

    def logits(features, scale):
        return scale * functional.normalize(features, dim=-1) @ text.T

    host = hosts.build(name, visual)
    initial = tail(matrix @ value)
    assert relative_error(host.features(images, text), initial) < 1e-12

    uniform = tail(torch.full_like(matrix, 1 / matrix.shape[-1]) @ value)
    feedback = reference.feedback_attention(logits(initial, 20), logits(uniform, 35))
    # The class token attends to itself under feedback, and is a key of the host's attention.
    whole = torch.zeros_like(matrix[:, 0])
    whole[:, 0, 0] = 1
    whole[:, 1:, 1:] = feedback
    adapted = reference.adapt(value, whole, matrix)
    # The terms in which feedback comes last never read the class token's value.
    assert relative_error(host.features(images, text, config=CONFIG), tail(adapted)) < 1e-11


@pytest.mark.parametrize("adaptations", [FSAConfig().adaptations, ("before",), ("only",)])
def test_sclip_with_matched_mass_is_the_definition_written_with_matrices(adaptations):
    visual = random_tower().double()
    images, text, _ = random_inputs(B=2, dtype=torch.float64)
    config = FSAConfig(adaptations=adaptations)
    tower, tokens, matrix, value = last_attention(visual, images, ("qq", "kk"))

    def tail(heads):
        branch = tower.attention_branch(heads[:, :, 1:])
        return tower.embed(tower.residual_branches(tokens[:, 1:], branch))

    def logits(features, scale):
        return scale * functional.normalize(features, dim=-1) @ text.T

    initial = tail(matrix @ value)
    uniform = tail(torch.full_like(matrix, 1 / matrix.shape[-1]) @ value)
    whole = torch.zeros_like(matrix)
    whole[:, :, 0, 0] = 1
    feedback = reference.feedback_attention(logits(initial, 20), logits(uniform, 35))
    whole[:, :, 1:, 1:] = feedback[:, None]
    terms = {"after": whole @ matrix, "before": matrix @ whole, "only": 2 * whole}
    adapted = sum(terms[name] for name in adaptations) / len(adaptations) @ value

    host = hosts.build("sclip", visual, match_mass=True)
    assert relative_error(host.features(images, text), initial) < 1e-12
    features = host.features(images, text, config=config)
    assert relative_error(features, tail(adapted)) < 1e-11
    as_published = hosts.build("sclip", visual).features(images, text, config=config)
    same = "only" not in adaptations
    assert (relative_error(as_published, features) < 1e-11) == same


def test_matching_the_mass_is_yes_or_no():
    with pytest.raises(InputError, match="match_mass"):
        hosts.build("sclip", random_tower(), match_mass="yes")


def with_feedback_by_matrices(tower, tokens, matrix, value, text, config=CONFIG):
    """Features with feedback of a host without residual, A and V written out, (B,N,E).

    A (B,H,L,L) and V (B,H,L,d); the first L - N tokens are no patches.
    """
    before = tower.prefix_tokens if matrix.shape[-1] == tokens.shape[1] else 0

    def tail(heads):
        return tower.embed(tower.attention_branch(heads[:, :, before:]))

    def logits(features, scale):
        return scale * functional.normalize(features, dim=-1) @ text.T

    uniform = tail(torch.full_like(matrix, 1 / matrix.shape[-1]) @ value)
    feedback = reference.feedback_attention(
        logits(tail(matrix @ value), 20), logits(uniform, 35), config
    )
    whole = torch.zeros_like(matrix[:, 0])
    whole[:, :before, :before] = torch.eye(before)
    whole[:, before:, before:] = feedback
    return tail(matrix @ value), tail(reference.adapt(value, whole, matrix, config))


def naclip_matrix(visual, images, std):
    """NACLIP's attention (B,H,1+N,1+N), the neighbourhood summed patch by patch."""
    tower, tokens, _, value = last_attention(visual, images, ())
    key = tower.project(tokens, "k")["k"]
    scores = key @ key.transpose(2, 3) / key.shape[-1] ** 0.5
    rows, columns = tower.grid(*images.shape[-2:])
    places = [(row, column) for row in range(rows) for column in range(columns)]
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            distance = math.dist((row, column), (other_row, other_column))
            scores[:, :, 1 + i, 1 + j] += math.exp(-(distance**2) / (2 * std**2))
    return tower, tokens, scores.softmax(dim=-1), value


@pytest.mark.parametrize("std", [5.0, 0.7])
def test_naclip_is_the_definition_written_with_matrices(std):
    visual = random_tower().double()
    images, text, _ = random_inputs(height=24, width=40, dtype=torch.float64)
    initial, adapted = with_feedback_by_matrices(*naclip_matrix(visual, images, std), text)
    host = hosts.build("naclip", visual, std=std)
    assert relative_error(host.features(images, text), initial) < 1e-12
    assert relative_error(host.features(images, text, config=CONFIG), adapted) < 1e-11
    if std == 5.0:  # The published one.
        default = hosts.build("naclip", visual).features(images, text)
        assert relative_error(default, initial) < 1e-12


@pytest.mark.parametrize("std", [0, -1.0, float("nan"), float("inf"), True, "wide"])
def test_naclip_needs_a_width(std):
    with pytest.raises(InputError, match="std"):
        hosts.build("naclip", random_tower(), std=std)


def value_affinity(block):
    """An attention of a test's own: the values' cosines, sharpened."""
    unit = functional.normalize(block.value[:, :, block.prefix_tokens :], dim=-1)
    return (unit @ unit.transpose(2, 3) * 5).softmax(dim=-1)


@pytest.mark.parametrize("heads", ["per head", "shared"])
def test_a_function_of_the_users_is_a_host(heads):
    visual = random_tower().double()
    images, text, _ = random_inputs(height=24, width=40, dtype=torch.float64)
    seen = []

    def own_attention(block):
        seen.append(block)
        matrix = value_affinity(block)
        return matrix if heads == "per head" else matrix.mean(dim=1)

    host = hosts.build(own_attention, visual)
    features = host.features(images, text)
    with_feedback = host.features(images, text, config=CONFIG)

    block = seen[-1]
    tower, tokens, _, value = last_attention(visual, images, ())
    assert block.grid == (3, 5)
    assert torch.equal(block.images, images)
    assert torch.equal(block.tokens, tokens)
    assert torch.equal(block.query, tower.project(tokens, "q")["q"])
    assert torch.equal(block.key, tower.project(tokens, "k")["k"])
    torch.testing.assert_close(block.value, value)
    matrix = value_affinity(block)
    if heads == "shared":
        matrix = matrix.mean(dim=1, keepdim=True).expand_as(matrix)
    initial, adapted = with_feedback_by_matrices(tower, tokens, matrix, value[:, :, 1:], text)
    assert relative_error(features, initial) < 1e-12
    assert relative_error(with_feedback, adapted) < 1e-11


@pytest.mark.parametrize("residual", [True, False])
def test_a_function_can_be_clearclip(residual):
    visual = random_tower().double()
    images, text, _ = random_inputs(dtype=torch.float64)

    def clearclip(block):
        projected = {"q": block.query, "v": block.value}
        prefix = block.prefix_tokens
        return attention_of_pairs(projected, ("qq",), "auto", CONFIG, prefix_tokens=prefix)

    for config in (None, CONFIG):
        features = hosts.build(clearclip, visual, residual=residual).features(
            images, text, config=config
        )
        expected = hosts.build("clearclip", visual, residual=residual).features(
            images, text, config=config
        )
        assert torch.equal(features, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_function_in_half_precision(dtype):
    images, text, _ = random_inputs()
    exact = hosts.build(value_affinity, random_tower()).features(images, text, config=CONFIG)
    host = hosts.build(value_affinity, random_tower().to(dtype))
    features = host.features(images.to(dtype), text.to(dtype), config=CONFIG)
    assert features.dtype == dtype
    assert relative_error(features, exact) < 0.1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda block: None, r"'<lambda>' must have shape .* it has a NoneType"),
        (lambda block: value_affinity(block)[..., 1:], "the attention returned by the function"),
        (
            lambda block: LastAttention(
                block.value, lambda x: x, block.value, block.value[:, :, :1]
            ),
            r"value returned by the function .* it has shape \(2, 3, 17, 8\)",
        ),
    ],
)
def test_a_function_that_returns_something_else_is_told_so(function, message):
    images, text, _ = random_inputs()
    with pytest.raises(InputError, match=message):
        hosts.build(function, random_tower()).features(images, text)


@pytest.mark.parametrize("residual", [True, False])
def test_maskclip_is_the_definition_with_the_identity(residual):
    visual = random_tower().double()
    images, text, _ = random_inputs(dtype=torch.float64)
    tower, tokens, _, value = last_attention(visual, images, ())
    value = value[:, :, 1:]

    def tail(heads):
        branch = tower.attention_branch(heads)
        return tower.embed(tower.residual_branches(tokens[:, 1:], branch) if residual else branch)

    def logits(features, scale):
        return scale * functional.normalize(features, dim=-1) @ text.T

    host = hosts.build("maskclip", visual, residual=residual)
    assert relative_error(host.features(images, text), tail(value)) < 1e-12
    uniform = tail(value.mean(dim=2, keepdim=True).expand_as(value))
    feedback = reference.feedback_attention(logits(tail(value), 20), logits(uniform, 35))
    adapted = reference.adapt(value, feedback, torch.eye(value.shape[2]).double()[None])
    assert relative_error(host.features(images, text, config=CONFIG), tail(adapted)) < 1e-11


@pytest.mark.parametrize("name", hosts.names())
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56), (8, 8), (40, 16)])
def test_grids_need_not_be_square(name, height, width):
    host = hosts.build(name, random_tower())
    args, options = inputs_of(name, height=height, width=width)
    rows, columns = host.grid(height, width, options["vfm_features"])
    for config in (None, CONFIG):
        features = host.features(*args, **options, config=config)
        assert features.shape == (2, rows * columns, 16)
        assert features.isfinite().all()


@pytest.mark.parametrize("name", hosts.names())
def test_every_image_stands_alone(name):
    host = hosts.build(name, random_tower())
    (images, text), options = inputs_of(name, B=3)
    together = host.features(images, text, **options, config=CONFIG)
    for b in range(3):
        one = slice(b, b + 1)
        vfm_features = options["vfm_features"]
        by_itself = host.features(
            images[one],
            text,
            vfm_features=None if vfm_features is None else vfm_features[one],
            config=CONFIG,
        )
        assert relative_error(together[one], by_itself) < 1e-5


@pytest.mark.parametrize("name", hosts.names())
@pytest.mark.parametrize(
    "changes",
    [{"isolation": False}, {"iterations": 2}, {"adaptations": ("before",)}, {"pruning": None}],
    ids=str,
)
def test_ablations_reach_the_hosts(name, changes):
    if name == "maskclip" and "adaptations" in changes:
        changes = {"scaling": False}  # With the identity the adaptations are all the same.
    host = hosts.build(name, random_tower())
    args, options = inputs_of(name)
    default = host.features(*args, **options, config=CONFIG)
    ablated = host.features(*args, **options, config=CONFIG.replace(**changes))
    assert relative_error(ablated, default) > 1e-6


@pytest.mark.parametrize("name", hosts.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_towers_run(name, dtype):
    host = hosts.build(name, random_tower().to(dtype))
    args, options = inputs_of(name, dtype=dtype)
    features = host.features(*args, **options, config=CONFIG)
    exact_host = hosts.build(name, random_tower())
    args, options = inputs_of(name)
    exact = exact_host.features(*args, **options, config=CONFIG)
    assert features.dtype == dtype
    assert relative_error(features, exact) < 0.1


def test_towers_of_the_older_layout_run():
    # Before open_clip 2.25 the transformer took (tokens, batch, width).
    visual, older = random_tower(), random_tower()
    older.transformer.batch_first = False
    for block in older.transformer.resblocks:
        block.attn.batch_first = False
    images, text, _ = random_inputs()
    expected = hosts.build("sclip", visual).features(images, text, config=CONFIG)
    features = hosts.build("sclip", older).features(images, text, config=CONFIG)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_middle_layer_features_are_what_enters_the_block():
    visual = random_tower()
    images, _, _ = random_inputs(height=24, width=40)
    tower = fsa.models.tower.Tower(visual)
    seen = []
    visual.transformer.resblocks[1].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    tower.trunk(images)
    features = tower.layer_features(images, 1)
    assert features.shape == (2, 24, 3, 5)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), seen[0][:, 1:])


def test_the_model_is_left_as_it_was():
    visual = random_tower(output_tokens=True)
    (images, text), _ = inputs_of("sclip")
    before = visual(images)[0].clone()
    hosts.build("sclip", visual).features(images, text, config=CONFIG)
    assert torch.equal(visual(images)[0], before)


def test_a_model_that_would_train_is_run_without_gradients():
    visual = random_tower().requires_grad_(True)
    (images, text), _ = inputs_of("clearclip")
    features = hosts.build("clearclip", visual).features(images, text, config=CONFIG)
    assert not features.requires_grad


def wrong(**changes):
    images, text, vfm_features = random_inputs()
    return {"images": images, "text_features": text, "vfm_features": vfm_features, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.randn(3, 32, 32)}, r"images must be \(B, 3, H, W\)"),
        ({"images": torch.randn(1, 4, 32, 32)}, r"images must be \(B, 3, H, W\)"),
        ({"images": torch.randn(2, 3, 32, 33)}, "32 x 33 pixels"),
        ({"images": torch.randn(2, 3, 4, 32)}, "positive multiples of the patch size 8 x 8"),
        ({"images": torch.randn(2, 3, 32, 32).half()}, "images are torch.float16"),
        ({"text_features": torch.randn(5, 17)}, r"text_features must be \(C, 16\)"),
        ({"text_features": torch.randn(0, 16)}, "text_features"),
        ({"vfm_features": None}, "ProxyCLIP needs vfm_features"),
        ({"vfm_features": torch.randn(1, 10, 4, 4)}, "vfm_features must be"),
        ({"vfm_features": torch.randn(2, 10, 16)}, "vfm_features must be"),
        ({"config": True}, "config must be an FSAConfig or None, not bool"),
    ],
)
def test_bad_inputs_are_refused_in_words(changes, message):
    host = hosts.build("proxyclip", random_tower())
    with pytest.raises(InputError, match=message):
        host.features(**wrong(**changes))


def test_vfm_features_are_for_proxyclip_only():
    with pytest.raises(InputError, match="ClearCLIP, which takes none"):
        hosts.build("clearclip", random_tower()).features(**wrong())


def test_unknown_hosts_and_options_are_refused_in_words():
    with pytest.raises(InputError, match="must be one of clip, maskclip"):
        hosts.build("superclip", random_tower())
    with pytest.raises(InputError, match=r"no option 'shift'; those it has.* residual=False"):
        hosts.build("clearclip", random_tower(), shift=1.0)
    with pytest.raises(InputError, match="no option 'function'"):
        hosts.build(lambda block: None, random_tower(), function=print)
    with pytest.raises(InputError, match="backend='gpu'"):
        hosts.build("clearclip", random_tower(), backend="gpu")


# Of each option another value than the published one, as text and as Python has it.
OTHER_VALUES = {
    "residual": ("TRUE", True),
    "match_mass": ("true", True),
    "shift": ("1", 1.0),
    "gain": ("2.5", 2.5),
    "std": ("7", 7.0),
    "class_weight": ("0", 0.0),
    "steps": ("none", None),
    "key_weight": ("0.3", 0.3),
}


@pytest.mark.parametrize("name", hosts.names())
def test_every_option_can_be_written_as_text(name):
    defaults = hosts.host_class(name).default_options()
    texts = []
    for option, default in defaults.items():
        text, value = OTHER_VALUES[option]
        if value == default:
            text, value = "false", False
        texts.append(f"{option} = {text}")
        options = hosts.parsed_options(name, [f"{option}={text}"])
        assert options == {option: value}
        assert type(options[option]) is type(value)
        built = hosts.build(name, random_tower(), **options)
        assert built.options == {**defaults, option: value}
    assert hosts.build(name, random_tower()).options == defaults
    assert set(hosts.parsed_options(name, texts)) == set(defaults)


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("clearclip", ["key_weight=1"], "'clearclip' has no option 'key_weight'.*residual=False"),
        ("pearl", ["key_weigth=1"], "'key_weigth'.*steps=5, key_weight=0.08, residual=False"),
        ("pearl", ["backend=torch"], "no option 'backend'"),
        ("pearl", ["key_weight"], "'key_weight' must be NAME=VALUE"),
        ("pearl", ["key_weight=1", "key_weight=2"], "'key_weight' was given more than once"),
        ("pearl", ["key_weight=much"], "key_weight='much' is not accepted: it must be a number"),
        ("pearl", ["steps=2.5"], "steps='2.5' is not accepted: it must be an integer or none"),
        ("sclip", ["match_mass=1"], "match_mass='1' is not accepted: it must be true or false"),
        ("sclip", ["residual=none"], "residual='none' is not accepted: it must be true or false"),
    ],
)
def test_options_that_are_no_such_text_are_refused_in_words(name, texts, message):
    with pytest.raises(InputError, match=message):
        hosts.parsed_options(name, texts)


def test_constants_of_numpy_are_kept_as_pythons():
    built = hosts.build("naclip", random_tower(), std=np.float32(7))
    assert json.loads(json.dumps(built.options)) == {"std": 7.0, "residual": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": float("nan")}, "shift=nan is not accepted: it must be a finite number"),
        ({"gain": 0}, "gain=0 is not accepted: it must be a finite number > 0"),
        ({"gain": "3"}, "gain='3' is not accepted"),
    ],
)
def test_constants_of_proxyclip_are_checked_before_any_picture(options, message):
    with pytest.raises(InputError, match=message):
        hosts.build("proxyclip", random_tower(), **options)


def test_other_towers_are_refused_in_words():
    with pytest.raises(InputError, match="not a plain open_clip VisionTransformer"):
        hosts.build("clip", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="attentional pooling"):
        hosts.build("clip", random_tower(attentional_pool=True, attn_pooler_heads=2))
    with pytest.raises(InputError, match="custom blocks"):
        hosts.build("clip", random_tower(qk_norm=True))
