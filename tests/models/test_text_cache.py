from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES, SimpleTokenizer
from open_clip.model import CLIP, CLIPTextCfg, CustomTextCLIP
from torch import nn

import fsa
from fsa.models.loading import load_model
from fsa.models.text import TextEncoder
from fsa.models.text_cache import TextCache, cache_folder, user_text_cache
from fsa.models.text_tower import fingerprint, shortened
from fsa.models.transformers import TransformersModel
from tests.support.transformers_models import (
    random_clip as random_transformers_clip,
)
from tests.support.transformers_models import random_relative, random_siglip

NAMES = ["cat", "traffic light", "grass"]
# The text tower of ViT-B-32 with four of its twelve layers; the vision tower is not run.
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 4}
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}


def tokens_of(names):
    return SimpleTokenizer()(
        [template(name) for name in names for template in OPENAI_IMAGENET_TEMPLATES]
    )


def random_clip(cls, **text):
    torch.manual_seed(5)
    return cls(128, VISION, {**TEXT, **text}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny():
    return load_model(device="cpu")


@pytest.fixture
def cache(tmp_path):
    return TextCache(tmp_path / "text")


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of the texts that were encoded, call by call."""
    calls = []
    original = TextEncoder._encode_texts

    def counting(self, texts):
        calls.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(TextEncoder, "_encode_texts", counting)
    return calls


class TestShortenedTexts:
    """Against the full length, which the model's own `encode_text` computes."""

    @pytest.mark.parametrize("cls", [CLIP, CustomTextCLIP])
    @pytest.mark.parametrize("pooling", [{}, {"pool_type": "eos", "eos_id": 49407}])
    def test_causal_towers(self, cls, pooling):
        if not set(pooling) <= {field.name for field in dataclasses.fields(CLIPTextCfg)}:
            pytest.skip("this open_clip does not know where a text ends")
        model, tokens = random_clip(cls, **pooling), tokens_of(["cat", "traffic light"])[::5]
        expected = model.encode_text(tokens)
        short, cut = shortened(model, tokens)
        assert cut.shape[1] < 25
        assert cut.shape[1] == (tokens != 0).sum(dim=1).max()
        torch.testing.assert_close(short.encode_text(cut), expected, rtol=0, atol=1e-5)
        # The model itself is as it was.
        assert torch.equal(model.encode_text(tokens), expected)

    def test_the_embedded_model(self, tiny):
        texts = tiny.tokenizer([t(name) for name in NAMES for t in OPENAI_IMAGENET_TEMPLATES])
        short, cut = shortened(tiny.model, texts)
        assert cut.shape[1] < texts.shape[1]
        expected = tiny.model.encode_text(texts)
        torch.testing.assert_close(short.encode_text(cut), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("cls", "settings"),
        [
            (CustomTextCLIP, {"pool_type": "last"}),
            (CustomTextCLIP, {"pool_type": "first"}),
            (CustomTextCLIP, {"no_causal_mask": True}),
            (CustomTextCLIP, {"embed_cls": True}),
            (CLIP, {"no_causal_mask": True}),
            (CLIP, {"pool_type": "last"}),
        ],
    )
    def test_other_towers_keep_the_full_length(self, cls, settings):
        model, tokens = random_clip(cls, **settings), tokens_of(["cat"])
        assert shortened(model, tokens) == (model, tokens)

    def test_a_mask_that_is_not_causal_keeps_the_full_length(self):
        model, tokens = random_clip(CLIP), tokens_of(["cat"])
        model.attn_mask[3, 70] = 0
        assert shortened(model, tokens)[1] is tokens

    def test_a_method_that_was_replaced_gets_the_full_length(self):
        model, tokens = random_clip(CLIP), tokens_of(["cat"])
        model.encode_text = lambda tokens: tokens
        assert shortened(model, tokens)[1] is tokens

    def test_texts_that_fill_the_length_are_not_cut(self):
        model, tokens = random_clip(CLIP), tokens_of([" ".join(["cat"] * 90)])
        assert shortened(model, tokens)[1] is tokens

    @pytest.mark.parametrize("end", [49407, 2])
    @pytest.mark.parametrize("name", ["CLIPModel", "CLIPSegModel", "MetaClip2Model"])
    def test_causal_towers_of_transformers(self, name, end):
        model = random_transformers_clip() if name == "CLIPModel" else random_relative(name)
        for part in (model.config.text_config, model.text_model):
            (part if hasattr(part, "eos_token_id") else part.text_model).eos_token_id = end
        wrapped = TransformersModel(model, nn.Identity())
        tokens = SimpleTokenizer(context_length=16)(["a cat", "a photo of a dog"])
        tokens[tokens == 0] = 49407
        if end == 2 and name == "MetaClip2Model":
            tokens[tokens == 49407] = 2
        short, cut = shortened(wrapped, tokens)
        assert short is wrapped
        assert cut.shape[1] == 7
        expected = wrapped.encode_text(tokens)
        torch.testing.assert_close(short.encode_text(cut), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["SiglipModel", "ChineseCLIPModel", "AltCLIPModel"])
    def test_other_towers_of_transformers_keep_the_full_length(self, name):
        model = random_siglip() if name == "SiglipModel" else random_relative(name)
        tokens = torch.tensor([[2, 4, 5, 6, 1, 1, 1, 1]])
        assert shortened(TransformersModel(model, nn.Identity()), tokens)[1] is tokens


class TestFingerprint:
    def test_it_is_the_same_for_the_same_model(self):
        assert fingerprint(random_clip(CLIP)) == fingerprint(random_clip(CLIP))

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.token_embedding.weight[7, 7].add_(1e-3),
            lambda model: model.text_projection[0, 0].add_(1e-3),
            lambda model: model.half(),
            lambda model: setattr(model.transformer.resblocks[0].mlp, "gelu", nn.ReLU()),
            lambda model: setattr(model.transformer.resblocks[0].attn, "num_heads", 4),
            lambda model: setattr(model, "text_pool_type", "eos"),
            lambda model: model.attn_mask[0, 1].fill_(0),
        ],
    )
    def test_what_changes_features_changes_it(self, change):
        model = random_clip(CLIP)
        before = fingerprint(model)
        change(model)
        assert fingerprint(model) != before

    def test_the_vision_tower_does_not_count(self):
        model = random_clip(CLIP)
        before = fingerprint(model)
        model.visual.proj.add_(1)
        assert fingerprint(model) == before


