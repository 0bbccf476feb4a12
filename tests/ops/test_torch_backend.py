"""The PyTorch path's blocks of rows, and `adapt`, whose products are PyTorch's on every device.

What it shares with the kernels is in test_conformance.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fsa
from fsa import FSAConfig, reference
from fsa.ops import torch_backend
from tests.support.accuracy import RELATIVE_ERROR, relative_error, segment_logits


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


@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "BLAS"])
@pytest.mark.parametrize("N", [255, 256, 300, 441])
def test_similarities_of_either_library_agree_with_the_definition(N, onednn, monkeypatch):
    monkeypatch.setattr(torch_backend, "float32_by_onednn", lambda: onednn)
    logits, uniform = segment_logits(N, 21, B=2)
    found = fsa.feedback_attention(logits.float(), uniform.float())
    exact = reference.feedback_attention(logits.float().double(), uniform.float().double())
    # Decisions that rounding made are judged in test_conformance.
    same = ((found > 0) == (exact > 0)).all(dim=-1)
    assert same.float().mean() > 0.99
    assert relative_error(found[same], exact[same]) < RELATIVE_ERROR[torch.float32]
    for image in range(2):
        of_one = slice(image, image + 1)
        alone = fsa.feedback_attention(logits[of_one].float(), uniform[of_one].float())
        assert torch.equal(alone, found[of_one])


@pytest.mark.parametrize("adaptations", ADAPTATIONS, ids="+".join)
def test_what_an_attention_returns_is_not_written_into(adaptations):
    generator = torch.Generator().manual_seed(0)
    value, kept, attended = torch.randn(3, 1, 2, 9, 4, generator=generator).unbind(0)
    feedback = torch.rand(1, 9, 9, generator=generator).softmax(dim=-1)
    copies = [x.clone() for x in (value, kept, attended, feedback)]
    config = FSAConfig(adaptations=adaptations)
    fsa.adapt(value, feedback, lambda _: kept, attended=attended, config=config)
    for now, before in zip((value, kept, attended, feedback), copies, strict=True):
        assert torch.equal(now, before)
