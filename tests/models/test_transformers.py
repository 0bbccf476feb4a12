"""Models of the transformers library behind the hosts, against themselves and open_clip's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional

import fsa
from fsa import FSAConfig, InputError, hosts, tiny
from fsa.models.tower import resized_positions
from fsa.models.transformers import CLIPTower, Siglip2Tower, SiglipTower, from_transformers
from tests.support.accuracy import relative_error

transformers = pytest.importorskip("transformers")

from transformers.models.siglip2.image_processing_siglip2 import (  # noqa: E402
    convert_image_to_patches,
)

from tests.support.transformers_models import (  # noqa: E402
    random_clip,
    random_relative,
    random_siglip,
    random_siglip2,
    tokenizer,
    word_tokenizer,
)

RELATIVES = ["MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel", "CLIPSegModel"]

CONFIG = FSAConfig()
CHANNELS = SimpleNamespace(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


@pytest.fixture(scope="module")
def processor():
    return transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer())


def inputs(height=32, width=32, E=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, height, width, generator=generator, dtype=dtype)
    text = torch.randn(5, E, generator=generator, dtype=dtype)
    return images, functional.normalize(text, dim=-1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56)])
def test_the_tower_is_the_clip_model(height, width, monkeypatch):
    model = random_clip(torch.float64)

    def published(embeddings, height, width):
        positions = model.vision_model.embeddings.position_embedding.weight
        return resized_positions(positions, (4, 4), (height // 8, width // 8), 1)

    # transformers lays the grids edge to edge, which no published host does.
    monkeypatch.setattr(model.vision_model.embeddings, "interpolate_pos_encoding", published)
    images, text = inputs(height, width)
    whole = model.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    expected = model.visual_projection(model.vision_model.post_layernorm(whole))[:, 1:]
    features = hosts.build("clip", CLIPTower(model)).features(images, text)
    # Positions are resized in float32.
    assert relative_error(features, expected) < (1e-12 if (height, width) == (32, 32) else 1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56)])
@pytest.mark.parametrize("name", RELATIVES)
def test_the_tower_of_a_model_that_took_over_clips(name, height, width):
    model = random_relative(name, torch.float64)
    images, text = inputs(height, width)
    whole = model.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    expected = model.visual_projection(model.vision_model.post_layernorm(whole))[:, 1:]
    tower = CLIPTower(model)
    # Edge to edge, as transformers lays the grids.
    tower.position_offset = 0.0
    features = hosts.build("clip", tower).features(images, text)
    assert relative_error(features, expected) < (1e-12 if (height, width) == (32, 32) else 1e-6)


@pytest.mark.parametrize("name", ["ChineseCLIPModel", "AltCLIPModel"])
def test_the_text_of_these_is_masked(name):
    model = random_relative(name)
    words = word_tokenizer(padding=1 if name == "AltCLIPModel" else 0)
    loaded = from_transformers(model, SimpleNamespace(tokenizer=words, image_processor=CHANNELS))
    texts = ["a cat", "a photo of a cat"]
    features = loaded.model.encode_text(loaded.tokenizer(texts))
    alone = torch.cat([loaded.model.encode_text(loaded.tokenizer([text])) for text in texts])
    assert relative_error(features, alone) < 1e-5
    loaded.model.padding = None
    unmasked = loaded.model.encode_text(loaded.tokenizer(texts))
    assert relative_error(unmasked[0], alone[0]) > 1e-3


@pytest.mark.parametrize("name", ["MetaClip2Model", "CLIPSegModel"])
def test_the_text_of_these_ends_before_what_is_padded(name, processor):
    model = random_relative(name)
    loaded = from_transformers(model, processor)
    encoded = processor.tokenizer(["a cat"], return_tensors="pt")
    expected = model.get_text_features(**encoded).pooler_output
    features = loaded.model.encode_text(loaded.tokenizer(["a cat"]))
    assert features.shape == (1, 16)
    assert relative_error(features, expected) < 1e-5


@pytest.mark.parametrize("name", RELATIVES)
def test_a_picture_through_a_model_that_took_over_clips_tower(name, processor):
    model = random_relative(name)
    if name in ("ChineseCLIPModel", "AltCLIPModel"):
        words = word_tokenizer(padding=1 if name == "AltCLIPModel" else 0)
        processor = SimpleNamespace(tokenizer=words, image_processor=CHANNELS)
    segmentor = fsa.load_segmentor(model=model, processor=processor)
    picture = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    result = segmentor.segment(picture, ["cat", "photo"], short_side=32, window=32, stride=16)
    assert result.labels.shape == (40, 56)
    assert segmentor.loaded.image_size == 32


def as_rows_of_pixels(images, patch=8):
    """What a Siglip2Model takes: patches as rows of pixels, each with its channels."""
    rows = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56), (16, 24)])
def test_the_siglip2_tower_pools_each_patch_alone(height, width):
    model = random_siglip2(torch.float64)
    images, text = inputs(height, width, E=24)
    pixels = as_rows_of_pixels(images)
    assert torch.equal(pixels[0], convert_image_to_patches(images[0], 8))
    N = height * width // 64
    whole = model.vision_model(
        pixel_values=pixels,
        pixel_attention_mask=torch.ones(2, N, dtype=torch.long),
        spatial_shapes=torch.tensor([(height // 8, width // 8)] * 2),
    ).last_hidden_state
    patches = [model.vision_model.head(patch[:, None]) for patch in whole.unbind(dim=1)]
    features = hosts.build("clip", Siglip2Tower(model)).features(images, text)
    error = relative_error(features, torch.stack(patches, dim=1))
    assert error < (1e-12 if (height, width) == (32, 32) else 1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56)])
def test_the_siglip_tower_pools_each_patch_alone(height, width):
    model = random_siglip(torch.float64)
    images, text = inputs(height, width, E=24)
    whole = model.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    patches = [model.vision_model.head(patch[:, None]) for patch in whole.unbind(dim=1)]
    features = hosts.build("clip", SiglipTower(model)).features(images, text)
    assert features.shape[1] == height * width // 64
    error = relative_error(features, torch.stack(patches, dim=1))
    assert error < (1e-12 if (height, width) == (32, 32) else 1e-6)


def by_hand(model, images, pairs):
    """Q, K, V (B,H,L,d) and A (B,H,L,L) of the last block, from the hidden states before it."""
    states = model.vision_model(images, output_hidden_states=True).hidden_states[-2]
    layer = model.vision_model.encoder.layers[-1]
    normed = layer.layer_norm1(states)
    attention = layer.self_attn
    projected = {
        name: getattr(attention, f"{name}_proj")(normed).unflatten(-1, (3, 8)).transpose(1, 2)
        for name in "qkv"
    }
    matrix = sum(
        (projected[a] @ projected[b].transpose(2, 3) / 8**0.5).softmax(dim=-1) for a, b in pairs
    )
    heads = (matrix @ projected["v"]).transpose(1, 2).flatten(2)
    return attention.out_proj(heads)


@pytest.mark.parametrize(("host", "pairs"), [("clearclip", ("qq",)), ("kk", ("kk",))])
def test_other_attention_in_the_last_block(host, pairs):
    images, text = inputs()
    model = random_clip(torch.float64)
    branch = by_hand(model, images, pairs)[:, 1:]
    expected = model.visual_projection(model.vision_model.post_layernorm(branch))
    features = hosts.build(host, CLIPTower(model)).features(images, text)
    assert relative_error(features, expected) < 1e-12

    model = random_siglip(torch.float64)
    vision = model.vision_model
    branch = vision.post_layernorm(by_hand(model, images, pairs))
    expected = torch.stack([vision.head(patch[:, None]) for patch in branch.unbind(1)], dim=1)
    features = hosts.build(host, SiglipTower(model)).features(images, inputs(E=24)[1])
    assert relative_error(features, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", hosts.names())
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_every_host_runs_with_feedback(family, name, dtype):
    model, E = (random_clip(dtype), 16) if family == "clip" else (random_siglip(dtype), 24)
    tower = CLIPTower(model) if family == "clip" else SiglipTower(model)
    images, text = inputs(24, 40, E, dtype=torch.float32)
    host = hosts.build(name, tower)
    options = {"vfm_features": tower.layer_features(images.to(dtype), 1)}
    options = options if host.needs_vfm else {}
    plain = host.features(images.to(dtype), text.to(dtype), **options)
    features = host.features(images.to(dtype), text.to(dtype), **options, config=CONFIG)
    assert features.shape == (2, 15, E)
    assert features.dtype == dtype
    assert features.isfinite().all()
    assert relative_error(features, plain) > 1e-3


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_layer_and_the_trunk_run_every_block_once(family, count_calls):
    model = random_clip(torch.float64) if family == "clip" else random_siglip(torch.float64)
    tower = CLIPTower(model) if family == "clip" else SiglipTower(model)
    images, _ = inputs(24, 40)
    expected = tower.layer_features(images, 1), tower.trunk(images)
    calls = count_calls(model.vision_model.encoder.layers)
    features, tokens = tower.layer_and_trunk(images, 1)
    assert calls == list(range(tower.layers - 1))
    assert torch.equal(features, expected[0])
    assert torch.equal(tokens, expected[1])


# --------------------------------------------------------------------------------------------------
# The same weights in both libraries


def in_transformers(model):
    """The embedded model, open_clip's, as a `CLIPModel` of the same weights."""
    vision, text = tiny.CONFIG["vision_cfg"], tiny.CONFIG["text_cfg"]
    activation = "quick_gelu" if tiny.CONFIG.get("quick_gelu") else "gelu"
    visual = model.visual
    config = transformers.CLIPConfig(
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": visual.transformer.resblocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": visual.transformer.resblocks[0].attn.num_heads,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": activation,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": model.transformer.resblocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": activation,
        },
        projection_dim=tiny.CONFIG["embed_dim"],
    )
    state = {
        "logit_scale": model.logit_scale,
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": model.text_projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
    }

    def put(name, module):
        state[f"{name}.weight"], state[f"{name}.bias"] = module.weight, module.bias

    put("vision_model.pre_layrnorm", visual.ln_pre)
    put("vision_model.post_layernorm", visual.ln_post)
    put("text_model.final_layer_norm", model.ln_final)
    for tower, blocks in (
        ("vision_model", visual.transformer.resblocks),
        ("text_model", model.transformer.resblocks),
    ):
        for i, block in enumerate(blocks):
            layer = f"{tower}.encoder.layers.{i}"
            put(f"{layer}.layer_norm1", block.ln_1)
            put(f"{layer}.layer_norm2", block.ln_2)
            put(f"{layer}.mlp.fc1", block.mlp.c_fc)
            put(f"{layer}.mlp.fc2", block.mlp.c_proj)
            put(f"{layer}.self_attn.out_proj", block.attn.out_proj)
            for name, weight, bias in zip(
                "qkv",
                block.attn.in_proj_weight.chunk(3),
                block.attn.in_proj_bias.chunk(3),
                strict=True,
            ):
                state[f"{layer}.self_attn.{name}_proj.weight"] = weight
                state[f"{layer}.self_attn.{name}_proj.bias"] = bias
    converted = transformers.CLIPModel(config)
    converted.load_state_dict(state)
    return converted