class TestTextCache:
    def test_what_is_written_is_read_bit_by_bit(self, cache):
        feature = np.random.default_rng(0).normal(size=19).astype(np.float32)
        cache.write("a", feature)
        assert np.array_equal(cache.read("a"), feature)
        assert cache.read("a").dtype == np.float32
        assert cache.read("b") is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[:-4],
            lambda content: content[:32],
            lambda content: content + b"0000",
            lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        ],
    )
    def test_a_damaged_file_counts_as_missing_and_is_written_anew(self, cache, damage):
        feature = np.arange(5, dtype=np.float32)
        cache.write("a", feature)
        [file] = cache.folder.iterdir()
        file.write_bytes(damage(file.read_bytes()))
        assert cache.read("a") is None
        cache.write("a", feature)
        assert np.array_equal(cache.read("a"), feature)

    def test_a_file_under_another_name_counts_as_missing(self, cache):
        cache.write("a", np.ones(3, np.float32))
        [file] = cache.folder.iterdir()
        file.rename(file.with_name(file.name.replace("a.", "b.")))
        assert cache.read("b") is None

    def test_the_oldest_files_go_first(self, cache):
        for age, key in enumerate("abcd"):
            cache.write(key, np.ones(17, np.float32))
            os.utime(cache._file(key), (1000 - age, 1000 - age))
        small = TextCache(cache.folder, limit=2 * (32 + 17 * 4))
        small.trim()
        assert [small.read(key) is not None for key in "abcd"] == [True, True, False, False]

    def test_a_folder_that_cannot_be_made_fails_nothing(self, tmp_path, tiny):
        (tmp_path / "file").write_text("not a folder")
        cache = TextCache(tmp_path / "file" / "text")
        expected = TextEncoder(tiny).encode(NAMES).features
        assert torch.equal(TextEncoder(tiny, cache).encode(NAMES).features, expected)

    def test_nothing_is_left_but_whole_files(self, cache):
        cache.write("a", np.ones(3, np.float32))
        cache.write("a", np.zeros(3, np.float32))
        assert [file.name for file in cache.folder.iterdir()] == ["a.features"]


