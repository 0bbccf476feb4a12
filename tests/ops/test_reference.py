"""The definition against the outputs of the published implementation."""

from __future__ import annotations

import pytest
import torch

from fsa import reference
from fsa.config import FSAConfig
from tests.support.accuracy import OP_VECTORS, vector

# What the issue of record asks of the definition in float64.
PUBLISHED = 1e-9


@pytest.fixture(params=OP_VECTORS)
def published(request):
    data = vector(request.param)
    return data, FSAConfig(beta=float(data["beta"]), confidence=float(data["confidence"]))


def test_divergence_is_the_published_one(published):
    data, _ = published
    probabilities = reference.isolated_probabilities(data["patch_logits"], data["uniform_logits"])
    torch.testing.assert_close(
        reference.divergence(probabilities), data["kl"], rtol=0, atol=PUBLISHED
    )


def test_kept_patches_are_the_published_ones(published):
    data, config = published
    assert torch.equal(reference.kept_patches(1 / (1 + data["kl"]), config), data["kept"])


def test_feedback_attention_is_the_published_one(published):
    data, config = published
    feedback = reference.feedback_attention(data["patch_logits"], data["uniform_logits"], config)
    torch.testing.assert_close(feedback, data["feedback_attention"], rtol=0, atol=PUBLISHED)


def test_adapted_values_are_the_published_ones(published):
    data, config = published
    adapted = reference.adapt(data["value"], data["feedback_attention"], data["attention"], config)
    side_by_side = adapted.transpose(1, 2).flatten(2)
    torch.testing.assert_close(side_by_side, data["adapted_value"], rtol=0, atol=PUBLISHED)


def test_equal_similarities_are_kept_lowest_index_first():
    similarities = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.5]])
    kept = reference.kept_patches(similarities, FSAConfig(pruning="ratio", ratio=0.6))
    assert kept.tolist() == [[True, True, True, False, False]]


def test_the_first_of_the_order_is_always_kept():
    similarities = torch.tensor([[0.2, 0.3, 0.25]])
    for config in (
        FSAConfig(confidence=1e-6),
        FSAConfig(pruning="ratio", ratio=1e-6),
        FSAConfig(pruning="threshold", threshold=1.0),
    ):
        assert reference.kept_patches(similarities, config).tolist() == [[False, True, False]]


def test_without_pruning_or_at_full_confidence_all_is_kept():
    similarities = torch.rand(1, 50, 50, generator=torch.Generator().manual_seed(0))
    for config in (FSAConfig(pruning=None), FSAConfig(confidence=1.0)):
        assert reference.kept_patches(similarities, config).all()


def test_a_fixed_ratio_keeps_its_floor():
    similarities = torch.rand(1, 10, 10, generator=torch.Generator().manual_seed(0))
    kept = reference.kept_patches(similarities, FSAConfig(pruning="ratio", ratio=0.29))
    assert (kept.sum(dim=-1) == 2).all()


def test_without_isolation_uniform_logits_do_not_matter():
    logits, uniform = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    config = FSAConfig(isolation=False)
    with_uniform = reference.feedback_attention(logits, uniform[:, :1], config)
    assert torch.equal(with_uniform, reference.feedback_attention(logits, None, config))


def test_a_proxy_patch_with_nothing_above_the_threshold_attends_to_itself():
    # Equal features: every affinity is 1, and 1 - 1.2 * 1 is negative everywhere.
    weights = reference.proxy_weights(torch.ones(1, 4, 3))
    assert torch.equal(weights, torch.eye(4)[None])