@pytest.mark.parametrize("host", ["clip", "clearclip", "maskclip", "naclip", "proxyclip"])
def test_the_same_weights_give_the_same_segmentation(host, processor):
    scene = tiny.demo_scenes()[2]
    # In some scenes the last digit of float32 decides whether a patch is pruned.
    feedback = fsa.FSAConfig(pruning=None)
    sizes = {"short_side": 96, "window": 96, "stride": 48}
    vfm = "layer" if host == "proxyclip" else None
    ours = fsa.load_segmentor(host=host, vfm=vfm, feedback=feedback)
    model = in_transformers(ours.loaded.model)
    theirs = fsa.load_segmentor(
        host=host, vfm=vfm, model=model, processor=processor, feedback=feedback
    )
    expected = ours.segment(scene.picture, scene.classes, **sizes)
    result = theirs.segment(scene.picture, scene.classes, **sizes)
    np.testing.assert_allclose(result.scores, expected.scores, atol=2e-5)
    assert (result.labels == expected.labels).mean() > 0.999
    assert len(np.unique(expected.labels)) > 1


def test_the_processor_gives_texts_and_statistics(processor):
    loaded = from_transformers(random_clip(), processor)
    tokens = loaded.tokenizer(["a cat", "a photo of a very long sentence " * 4])
    ours = open_clip.SimpleTokenizer(context_length=16)(["a cat"])
    assert tokens.shape == (2, 16)
    assert tokens[0, :4].tolist() == ours[0, :4].tolist()
    assert loaded.mean == tuple(processor.image_processor.image_mean)
    assert loaded.std == tuple(processor.image_processor.image_std)


