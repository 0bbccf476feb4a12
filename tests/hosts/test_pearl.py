"""PEARL's attention against what its published code computes, and with feedback."""

from __future__ import annotations

import pytest
import torch

from fsa import FSAConfig, InputError, hosts
from fsa.hosts.pearl import orthogonal_factor
from tests.support.accuracy import relative_error
from tests.support.published_hosts import published_pearl
from tests.support.towers import random_inputs, random_tower

CONFIG = FSAConfig()


@pytest.mark.parametrize(
    ("options", "result"),
    [({}, "polar"), ({"steps": None}, "svd"), ({"key_weight": 0}, "without_keys")],
)
def test_the_published_patches_come_out(options, result):
    visual, images, text, results = published_pearl()
    features = hosts.build("pearl", visual, **options).features(images, text)
    assert relative_error(features, results[result]) < 1e-10
    others = [results[name] for name in results if name != result]
    assert all(relative_error(other, results[result]) > 1e-3 for other in others)


def test_the_rotation_is_the_nearest_one():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    exact = orthogonal_factor(matrix, None)
    identity = torch.eye(8, dtype=torch.float64).expand_as(matrix)
    assert torch.allclose(exact @ exact.mT, identity)
    # M = R S with S symmetric and positive: no rotation has a larger inner product with M.
    symmetric = exact.mT @ matrix
    assert torch.allclose(symmetric, symmetric.mT)
    assert (torch.linalg.eigvalsh(symmetric) > 0).all()
    errors = [relative_error(orthogonal_factor(matrix, steps), exact) for steps in (5, 10, 40)]
    assert errors[0] > errors[1] > errors[2]
    # What the published code adds to the squares bounds what more steps can reach.
    assert errors[2] < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [5, None])
def test_feedback_on_top(steps, dtype):
    images, text, _ = random_inputs(height=24, width=40, dtype=dtype)
    host = hosts.build("pearl", random_tower().to(dtype), steps=steps)
    plain = host.features(images, text)
    features = host.features(images, text, config=CONFIG)
    assert features.dtype == dtype
    assert features.isfinite().all()
    assert relative_error(features, plain) > 1e-3


def test_the_prefix_has_no_say_in_the_centres():
    visual = random_tower().double()
    host = hosts.build("pearl", visual)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 3, 10, 8, generator=generator, dtype=torch.float64)
    rest = slice(1, None)
    moved = query.clone()
    moved[:, :, 0] += 100
    host.key_weight = 1.0
    # The halves of the second are the rotated keys and the centred ones.
    _, keys = host._aligned(query, key, 1)
    _, moved_keys = host._aligned(moved, key, 1)
    assert torch.equal(keys[..., rest, 8:], moved_keys[..., rest, 8:])
    _, with_first = host._aligned(moved, key, 0)
    assert relative_error(with_first[..., rest, 8:], keys[..., rest, 8:]) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 is not accepted"),
        ({"steps": 2.0}, "steps=2.0 is not accepted"),
        ({"steps": True}, "steps=True is not accepted"),
        ({"key_weight": -1}, "key_weight=-1 is not accepted"),
        ({"key_weight": float("nan")}, "key_weight=nan is not accepted"),
    ],
)
def test_options_that_are_not_accepted(options, message):
    with pytest.raises(InputError, match=message):
        hosts.build("pearl", random_tower(), **options)
