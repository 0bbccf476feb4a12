"""Feedback in towers written in the manner of the published code, which stays unedited."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import fsa
from fsa import FSAConfig, InputError, reference
from tests.support.accuracy import relative_error

WIDTH, HEADS, EMBED, PATCH, GRID = 24, 3, 16, 8, (3, 5)
CONFIG = FSAConfig()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TowerOf2024(nn.Module):
    """What the published towers share: tokens first, (L,B,D), and a last block taken apart."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(WIDTH))
            self.positional_embedding = nn.Parameter(torch.randn(1 + GRID[0] * GRID[1], WIDTH))
            self.transformer = nn.Module()
            self.transformer.resblocks = nn.Sequential(*(Block() for _ in range(3)))
            self.ln_post = nn.LayerNorm(WIDTH)
            self.proj = nn.Parameter(torch.randn(WIDTH, EMBED))
            for module in self.modules():
                if isinstance(module, nn.MultiheadAttention):
                    # Initialised to zero, where a forgotten bias would go unseen.
                    nn.init.normal_(module.in_proj_bias)
                    nn.init.normal_(module.out_proj.bias)
        self.requires_grad_(False)

    def trunk(self, images):
        x = self.conv1(images).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_embedding.expand(1, x.shape[1], WIDTH), x])
        x = x + self.positional_embedding[:, None]
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x, self.transformer.resblocks[-1]

    def embed(self, x):
        return self.ln_post(x.permute(1, 0, 2)) @ self.proj


