"""The PyTorch path against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch

import fsa
from fsa import FSAConfig, reference
from fsa.ops import torch_backend
from tests.support.accuracy import (
    OP_VECTORS,
    RELATIVE_ERROR,
    relative_error,
    segment_logits,
    unexplained_decisions,
    vector,
)
from tests.support.forms import FORMS, form_id

SIZES = [1, 2, 3, 63, 64, 65, 196]
CLASSES = [1, 2, 21, 171]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OP_VECTORS)
def test_the_published_vectors_come_out(name, dtype):
    data = vector(name)
    config = FSAConfig(beta=float(data["beta"]), confidence=float(data["confidence"]))
    logits, uniform, value, attention = (
        data[key].to(dtype) for key in ("patch_logits", "uniform_logits", "value", "attention")
    )
    feedback = fsa.feedback_attention(logits, uniform, config=config)
    # One vector (C = 2, beta = 4.5) amplifies rounding most: no worse than twice the definition
    # computed in the same type.
    plain = reference.feedback_attention(logits, uniform, config)
    allowed = max(RELATIVE_ERROR[dtype], 2 * relative_error(plain, data["feedback_attention"]))
    assert relative_error(feedback, data["feedback_attention"]) < allowed
    assert unexplained_decisions(feedback > 0, 1 / (1 + data["kl"]), config) == 0
    adapted = fsa.adapt(value, feedback, attention, config=config).transpose(1, 2).flatten(2)
    assert relative_error(adapted, data["adapted_value"]) < allowed


@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("N", SIZES)
def test_every_size_agrees_with_the_definition(N, C):
    logits, uniform = segment_logits(N, C, B=2)
    feedback = fsa.feedback_attention(logits.float(), uniform.float())
    exact = reference.feedback_attention(logits.float().double(), uniform.float().double())
    assert relative_error(feedback, exact) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_every_form_agrees_with_the_definition(config):
    logits, uniform = segment_logits(40, 9, B=2)
    feedback = fsa.feedback_attention(logits, uniform, config=config)
    exact = reference.feedback_attention(logits, uniform, config)
    assert relative_error(feedback, exact) < RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_ties_are_kept_lowest_index_first(config):
    # Five patches, each many times over: ties to the bit, which cross every threshold.
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randn(2, 5, 3, generator=generator)
    logits = distinct[:, torch.randint(5, (60,), generator=generator)].double()
    exact = reference.feedback_attention(logits, None, config)
    for dtype in (torch.float64, torch.float32):
        feedback = fsa.feedback_attention(logits.to(dtype), config=config)
        assert relative_error(feedback, exact) < RELATIVE_ERROR[dtype]
        assert torch.equal(feedback > 0, exact > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_computed_in_float32_or_better(dtype):
    logits, uniform = (tensor.to(dtype) for tensor in segment_logits(144, 21))
    feedback = fsa.feedback_attention(logits, uniform)
    exact = reference.feedback_attention(logits.double(), uniform.double())
    assert feedback.dtype == dtype
    assert relative_error(feedback, exact) < RELATIVE_ERROR[dtype]


def test_pruning_decisions_differ_only_within_rounding():
    logits, uniform = segment_logits(441, 60)
    logits, uniform = logits.float(), uniform.float()
    probabilities = reference.isolated_probabilities(logits.double(), uniform.double())
    similarities = reference.similarity(probabilities, FSAConfig())
    kept = fsa.feedback_attention(logits, uniform) > 0
    assert unexplained_decisions(kept, similarities, FSAConfig()) == 0
    # The judge does see a wrong decision.
    kept[0, 3, kept[0, 3].nonzero()[0]] = False
    assert unexplained_decisions(kept, similarities, FSAConfig()) == 1


@pytest.mark.parametrize("shape", ["(B,1,C)", "(B,N,C)"])
def test_uniform_logits_may_differ_from_patch_to_patch(shape):
    logits, uniform = segment_logits(50, 7, B=2)
    if shape == "(B,N,C)":
        uniform = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(2)).double()
    feedback = fsa.feedback_attention(logits, uniform)
    exact = reference.feedback_attention(logits, uniform)
    assert relative_error(feedback, exact) < RELATIVE_ERROR[torch.float64]


def test_transposed_and_sliced_inputs_are_taken_as_they_are():
    logits, uniform = segment_logits(50, 8, B=4)
    straight = fsa.feedback_attention(logits[::2, ::2, ::2].clone(), uniform[::2, :, ::2].clone())
    sliced = fsa.feedback_attention(logits[::2, ::2, ::2], uniform[::2, :, ::2])
    transposed = logits.transpose(1, 2).contiguous().transpose(1, 2)[::2, ::2, ::2]
    assert torch.equal(straight, sliced)
    assert torch.equal(straight, fsa.feedback_attention(transposed, uniform[::2, :, ::2]))


def test_all_equal_rows_attend_by_index():
    feedback = fsa.feedback_attention(torch.zeros(1, 10, 3))
    # Equal confidences of 0.1: four fit under 0.45, the lowest indices.
    expected = torch.tensor([0.25] * 4 + [0.0] * 6).expand(1, 10, 10)
    torch.testing.assert_close(feedback, expected)


def test_one_hot_and_enormous_logits_stay_finite():
    logits = torch.full((1, 12, 5), -60000.0)
    logits[0, torch.arange(12), torch.arange(12) % 5] = 60000.0
    for dtype in (torch.float32, torch.float16):
        feedback = fsa.feedback_attention(logits.to(dtype))
        exact = reference.feedback_attention(logits.double())
        assert relative_error(feedback, exact) < RELATIVE_ERROR[dtype]


def test_a_row_of_nan_gives_a_row_of_nan_and_touches_no_other():
    logits, _ = segment_logits(30, 5)
    broken = logits.clone()
    broken[0, 7, 2] = float("nan")
    options = {
        "beta": 3.0,
        "confidence": 0.45,
        "ratio": 0.4,
        "threshold": 0.5,
        "similarity": "kl",
        "scaling": True,
        "dtype": torch.float64,
    }
    others = torch.arange(30) != 7
    for pruning in ("confidence", "ratio", "threshold", None):
        # The boundary refuses NaN on the CPU; this is the rule that holds on a GPU.
        feedback = torch_backend.feedback_attention(broken, None, pruning=pruning, **options)
        assert feedback[0, 7].isnan().all()
        assert (feedback[0, others, 7] == 0).all()
    without = fsa.feedback_attention(logits[:, others])
    feedback = torch_backend.feedback_attention(broken, None, pruning="confidence", **options)
    assert relative_error(feedback[0][others][:, others], without[0]) < 1e-12


def test_blocks_of_rows_and_of_images_change_nothing(monkeypatch):
    logits, uniform = segment_logits(64, 9, B=5)
    whole = fsa.feedback_attention(logits, uniform)
    attended = fsa.proxy_attention(logits, logits)
    for entries in (64, 64 * 7, 64 * 64 * 2):
        monkeypatch.setattr(torch_backend, "_BLOCK_ENTRIES_CPU", entries)
        assert relative_error(fsa.feedback_attention(logits, uniform), whole) < 1e-12
        assert relative_error(fsa.proxy_attention(logits, logits), attended) < 1e-12


ADAPTATIONS = [
    subset
    for count in (1, 2, 3)
    for subset in itertools.combinations(("after", "before", "only"), count)
]


@pytest.mark.parametrize("adaptations", ADAPTATIONS, ids="+".join)
@pytest.mark.parametrize("layout", ["shared", "per head", "callable"])
@pytest.mark.parametrize("attended", [True, False], ids=["attended", "not attended"])
def test_adapt_agrees_with_the_definition(adaptations, layout, attended):
    generator = torch.Generator().manual_seed(0)
    B, H, N, d = 2, 3, 20, 5
    value = torch.randn(B, N, H, d, generator=generator, dtype=torch.float64).transpose(1, 2)
    feedback = torch.rand(B, N, N, generator=generator, dtype=torch.float64).softmax(dim=-1)
    shape = (B, H, N, N) if layout == "per head" else (B, N, N)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(dim=-1)
    per_head = matrix if matrix.ndim == 4 else matrix[:, None]
    config = FSAConfig(adaptations=adaptations)
    adapted = fsa.adapt(
        value,
        feedback,
        (lambda x: per_head @ x) if layout == "callable" else matrix,
        attended=per_head @ value if attended else None,
        config=config,
    )
    exact = reference.adapt(value, feedback, matrix, config)
    assert relative_error(adapted, exact) < RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["shared", "per head", "callable"])
def test_adapt_is_as_good_as_its_type_allows(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 2, 300, 8, generator=generator).to(dtype)
    feedback = torch.randn(1, 300, 300, generator=generator).softmax(dim=-1).to(dtype)
    shape = (1, 2, 300, 300) if layout == "per head" else (1, 300, 300)
    matrix = torch.randn(shape, generator=generator).softmax(dim=-1).to(dtype)
    attention = (lambda x: matrix[:, None] @ x) if layout == "callable" else matrix
    adapted = fsa.adapt(value, feedback, attention)
    exact = reference.adapt(value.double(), feedback.double(), matrix.double())
    assert adapted.dtype == dtype
    assert relative_error(adapted, exact) < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("N", [255, 256, 441])
@pytest.mark.parametrize("inference", [True, False])
def test_large_products_agree_with_the_definition(N, inference):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 2, N, 8, generator=generator)
    feedback = torch.randn(2, N, N, generator=generator).softmax(dim=-1)
    attention = torch.randn(2, N, N, generator=generator).softmax(dim=-1)
    with torch.inference_mode(inference):
        adapted = fsa.adapt(value, feedback, attention)
    exact = reference.adapt(value.double(), feedback.double(), attention.double())
    assert relative_error(adapted, exact) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 2, 65, 196])
def test_proxy_attention_agrees_with_the_definition(N, dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, N, 16, generator=generator).to(dtype)
    value = torch.randn(2, N, 24, generator=generator).to(dtype)
    attended = fsa.proxy_attention(features, value)
    exact = reference.proxy_attention(features.double(), value.double())
    assert attended.dtype == dtype
    assert relative_error(attended, exact) < RELATIVE_ERROR[dtype]


def test_every_image_stands_alone():
    logits, uniform = segment_logits(40, 6, B=3)
    together = fsa.feedback_attention(logits, uniform)
    features = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0)).double()
    attended = fsa.proxy_attention(features, logits)
    for b in range(3):
        one = slice(b, b + 1)
        alone = fsa.feedback_attention(logits[one], uniform[one])
        assert relative_error(together[one], alone) < 1e-12
        alone = fsa.proxy_attention(features[one], logits[one])
        assert relative_error(attended[one], alone) < 1e-12


def test_the_same_input_gives_the_same_bits():
    logits, uniform = (tensor.float() for tensor in segment_logits(196, 21, B=2))
    first = fsa.feedback_attention(logits, uniform)
    assert all(torch.equal(first, fsa.feedback_attention(logits, uniform)) for _ in range(3))
