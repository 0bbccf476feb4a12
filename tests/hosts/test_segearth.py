"""SegEarth-OV against what its published code computes, and with feedback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import fsa
from fsa import FSAConfig, InputError, hosts, tiny
from fsa.models.timm_tower import TimmTower
from fsa.pictures.reading import read_image
from tests.support.accuracy import relative_error
from tests.support.published_hosts import published_segearth
from tests.support.timm_models import random_timm_model
from tests.support.towers import random_inputs, random_tower

CONFIG = FSAConfig()


def test_the_published_patches_and_logits_come_out():
    visual, images, text, results = published_segearth()
    patches = hosts.build("segearth", visual, class_weight=0).features(images, text)
    assert relative_error(patches, results["tokens"]) < 1e-12
    host = hosts.build("segearth", visual)
    assert host.compared_as_they_are
    assert relative_error(host.features(images, text) @ text.T, results["logits"]) < 1e-12


def by_definition(host, images):
    """A of the heads (B,H,L,L) and V, from the definition."""
    tokens = host.tower.trunk(images)
    projected = host.tower.project(tokens, "qkv")
    width = projected["q"].shape[-1]
    return sum(
        (x @ x.transpose(2, 3) / width**0.5).softmax(dim=-1) for x in projected.values()
    ), projected["v"]


def test_the_class_token_is_a_key_and_rows_sum_to_3():
    images, text, _ = random_inputs(dtype=torch.float64)
    host = hosts.build("segearth", random_tower().double(), class_weight=0)
    matrix, value = by_definition(host, images)
    heads = (matrix @ value)[:, :, 1:]
    expected = host.tower.embed(host.tower.attention_branch(heads))
    assert torch.allclose(matrix.sum(dim=-1), torch.tensor(3.0).double())
    assert relative_error(host.features(images, text), expected) < 1e-12


@pytest.mark.parametrize("residual", [False, True])
def test_feedback_is_of_the_patches_and_the_class_token_stays(residual):
    images, text, _ = random_inputs(dtype=torch.float64)
    visual = random_tower().double()
    host, without = (
        hosts.build("segearth", visual, class_weight=weight, residual=residual)
        for weight in (0.3, 0)
    )
    plain, adapted = (host.features(images, text, config=config) for config in (None, CONFIG))
    patches, adapted_patches = (
        functional.normalize(without.features(images, text, config=config), dim=-1)
        for config in (None, CONFIG)
    )
    # What is subtracted is one vector of length 0.3 per image, the same with feedback.
    subtracted = patches - plain
    assert torch.allclose(subtracted, subtracted[:, :1].expand_as(subtracted))
    assert torch.allclose(subtracted.norm(dim=-1), torch.tensor(0.3).double())
    assert torch.allclose(adapted_patches - adapted, subtracted)
    assert relative_error(adapted_patches, patches) > 1e-3


def test_the_segmentor_takes_the_logits_as_they_are():
    scene = tiny.demo_scenes()[0]
    segmentor = fsa.load_segmentor(host="segearth", feedback=False)
    queries = segmentor.encode(scene.classes)
    picture = read_image(scene.picture).rgb[None, :, :112, :112]
    window = segmentor.normalise(picture / 255)
    cosines = segmentor.forward(window, queries.features)
    features = segmentor.host.features(window, queries.features)
    assert torch.allclose(cosines.flatten(2), (features @ queries.features.T).transpose(1, 2))
    result = segmentor.with_feedback(True).segment(scene.picture, scene.classes)
    assert len(np.unique(result.labels)) > 1


def test_towers_without_a_class_token():
    siglip = random_timm_model("siglip")
    registers = random_timm_model("registers")
    assert TimmTower(registers).prefix_tokens == 1
    for visual in (siglip, registers):
        assert hosts.build("segearth", visual).class_weight == 0
        with pytest.raises(InputError, match="needs a class token"):
            hosts.build("segearth", visual, class_weight=0.3)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), True, "0.3"])
def test_weights_that_are_not_accepted(weight):
    with pytest.raises(InputError, match=r"class_weight=.* is not accepted"):
        hosts.build("segearth", random_tower(), class_weight=weight)