def per_head(attn_layer, x):
    """Queries, keys and values (B*H,L,d), as the published code has them."""
    length, batch, width = x.shape
    heads = attn_layer.num_heads
    packed = functional.linear(x, attn_layer.in_proj_weight, attn_layer.in_proj_bias)
    return [
        part.reshape(length, batch * heads, width // heads).transpose(0, 1)
        for part in packed.split(width, dim=-1)
    ]


def gathered(attn_layer, weights, value, batch):
    heads = torch.bmm(weights, value)
    return attn_layer.out_proj(heads.transpose(0, 1).reshape(-1, batch, WIDTH))


def weights_of(a, b):
    return (a @ b.transpose(1, 2) * a.shape[-1] ** -0.5).softmax(dim=-1)


class ProxyTower(TowerOf2024):
    def forward(self, x, ex_feats=None, beta=1.2, gamma=3.0):
        x, block = self.trunk(x)
        x = self.custom_attn(
            block.attn, block.ln_1(x), ex_feats=ex_feats, beta=beta, gamma=gamma, token_size=GRID
        )
        return self.embed(x)

    def custom_attn(self, attn_layer, x, ex_feats=None, beta=1.2, gamma=3.0, token_size=(16, 16)):
        batch = x.shape[1]
        _, _, value = per_head(attn_layer, x)
        unit = functional.normalize(ex_feats.flatten(2), dim=1)
        affinity = unit.transpose(1, 2) @ unit
        affinity = (affinity - affinity.mean() * beta) * gamma
        weights = affinity.masked_fill(affinity < 0, float("-inf")).softmax(dim=-1)
        maps = value[:, 1:].transpose(1, 2).unflatten(2, token_size)
        maps = functional.interpolate(maps, size=ex_feats.shape[-2:], mode="bilinear")
        value = maps.flatten(2).transpose(1, 2)
        return gathered(attn_layer, weights.repeat_interleave(HEADS, dim=0), value, batch)


class ClearTower(TowerOf2024):
    def forward(self, x, model_type="ClearCLIP", ignore_residual=True):
        x, block = self.trunk(x)
        attended = self.custom_attn(block.attn, block.ln_1(x), model_type=model_type)
        if ignore_residual:
            x = attended
        else:
            x = x + attended
            x = x + block.mlp(block.ln_2(x))
        return self.embed(x)[:, 1:]

    def custom_attn(self, attn_layer, x, model_type="ClearCLIP"):
        query, key, value = per_head(attn_layer, x)
        weights = self.attention(query, key, model_type, value)
        return gathered(attn_layer, weights, value, x.shape[1])

    @staticmethod
    def attention(query, key, model_type, value):
        if model_type == "SegEarth":
            return sum(weights_of(inputs, inputs) for inputs in (query, key, value))
        if model_type == "ClearCLIP":
            return weights_of(query, query)
        if model_type == "SCLIP":
            return weights_of(query, query) + weights_of(key, key)
        if model_type == "MaskCLIP":
            return torch.eye(query.shape[1]).to(query).expand(len(query), -1, -1)
        return weights_of(query, key)


class SclipTower(TowerOf2024):
    def forward(self, x, return_all=False, csa=True):
        x, block = self.trunk(x)
        x = x + self.custom_attn(block.attn, block.ln_1(x), csa=csa)
        x = x + block.mlp(block.ln_2(x))
        return self.embed(x) if return_all else self.embed(x)[:, 0]

    def custom_attn(self, attn_layer, x, return_attn=False, with_attn=False, csa=False):
        query, key, value = per_head(attn_layer, x)
        weights = self.attention(query, key, csa)
        if return_attn:
            return weights
        out = gathered(attn_layer, weights, value, x.shape[1])
        return (out, weights) if with_attn else out

    @staticmethod
    def attention(query, key, csa):
        if csa:
            return weights_of(query, query) + weights_of(key, key)
        return weights_of(query, key)


def pictures(B=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, 3, GRID[0] * PATCH, GRID[1] * PATCH, generator=generator)
    text = torch.randn(6, EMBED, generator=generator).to(dtype)
    features = torch.randn(B, 10, 4, 7, generator=generator)
    return images.to(dtype), functional.normalize(text, dim=-1), features.to(dtype)


def by_matrices(tower, images, text, matrix, value, *, residual, before, config=CONFIG):
    """Features with feedback by the definition, A (B,H,L,L) and V (B,H,L,d) written out.

    The first `before` of the L tokens come before the patches: feedback leaves them to themselves.
    """
    tokens, block = tower.trunk(images)

    def tail(heads):
        branch = block.attn.out_proj(heads[:, :, before:].transpose(1, 2).flatten(2))
        if residual:
            branch = branch + tokens[1:].transpose(0, 1)
            branch = branch + block.mlp(block.ln_2(branch))
        return tower.ln_post(branch) @ tower.proj

    def logits(features, scale):
        return scale * functional.normalize(features, dim=-1) @ text.T

    uniform = tail(torch.full_like(matrix, 1 / matrix.shape[-1]) @ value)
    feedback = reference.feedback_attention(
        logits(tail(matrix @ value), config.logit_scale),
        logits(uniform, config.uniform_logit_scale),
        config,
    )
    whole = torch.zeros_like(matrix[:, 0])
    whole[:, :before, :before] = torch.eye(before)
    whole[:, before:, before:] = feedback
    return tail(reference.adapt(value, whole, matrix, config))


def last_block(tower, images):
    tokens, block = tower.trunk(images)
    query, key, value = per_head(block.attn, block.ln_1(tokens))
    return query, key, value.unflatten(0, (len(images), HEADS))


def test_a_proxyclip_tower_gets_feedback():
    tower = ProxyTower().double()
    images, text, features = pictures()
    _, _, value = last_block(tower, images)
    maps = value[:, :, 1:].flatten(0, 1).transpose(1, 2).unflatten(2, GRID)
    maps = functional.interpolate(maps, size=features.shape[-2:], mode="bilinear")
    value = maps.flatten(2).transpose(1, 2).unflatten(0, (1, HEADS))
    matrix = reference.proxy_weights(features.flatten(2).transpose(1, 2), shift=1.1, gain=2.5)
    matrix = matrix[:, None].expand(-1, HEADS, -1, -1)

    fsa.plug_in(tower, text)
    ours = tower(images, features, beta=1.1, gamma=2.5)
    exact = by_matrices(tower, images, text, matrix, value, residual=False, before=0)
    assert relative_error(ours, exact) < 1e-11


@pytest.mark.parametrize("ignore_residual", [True, False])
@pytest.mark.parametrize("model_type", ["ClearCLIP", "SCLIP", "MaskCLIP", "vanilla", "SegEarth"])
def test_a_clearclip_tower_gets_feedback(model_type, ignore_residual):
    tower = ClearTower().double()
    images, text, _ = pictures(B=2)
    query, key, value = last_block(tower, images)
    matrix = tower.attention(query, key, model_type, value.flatten(0, 1)).unflatten(0, (2, HEADS))
    before = 1
    if model_type == "MaskCLIP":
        # A patch that attends only to itself does not attend to the class token.
        matrix, value, before = matrix[:, :, 1:, 1:], value[:, :, 1:], 0
    fsa.plug_in(tower, text)
    ours = tower(images, model_type, ignore_residual=ignore_residual)
    exact = by_matrices(
        tower, images, text, matrix, value, residual=not ignore_residual, before=before
    )
    assert relative_error(ours, exact) < 1e-11


@pytest.mark.parametrize("csa", [True, False])
def test_an_sclip_tower_gets_feedback(csa):
    tower = SclipTower().double()
    images, text, _ = pictures(B=2)
    query, key, value = last_block(tower, images)
    matrix = tower.attention(query, key, csa).unflatten(0, (2, HEADS))
    of_class = tower(images, csa=csa)
    fsa.plug_in(tower, text)
    ours = tower(images, True, csa)
    exact = by_matrices(tower, images, text, matrix, value, residual=True, before=1)
    assert relative_error(ours[:, 1:], exact) < 1e-11
    # The class token's feature is what it was.
    assert relative_error(ours[:, 0], of_class) < 1e-12


TOWERS = {
    "proxyclip": (ProxyTower, lambda tower, images, features: tower(images, features)),
    "clearclip": (ClearTower, lambda tower, images, features: tower(images)),
    "sclip": (SclipTower, lambda tower, images, features: tower(images, return_all=True)),
}
styles = pytest.mark.parametrize("style", TOWERS)


@styles
def test_unplug_restores_the_tower(style):
    tower, run = TOWERS[style][0](), TOWERS[style][1]
    images, text, features = pictures(dtype=torch.float32)
    attributes = set(vars(tower))
    plain = run(tower, images, features)
    fsa.plug_in(tower, text)
    assert relative_error(run(tower, images, features), plain) > 1e-3
    fsa.unplug(tower)
    assert torch.equal(run(tower, images, features), plain)
    assert set(vars(tower)) == attributes
    assert not tower._forward_pre_hooks
    assert not tower.transformer.resblocks[-1].ln_1._forward_pre_hooks
    with pytest.raises(InputError, match="not plugged in"):
        fsa.unplug(tower)


@styles
def test_plugging_in_again_replaces_text_and_configuration(style):
    build, run = TOWERS[style]
    images, text, features = pictures(dtype=torch.float32)
    config = FSAConfig(beta=1.0, confidence=0.8)
    fresh, again = build(), build()
    fsa.plug_in(fresh, text[:4], config)
    fsa.plug_in(again, text)
    fsa.plug_in(again, text[:4], config)
    expected = run(fresh, images, features)
    assert torch.equal(run(again, images, features), expected)
    fsa.unplug(again)
    assert relative_error(run(again, images, features), expected) > 1e-3


@styles
def test_text_features_need_not_be_of_unit_length(style):
    build, run = TOWERS[style]
    images, text, features = pictures(dtype=torch.float32)
    one, other = build(), build()
    fsa.plug_in(one, text)
    fsa.plug_in(other, text * 7)
    assert relative_error(run(other, images, features), run(one, images, features)) < 1e-5


@styles
def test_half_precision_towers_run(style):
    build, run = TOWERS[style]
    images, text, features = pictures(dtype=torch.float32)
    exact, half = build(), build().bfloat16()
    fsa.plug_in(exact, text)
    fsa.plug_in(half, text)
    result = run(half, images.bfloat16(), features.bfloat16())
    assert result.dtype == torch.bfloat16
    assert relative_error(result, run(exact, images, features)) < 0.1


def test_a_method_laid_on_the_object_is_put_back():
    tower = ClearTower()
    own_attention = tower.custom_attn
    tower.custom_attn = own_attention
    fsa.plug_in(tower, pictures(dtype=torch.float32)[1])
    fsa.unplug(tower)
    assert vars(tower)["custom_attn"] is own_attention


def test_other_blocks_and_the_attention_itself_stay_the_towers():
    tower = SclipTower()
    images, text, _ = pictures(dtype=torch.float32)
    x, last = tower.trunk(images)
    first = tower.transformer.resblocks[0]
    before = tower.custom_attn(first.attn, x, csa=True)
    weights = tower.custom_attn(last.attn, x, csa=True, return_attn=True)
    output, _ = tower.custom_attn(last.attn, x, csa=True, with_attn=True)
    fsa.plug_in(tower, text)
    assert torch.equal(tower.custom_attn(first.attn, x, csa=True), before)
    assert torch.equal(tower.custom_attn(last.attn, x, csa=True, return_attn=True), weights)
    assert torch.equal(tower.custom_attn(last.attn, x, csa=True, with_attn=True)[0], output)


class OtherAttention(ClearTower):
    @staticmethod
    def attention(query, key, model_type, value):
        return weights_of(key, key)


class MoreArguments(ClearTower):
    def custom_attn(self, attn_layer, x, depth, model_type="ClearCLIP"):
        return x


class OtherArguments(ClearTower):
    def custom_attn(self, attn_layer, x, temperature):
        return x


class OtherShape(ClearTower):
    def custom_attn(self, attn_layer, x, model_type="ClearCLIP"):
        return super().custom_attn(attn_layer, x, model_type)[1:]


class OtherBlock(ClearTower):
    def __init__(self):
        super().__init__()
        self.transformer.resblocks[-1] = nn.Linear(WIDTH, WIDTH)


class WithFSA(ProxyTower):
    def FSA(self):
        return None


TEXT = pictures(dtype=torch.float32)[1]


@pytest.mark.parametrize(
    ("visual", "text", "options", "message"),
    [
        (nn.Linear(2, 2), TEXT, {}, r"a Linear, has no custom_attn.*fsa\.hosts\.build"),
        ("ViT-B-16", TEXT, {}, "visual must be a torch module, not str"),
        (ClearTower(), TEXT[0], {}, r"text_features must be \(C, 16\).*have shape \(16,\)"),
        (ClearTower(), TEXT[:0], {}, "text_features must be"),
        (ClearTower(), TEXT[:, :5], {}, r"have shape \(6, 5\)"),
        (ClearTower(), ["cat"], {}, "they are a list"),
        (ClearTower(), TEXT, {"config": True}, "config must be an FSAConfig or None, not bool"),
        (ClearTower(), TEXT, {"backend": "cuda"}, "backend='cuda' is not known"),
        (OtherBlock(), TEXT, {}, r"has no attn\.in_proj_weight in its last block"),
        (OtherAttention(), TEXT, {}, "reads as ClearCLIP's, computes another attention"),
        (MoreArguments(), TEXT, {}, "takes other arguments: missing a required argument: 'depth'"),
        (OtherArguments(), TEXT, {}, r"takes \(attn_layer, x, temperature\), which is no style"),
        (OtherShape(), TEXT, {}, r"returns shape \(6, 1, 24\)"),
        (WithFSA(), TEXT, {}, r"visual\.FSA = fsa\.published_feedback"),
    ],
)
def test_towers_that_do_not_fit_are_refused_in_words(visual, text, options, message):
    with pytest.raises(InputError, match=message):
        fsa.plug_in(visual, text, **options)


def test_an_unknown_model_type_is_refused_in_words():
    tower = ClearTower()
    fsa.plug_in(tower, TEXT)
    with pytest.raises(InputError, match="model_type='GEM'"):
        tower(pictures(dtype=torch.float32)[0], model_type="GEM")


def test_a_residual_without_its_tokens_is_refused_in_words():
    tower = SclipTower()
    x, last = tower.trunk(pictures(dtype=torch.float32)[0])
    fsa.plug_in(tower, TEXT)
    with pytest.raises(InputError, match="must go through ln_1"):
        tower.custom_attn(last.attn, x, csa=True)


# --------------------------------------------------------------------------------------------------
# The published method


def published_method(patch_probs, uni_probs, attn_layer, v, attn_weights_orig, lamda):
    """The published formulation: an N x N x C tensor, a sort, N x N products for every head."""
    B, N, _ = patch_probs.shape
    heads = attn_layer.num_heads
    probabilities = (patch_probs - uni_probs).softmax(dim=-1)
    logs = (probabilities + 1e-10).log()
    terms = probabilities[:, :, None] * (logs[:, :, None] - logs[:, None])
    similarity = 1 / (1 + terms.sum(dim=-1).clamp(min=0))
    ordered, order = similarity.sort(dim=-1, descending=True, stable=True)
    kept = ordered.softmax(dim=-1).cumsum(dim=-1) <= 0.45
    kept[..., 0] = True
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    scaled = similarity * (lamda * similarity).exp()
    feedback = scaled.masked_fill(~kept, float("-inf")).softmax(dim=-1)
    feedback = feedback[:, None].repeat(1, heads, 1, 1).reshape(B * heads, N, N)
    after, before = feedback @ attn_weights_orig, attn_weights_orig @ feedback
    adapted = (after + before + feedback) / 3 @ v
    return attn_layer.out_proj(adapted.transpose(0, 1).reshape(N, B, -1))


def method_inputs(B=2, N=23, C=7, H=3, d=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        attn_layer = nn.MultiheadAttention(H * d, H).requires_grad_(False)
        nn.init.normal_(attn_layer.out_proj.bias)
    return {
        "patch_probs": normal(B, N, C),
        "uni_probs": normal(B, 1, C).expand(B, N, C),
        "attn_layer": attn_layer.to(dtype),
        "v": normal(B * H, N, d),
        "attn_weights_orig": (normal(B * H, N, N) * 2).softmax(dim=-1),
        "lamda": 2.3,
    }


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("B", [1, 2])
def test_the_published_method_can_be_replaced(B, dtype, limit):
    exact = published_method(**method_inputs(B))
    ours = fsa.published_feedback(*method_inputs(B, dtype=dtype).values())
    assert ours.shape == (23, B, 24)
    assert ours.dtype == dtype
    assert relative_error(ours, exact) < limit


def test_the_tower_calls_it_as_its_own_method():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 3

        def FSA(self, patch_probs, uni_probs, attn_layer, v, attn_weights_orig, lamda):
            return published_method(patch_probs, uni_probs, attn_layer, v, attn_weights_orig, lamda)

        def forward(self, x):
            return self.FSA(*x)

    tower, inputs = Tower(), tuple(method_inputs().values())
    exact = tower(inputs)
    tower.FSA = fsa.published_feedback
    assert relative_error(tower(inputs), exact) < 1e-12
    del tower.FSA
    assert torch.equal(tower(inputs), exact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"v": torch.zeros(5, 23, 8).double()},
            r"v must have shape \(6, 23, 8\).*has \(5, 23, 8\)",
        ),
        ({"v": None}, "v must have shape .*has NoneType"),
        ({"attn_weights_orig": torch.zeros(6, 23, 22)}, "attn_weights_orig must have shape"),
        ({"patch_probs": torch.zeros(23, 7)}, "patch_logits must be"),
        ({"lamda": float("nan")}, "beta=nan"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_words(changes, message):
    with pytest.raises(InputError, match=message):
        fsa.published_feedback(**{**method_inputs(), **changes})
