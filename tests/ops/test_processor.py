"""Which products the CPU at hand takes, with what it is asked for replaced."""

from __future__ import annotations

import platform

import pytest
import torch

import fsa
from fsa.ops import processor, torch_backend
from tests.support.accuracy import RELATIVE_ERROR, relative_error

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: avx512f\n"
INTEL = AMD.replace("AuthenticAMD", "GenuineIntel")
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\n"


@pytest.fixture(autouse=True)
def forgotten():
    """What was found out of the real processor does not reach a test, nor the other way round."""
    questions = (processor.bfloat16_units, processor.float32_by_onednn)
    for question in questions:
        question.cache_clear()
    yield
    for question in questions:
        question.cache_clear()


def has(monkeypatch, amx, avx512_bf16, onednn=True):
    answers = {"_is_amx_tile_supported": amx, "_is_avx512_bf16_supported": avx512_bf16}
    for name, answer in answers.items():
        if answer is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "units"),
    [
        (True, True, ("AMX", "AVX512-BF16")),
        (False, True, ("AVX512-BF16",)),
        (None, True, ("AVX512-BF16",)),
        (False, False, ()),
        (None, None, ()),
    ],
)
def test_the_units_that_pytorch_finds(monkeypatch, amx, avx512_bf16, units):
    has(monkeypatch, amx, avx512_bf16)
    assert processor.bfloat16_units() == units


def test_units_that_nothing_uses_do_not_count(monkeypatch):
    has(monkeypatch, True, True, onednn=False)
    assert processor.bfloat16_units() == ()
    assert not processor.float32_by_onednn()


@pytest.mark.parametrize(
    ("listed", "mkl", "by_onednn"),
    [
        (AMD, True, True),
        (INTEL, True, False),
        (INTEL, False, True),
        (ARM, False, True),
    ],
)
def test_intels_processors_take_intels_library(monkeypatch, tmp_path, listed, mkl, by_onednn):
    has(monkeypatch, False, False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(processor, "_CPU_LIST", tmp_path / "cpuinfo")
    processor._CPU_LIST.write_text(listed)
    assert processor.float32_by_onednn() == by_onednn


@pytest.mark.parametrize(
    ("name", "by_onednn"),
    [
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", False),
        ("AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", True),
        ("", True),
    ],
)
def test_without_a_list_of_processors_their_name_tells(monkeypatch, tmp_path, name, by_onednn):
    has(monkeypatch, False, False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(processor, "_CPU_LIST", tmp_path / "missing")
    monkeypatch.setattr(platform, "processor", lambda: name)
    assert processor.float32_by_onednn() == by_onednn


def products(N=300, columns=40):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, N, N, generator=generator).softmax(dim=-1)
    return weights, torch.randn(2, N, columns, generator=generator)


@pytest.mark.parametrize("by_onednn", [True, False])
def test_float32_products_go_where_they_are_fast(monkeypatch, by_onednn):
    calls = []
    product = torch_backend._onednn_product
    monkeypatch.setattr(torch_backend, "float32_by_onednn", lambda: by_onednn)
    monkeypatch.setattr(
        torch_backend, "_onednn_product", lambda *sides: calls.append(1) or product(*sides)
    )
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    weights, columns = products()
    result = torch_backend.rows_times(weights, columns)
    assert len(calls) == (2 if by_onednn else 0)
    assert relative_error(result, weights.double() @ columns.double()) < 1e-6


@pytest.mark.parametrize("units", [(), ("AVX512-BF16",)])
def test_bfloat16_products_use_the_units_where_there_are_some(monkeypatch, units):
    monkeypatch.setattr(torch_backend, "bfloat16_units", lambda: units)
    weights, columns = (x.bfloat16() for x in products())
    result = torch_backend.rows_times(weights, columns)
    exact = weights.double() @ columns.double()
    # The units round the result to bfloat16, the widened product does not.
    assert result.dtype == (torch.bfloat16 if units else torch.float32)
    assert relative_error(result, exact) < (RELATIVE_ERROR[torch.bfloat16] if units else 1e-6)
    # Operands of two types are not made bfloat16, which would round the wider one.
    mixed = torch_backend.rows_times(weights, columns.float() / 3)
    assert mixed.dtype == torch.float32
    assert relative_error(mixed, weights.double() @ (columns.float() / 3).double()) < 1e-6


@pytest.mark.parametrize("stream", [True, False])
def test_a_step_in_bfloat16_is_as_exact_with_the_units(monkeypatch, stream):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 3, 60, 8, generator=generator).bfloat16()
    logits = 3 * torch.randn(1, 60, 7, generator=generator)
    weights = torch.randn(60, 60, generator=generator).softmax(dim=-1)
    attended = (weights @ value.float()).bfloat16()

    def step(value, attended):
        matrix = weights.to(value.dtype)
        return fsa.feedback_step(
            value, logits, None, lambda x: matrix @ x, attended=attended, stream=stream
        )

    exact = step(value.double(), attended.double())
    for units in ((), ("AVX512-BF16",)):
        monkeypatch.setattr(torch_backend, "bfloat16_units", lambda units=units: units)
        result = step(value, attended)
        assert result.dtype == torch.bfloat16
        assert relative_error(result, exact) < RELATIVE_ERROR[torch.bfloat16]