def test_the_model_is_taken_as_it_comes_or_moved(processor):
    model = random_clip(torch.bfloat16).train()
    loaded = from_transformers(model, processor)
    assert loaded.dtype == torch.bfloat16
    assert not model.training
    assert from_transformers(model, processor, device="cpu", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("width", "patch", "beta"), [(768, 16, 3.0), (1024, 14, 3.0), (1280, 14, 2.3)]
)
def test_presets_know_the_towers_of_known_sizes(width, patch, beta, processor):
    model = random_clip(
        hidden_size=width, patch_size=patch, num_attention_heads=8, num_hidden_layers=1
    )
    assert fsa.load_segmentor(model=model, processor=processor).config.beta == beta


@pytest.mark.parametrize("make", [random_siglip, random_siglip2])
def test_a_picture_through_siglip(make, processor):
    model = make()
    segmentor = fsa.load_segmentor(host="clearclip", model=model, processor=processor)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    )
    result = segmentor.segment(picture, ["cat", "grass"], short_side=32, window=32, stride=16)
    assert result.labels.shape == (40, 56)
    assert result.settings["model"] == type(model).__name__
    assert segmentor.loaded.image_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": torch.nn.Linear(2, 2)},
            "a CLIPModel, MetaClip2Model, .*SiglipModel or Siglip2Model .*, not Linear",
        ),
        ({"processor": None}, "processor must be the model's processor.*NoneType"),
        ({"pretrained": "openai"}, "leave it out"),
        ({"model": "tiny"}, "processor was given, but model='tiny' takes none"),
        ({"dtype": "int8"}, "dtype='int8' is not accepted"),
        ({"model": random_siglip(vision_use_head=False)}, "no pooling head"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(options, message, processor):
    arguments = {"model": random_clip(), "processor": processor, **options}
    with pytest.raises(InputError, match=message):
        fsa.load_segmentor(**arguments)


def test_without_transformers_the_way_to_it_is_said(monkeypatch, processor):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"fsa-kernels\[transformers\]"):
        fsa.load_segmentor(model=torch.nn.Linear(2, 2), processor=processor)
