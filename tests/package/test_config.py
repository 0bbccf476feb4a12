from __future__ import annotations

import json
import math

import pytest

import fsa
from fsa import FSAConfig, InputError


def test_the_defaults_are_the_published_constants():
    config = FSAConfig()
    assert (config.beta, config.confidence) == (3.0, 0.45)
    assert (config.logit_scale, config.uniform_logit_scale) == (20.0, 35.0)
    assert config.adaptations == ("after", "before", "only")


@pytest.mark.parametrize("vfm", ["dino", "dinov2", "sam", None])
@pytest.mark.parametrize(
    ("model", "beta"), [("ViT-B-16", 3.0), ("ViT-L-14", 3.0), ("ViT-H-14", 2.3), ("tiny", 3.0)]
)
def test_presets_carry_the_published_beta(vfm, model, beta):
    assert FSAConfig.preset(vfm=vfm, model=model).beta == beta
    assert FSAConfig.preset(vfm="mae", model=model).beta == 4.5


def test_a_preset_takes_overrides():
    config = FSAConfig.preset(vfm="mae", model="ViT-B-16", beta=1.5, pruning=None)
    assert (config.beta, config.pruning) == (1.5, None)


def test_a_configuration_is_frozen_hashable_and_replaced():
    config = FSAConfig()
    with pytest.raises(AttributeError):
        config.beta = 2.0
    assert config.replace(beta=2.0) == FSAConfig(beta=2.0)
    assert len({config, FSAConfig()}) == 1


def test_a_configuration_is_plain_json():
    assert json.loads(json.dumps(FSAConfig().to_dict()))["confidence"] == 0.45


def test_a_list_of_adaptations_is_taken_as_a_tuple():
    assert FSAConfig(adaptations=["only"]).adaptations == ("only",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", math.inf),
        ("beta", math.nan),
        ("beta", "3"),
        ("confidence", 0.0),
        ("confidence", 1.01),
        ("confidence", math.nan),
        ("ratio", 0),
        ("ratio", 1.5),
        ("threshold", -0.1),
        ("threshold", 1.1),
        ("logit_scale", math.inf),
        ("uniform_logit_scale", None),
        ("similarity", "euclid"),
        ("pruning", "top-k"),
        ("precision", "sloppy"),
        ("scaling", 1),
        ("isolation", "yes"),
        ("adaptations", ()),
        ("adaptations", ("only", "only")),
        ("adaptations", ("sideways",)),
        ("iterations", 0),
        ("iterations", True),
        ("iterations", 1.0),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        FSAConfig(**{field: value})


def test_the_steepest_beta_is_said():
    with pytest.raises(InputError, match=r"beta=80\.1 is not accepted: it must be at most 80"):
        FSAConfig(beta=80.1)


def test_every_public_name_resolves():
    for name in fsa.__all__:
        assert getattr(fsa, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        fsa.nonsense  # noqa: B018