class TestCacheFolder:
    def test_it_is_the_users_by_the_rules_of_the_platform(self, monkeypatch):
        monkeypatch.delenv("FSA_CACHE_DIR", raising=False)
        folder = cache_folder()
        assert folder == platformdirs.user_cache_path("fsa", appauthor=False)
        assert folder.is_absolute()
        assert user_text_cache().folder == folder / "text"

    @pytest.mark.skipif(sys.platform != "linux", reason="the rules of Linux")
    def test_on_linux_it_is_xdg_s(self, monkeypatch):
        monkeypatch.delenv("FSA_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert cache_folder() == Path("/caches/fsa")

    def test_a_variable_names_another(self, monkeypatch):
        monkeypatch.setenv("FSA_CACHE_DIR", "/own")
        assert cache_folder() == Path("/own")
        monkeypatch.setenv("FSA_CACHE_DIR", "")
        assert cache_folder() == platformdirs.user_cache_path("fsa", appauthor=False)

    def test_without_a_home_there_is_none(self, monkeypatch):
        monkeypatch.delenv("FSA_CACHE_DIR", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/fsa")
        assert cache_folder() is None
        assert user_text_cache() is None


class TestEncoder:
    def test_the_next_process_encodes_nothing(self, tiny, cache, encoded):
        first = TextEncoder(tiny, cache).encode(NAMES)
        assert encoded == [80, 80, 80]
        second = TextEncoder(tiny, cache).encode(NAMES)
        assert encoded == [80, 80, 80]
        assert torch.equal(first.features, second.features)
        assert torch.equal(first.features, TextEncoder(tiny).encode(NAMES).features)

    def test_only_new_names_are_encoded(self, tiny, cache, encoded):
        TextEncoder(tiny, cache).encode(NAMES)
        encoded.clear()
        queries = TextEncoder(tiny, cache).encode([["dog", "grass"], "cat"])
        assert encoded == [80]
        expected = TextEncoder(tiny).encode([["dog", "grass"], "cat"])
        assert torch.equal(queries.features, expected.features)
        assert queries.class_index.tolist() == [0, 0, 1]

    def test_a_name_that_occurs_twice_is_encoded_once(self, tiny, encoded):
        queries = TextEncoder(tiny).encode([["cat"], ["cat", "dog"]], allow_repeats=True)
        assert encoded == [80, 80]
        assert torch.equal(queries.features[0], queries.features[1])

    def test_another_model_and_another_type_have_features_of_their_own(self, tiny, cache, encoded):
        TextEncoder(tiny, cache).encode(["cat"])
        half = load_model(device="cpu", dtype="bfloat16")
        TextEncoder(half, cache).encode(["cat"])
        assert encoded == [80, 80]

    def test_another_tokenizer_has_features_of_its_own(self, tiny, cache, encoded):
        TextEncoder(tiny, cache).encode(["cat"])
        other = dataclasses.replace(
            tiny, tokenizer=lambda texts: tiny.tokenizer([text + "!" for text in texts])
        )
        TextEncoder(other, cache).encode(["cat"])
        assert encoded == [80, 80]

    def test_damaged_files_are_encoded_again(self, tiny, cache, encoded):
        expected = TextEncoder(tiny, cache).encode(NAMES)
        for file in cache.folder.iterdir():
            file.write_bytes(b"\0" * file.stat().st_size)
        queries = TextEncoder(tiny, cache).encode(NAMES)
        assert encoded == [80] * 6
        assert torch.equal(queries.features, expected.features)

    def test_progress_counts_the_texts_that_are_encoded(self, tiny, cache):
        seen = []
        TextEncoder(tiny, cache).encode(["cat", "dog"], progress=lambda *at: seen.append(at))
        assert seen == [(0, 160), (80, 160), (160, 160)]
        seen.clear()
        TextEncoder(tiny, cache).encode(["cat", "bus"], progress=lambda *at: seen.append(at))
        assert seen == [(0, 80), (80, 80)]
        seen.clear()
        TextEncoder(tiny, cache).encode(["cat", "bus"], progress=lambda *at: seen.append(at))
        assert seen == []


class TestSegmentor:
    @pytest.fixture
    def folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FSA_CACHE_DIR", str(tmp_path / "cache"))
        return tmp_path / "cache" / "text"

    def test_the_second_segmentor_encodes_nothing(self, folder, encoded):
        picture = np.zeros((32, 32, 3), np.uint8)
        texts = []
        for _ in range(2):
            segmentor = fsa.load_segmentor(device="cpu")
            segmentor.segment(picture, NAMES, text_progress=lambda *at: texts.append(at))
        assert encoded == [80, 80, 80]
        assert texts[0] == (0, 240)
        assert texts[-1] == (240, 240)
        assert len(list(folder.iterdir())) == 3

    def test_nothing_is_kept_where_it_is_turned_off(self, folder, encoded):
        for _ in range(2):
            fsa.load_segmentor(device="cpu", cache_text=False).encode(NAMES)
        assert encoded == [80] * 6
        assert not folder.exists()

    @pytest.mark.parametrize("keep", [True, False])
    def test_the_command(self, run, folder, encoded, keep, tmp_path):
        from PIL import Image

        Image.new("RGB", (40, 32), "green").save(tmp_path / "a.png")
        option = [] if keep else ["--no-cache"]
        out = ["--device", "cpu", "--out", tmp_path / "out"]
        for _ in range(2):
            code, _, _ = run("segment", tmp_path / "a.png", "--classes", "cat; dog", *out, *option)
            assert code == 0
        assert encoded == ([80, 80] if keep else [80] * 4)
        assert folder.exists() == keep
