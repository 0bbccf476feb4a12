"""Numbers as users pass them."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from fsa import FSAConfig, InputError
from fsa.arguments import as_float, as_integer, finite_number, integer_within, number_within


@pytest.mark.parametrize("value", [np.float32(3), np.float64(3), np.int64(3), Fraction(3), 3])
def test_numbers_of_any_kind_are_kept_as_pythons(value):
    config = FSAConfig(beta=value, logit_scale=value)
    assert (type(config.beta), config.beta) == (float, 3.0)
    assert json.loads(json.dumps(config.to_dict()))["beta"] == 3.0
    assert config == FSAConfig(beta=3.0, logit_scale=3.0)


@pytest.mark.parametrize("value", [True, "3", None, 3j, math.nan, math.inf, 10**400, [3]])
def test_what_is_no_finite_number_is_none(value):
    assert as_float(value) is None


@pytest.mark.parametrize("value", [True, "3", 3.0, np.float32(3), None])
def test_what_is_no_integer_is_none(value):
    assert as_integer(value) is None


def test_integers_of_numpy_are_integers():
    assert type(FSAConfig(iterations=np.int64(2)).iterations) is int
    assert integer_within("window", np.int32(5), 1, 5) == 5
    assert number_within("p", np.float32(0.5), 0, 1) == 0.5


@pytest.mark.parametrize("value", [0, 6, "5", True])
def test_numbers_out_of_range_are_refused_by_name(value):
    with pytest.raises(InputError, match=r"window=.* must be an integer from 1 to 5"):
        integer_within("window", value, 1, 5)
    with pytest.raises(InputError, match=r"p=.* must be a number from 0\.5 to 1"):
        number_within("p", 0 if value is True else value, 0.5, 1)


def test_bounds_of_finite_numbers_are_said():
    assert finite_number("x", -3) == -3.0
    assert finite_number("x", 0, least=0) == 0.0
    with pytest.raises(InputError, match=r"x=nan is not accepted: it must be a finite number$"):
        finite_number("x", math.nan)
    with pytest.raises(InputError, match=r"x=-1 is not accepted: it must be a finite number >= 0$"):
        finite_number("x", -1, least=0)
    with pytest.raises(InputError, match=r"x=0 is not accepted: it must be a finite number > 0$"):
        finite_number("x", 0, positive=True)


@pytest.mark.parametrize("beta", [-1e-6, -3, np.float32(-1)])
def test_a_negative_beta_is_refused_with_the_reason(beta):
    with pytest.raises(InputError, match="below 0, the less similar a patch is"):
        FSAConfig(beta=beta)
    assert FSAConfig(beta=0).beta == 0
