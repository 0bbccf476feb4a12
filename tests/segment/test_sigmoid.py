"""The logit scales of models that were trained with a sigmoid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fsa
from fsa import FSAConfig, InputError
from fsa.config import logit_scale_factor
from fsa.segment.labels import class_probabilities

transformers = pytest.importorskip("transformers")

from tests.support.transformers_models import random_clip, random_siglip, tokenizer  # noqa: E402

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
SIZES = {"short_side": 32, "window": 32, "stride": 16}


@pytest.fixture(scope="module")
def processor():
    return transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer())


def siglip(temperature):
    model = random_siglip()
    model.logit_scale.fill_(math.log(temperature))
    return model


def test_the_scales_keep_their_shares_of_the_temperature(processor):
    segmentor = fsa.load_segmentor(model=siglip(112.0), processor=processor)
    assert segmentor.loaded.temperature == pytest.approx(112.0, rel=1e-6)
    assert segmentor.config.logit_scale == pytest.approx(22.4, rel=1e-6)
    assert segmentor.config.uniform_logit_scale == pytest.approx(39.2, rel=1e-6)
    assert segmentor.logit_scale == pytest.approx(44.8, rel=1e-6)
    assert segmentor.with_host("kk").logit_scale == segmentor.logit_scale


def test_a_model_trained_with_a_softmax_keeps_the_published_scales(processor):
    model = random_clip()
    model.logit_scale.fill_(math.log(112.0))
    segmentor = fsa.load_segmentor(model=model, processor=processor)
    assert segmentor.loaded.temperature is None
    assert segmentor.config == FSAConfig()
    assert segmentor.logit_scale == 40.0
    assert fsa.load_segmentor().loaded.temperature is None


def test_labels_and_scores_are_made_with_the_scale(processor):
    segmentor = fsa.load_segmentor(model=siglip(25.0), processor=processor, feedback=False)
    result = segmentor.segment(PICTURE, ["cat", "grass"], **SIZES)
    segmentor.logit_scale = 40.0
    sharper = segmentor.segment(PICTURE, ["cat", "grass"], **SIZES)
    first, second = (torch.from_numpy(x.scores).double() for x in (result, sharper))
    # Of two classes the odds are the difference of the logits.
    logits = (second / (1 - second)).log() * 10 / 40
    np.testing.assert_allclose(first, logits.sigmoid(), atol=1e-4)
    assert float((first - second).abs().max()) > 1e-3
    # A threshold of probability then asks for a larger difference of cosines.
    queries = segmentor.encode(["cat", "grass"])
    cosines = torch.tensor([[[0.1]], [[0.0]]])
    assert class_probabilities(cosines, queries, 10.0)[0] < 0.75
    assert class_probabilities(cosines, queries)[0] > 0.95


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_not_accepted(temperature):
    with pytest.raises(InputError, match=r"temperature=.* must be finite and positive"):
        logit_scale_factor(temperature)


def test_a_field_that_is_given_is_not_scaled():
    config = FSAConfig.preset(temperature=50.0, logit_scale=7.0)
    assert (config.logit_scale, config.uniform_logit_scale) == (7.0, 17.5)
