"""Inputs at the end of what is accepted, and one step beyond it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsa
import fsa_kernels
from fsa import FSAConfig, InputError, reference
from fsa.errors import OutOfMemoryError, named_out_of_memory
from fsa.ops import torch_backend
from tests.support.accuracy import (
    CERTAIN_RELATIVE_ERROR,
    RELATIVE_ERROR,
    relative_error,
    segment_logits,
)
from tests.support.forms import FORMS, form_id
from tests.support.offsets import compiles_ahead_of_time, narrow_products

ON_GPU = torch.cuda.is_available() and fsa_kernels.available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ["torch", *(["triton"] if fsa_kernels.available() else [])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROOT = Path(__file__).parents[2]


def attention_of(backend, logits, config=None):
    device = DEVICE if backend == "triton" else "cpu"
    return fsa.feedback_attention(logits.to(device), config=config, backend=backend).cpu()


def assert_agrees(backend, logits, config=None):
    feedback = attention_of(backend, logits, config)
    exact = reference.feedback_attention(logits.double(), None, config)
    assert relative_error(feedback, exact) < RELATIVE_ERROR[logits.dtype]
    return feedback


# --------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("config", FORMS[::2], ids=form_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_patch_attends_to_itself(backend, dtype, config):
    for C in (1, 3):
        logits = torch.full((2, 1, C), 7.0, dtype=dtype)
        feedback = attention_of(backend, logits, config)
        assert torch.equal(feedback, torch.ones(2, 1, 1, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class_makes_all_patches_equal(backend):
    logits = torch.randn(1, 10, 1, generator=torch.Generator().manual_seed(0))
    # Equal confidences of 0.1: four fit under 0.45, the lowest indices.
    expected = torch.tensor([0.25] * 4 + [0.0] * 6).expand(1, 10, 10)
    torch.testing.assert_close(attention_of(backend, logits), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_thousand_classes(backend):
    N = 64 if ON_GPU or backend == "torch" else 3
    logits = segment_logits(N, 10_000)[0].float()
    assert_agrees(backend, logits)


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("gap", [6, 10, 14, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_predictions(backend, gap):
    generator = torch.Generator().manual_seed(gap)
    logits = torch.randn(1, 60, 20, generator=generator)
    logits[0, torch.arange(60), torch.randint(20, (60,), generator=generator)] += gap
    exact = reference.feedback_attention(logits.double())
    error = relative_error(attention_of(backend, logits), exact)
    assert error < (RELATIVE_ERROR[torch.float32] if gap < 8 else CERTAIN_RELATIVE_ERROR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -60_000.0, 60_000.0, 1e-7, 6e-8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_logits_are_uniform_whatever_the_constant(backend, value, dtype):
    logits = torch.full((1, 5, 4), value, dtype=dtype)
    # Equal confidences of 0.2: two fit under 0.45.
    expected = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=dtype).expand(1, 5, 5)
    assert torch.equal(attention_of(backend, logits), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_logits_at_the_end_of_half_precision(backend, dtype):
    logits = torch.full((1, 6, 3), -60_000.0, dtype=dtype)
    logits[0, torch.arange(6), torch.arange(6) % 3] = 60_000.0
    feedback = assert_agrees(backend, logits)
    # Confidences: e, e, and four times e^(1/24): two of a kind make up 0.56, so one is kept.
    assert torch.equal(feedback[0] > 0, torch.arange(6) == (torch.arange(6) % 3)[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_denormals_count_as_what_they_are(backend):
    equal = attention_of(backend, torch.zeros(1, 6, 3))
    logits = segment_logits(6, 3)[0].float()
    denormal = logits * torch.finfo(torch.float32).smallest_normal / 64
    half = (logits * 2**-20).half()
    assert (denormal != 0).any()
    assert (half != 0).any()
    # Differences that small are lost in exp(), as they are among ordinary numbers.
    torch.testing.assert_close(attention_of(backend, denormal), equal)
    # These are within float32's rounding of 1: which two of six are kept is rounding, too.
    feedback = attention_of(backend, half)
    assert (feedback.count_nonzero(dim=-1) == 2).all()
    torch.testing.assert_close(feedback[feedback > 0], torch.full((12,), 0.5).half())


@pytest.mark.parametrize("beta", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_steepest_scaling_stays_finite(backend, beta):
    logits = segment_logits(6, 4)[0].float()
    feedback = attention_of(backend, logits, FSAConfig(beta=beta))
    assert feedback.isfinite().all()
    assert (feedback.sum(dim=-1) - 1).abs().max() < 1e-5
    with pytest.raises(InputError, match=r"beta=80\.1 is not accepted: it must be at most 80"):
        FSAConfig(beta=80.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_refused_on_the_cpu_by_every_op(backend, value):
    if backend == "triton" and ON_GPU:
        pytest.skip("on a GPU looking would synchronise; there the rule of the kernels holds")

    def spoilt(*shape):
        tensor = torch.rand(shape)
        tensor.view(-1)[-1] = value
        return tensor

    good, square, heads = torch.rand(2, 4, 3), torch.rand(2, 4, 4), torch.rand(2, 1, 4, 3)
    calls = {
        "patch_logits": lambda: fsa.feedback_attention(spoilt(2, 4, 3), backend=backend),
        "uniform_logits": lambda: fsa.feedback_attention(good, spoilt(2, 1, 3), backend=backend),
        "features": lambda: fsa.proxy_attention(spoilt(2, 4, 3), good, backend=backend),
        "value": lambda: fsa.proxy_attention(good, spoilt(2, 4, 3), backend=backend),
        "feedback": lambda: fsa.adapt(heads, spoilt(2, 4, 4), square),
        "attention": lambda: fsa.adapt(heads, square, spoilt(2, 4, 4)),
        "attended": lambda: fsa.adapt(heads, square, square, attended=spoilt(2, 1, 4, 3)),
    }
    for name, call in calls.items():
        with pytest.raises(InputError, match=f"{name} holds NaN or inf"):
            call()
    for attention in (square, lambda x: x):
        with pytest.raises(InputError, match="value holds NaN or inf"):
            fsa.adapt(spoilt(2, 1, 4, 3), square, attention)


def test_finite_products_that_overflow_their_type_are_not_blamed_on_the_input():
    value = torch.full((1, 1, 2, 2), 60_000.0, dtype=torch.float16)
    twice = torch.full((1, 2, 2), 1.0, dtype=torch.float16)
    adapted = fsa.adapt(value, twice, twice, config=FSAConfig(adaptations=("only",)))
    assert adapted.isinf().all()


def published(config: FSAConfig) -> dict:
    names = ("beta", "confidence", "similarity", "pruning", "ratio", "threshold", "scaling")
    return {name: getattr(config, name) for name in names} | {"dtype": torch.float32}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", FORMS[::2], ids=form_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_row_is_nan_and_no_other_row_sees_it(backend, config, value):
    """What holds where nobody looks for NaN, on a GPU: asked of the backends themselves."""
    run = torch_backend if backend == "torch" else fsa_kernels
    N = 12 if ON_GPU or backend == "torch" else 5
    logits = segment_logits(N, 4, B=2)[0].float()
    broken = logits.clone()
    broken[0, 1, 2] = value
    device = DEVICE if backend == "triton" else "cpu"
    feedback = run.feedback_attention(broken.to(device), None, **published(config)).cpu()
    whole = run.feedback_attention(logits.to(device), None, **published(config)).cpu()
    assert torch.equal(feedback[1], whole[1]), "another image"
    assert feedback[0, 1].isnan().all()
    others = torch.arange(N) != 1
    assert (feedback[0, others, 1] == 0).all()
    assert feedback[0, others].isfinite().all()
    assert (feedback[0, others].sum(dim=-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_of_nothing_but_nan_leaves_the_others_alone(backend):
    run = torch_backend if backend == "torch" else fsa_kernels
    logits = segment_logits(5, 4, B=2)[0].float()
    broken = logits.clone()
    broken[0] = math.nan
    device = DEVICE if backend == "triton" else "cpu"
    feedback = run.feedback_attention(broken.to(device), None, **published(FSAConfig())).cpu()
    assert feedback[0].isnan().all()
    assert relative_error(feedback[1:], reference.feedback_attention(logits[1:].double())) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fully_masked_proxy_row_attends_to_itself(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 5, 3, generator=generator).to(dtype)
    device = DEVICE if backend == "triton" else "cpu"

    def attend(features):
        features = features.to(dtype)
        return fsa.proxy_attention(features.to(device), value.to(device), backend=backend).cpu()

    # All alike: 1 lies under 1.2 times the mean, for every pair.
    assert torch.equal(attend(torch.ones(2, 5, 4)), value)
    # One image of the two; and one row of an image, the outlier, has only itself above.
    mixed = torch.ones(2, 5, 4)
    mixed[1] = torch.randn(5, 4, generator=generator)
    attended = attend(mixed)
    assert torch.equal(attended[0], value[0])
    exact = reference.proxy_attention(mixed[1:].to(dtype).double(), value[1:].double())
    assert relative_error(attended[1:], exact) < 2 * RELATIVE_ERROR[dtype]
    # No direction at all: every cosine is 0, and so is the threshold.
    nothing = attend(torch.zeros(2, 5, 4))
    mean = value.double().mean(dim=1, keepdim=True).expand_as(nothing)
    torch.testing.assert_close(nothing.double(), mean, rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------------------------------------
# Offsets beyond 2^31

# Gigabytes of address space, of which a few pages are touched. In a process of its own: an offset
# that wraps around reads what is not its own, and ends it.
FAR_APART = """
import sys, torch, fsa
from fsa import reference
from tests.support.accuracy import relative_error

FAR = 2**30 + 16
STRIDES = {"B": (FAR, 3, 1), "N": (3, FAR, 1), "C": (9, 3, FAR)}
for axis in sys.argv[1:]:
    shape, stride = (3 if axis == "B" else 1, 3, 3), STRIDES[axis]
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(shape, generator=generator).half()
    memory = torch.empty(2 * FAR + 64, dtype=torch.float16)
    far = torch.as_strided(memory, shape, stride)
    far.copy_(torch.randn(shape, generator=generator))
    exact = reference.feedback_attention(far.double(), near.double())
    error = relative_error(fsa.feedback_attention(far, near, backend="triton"), exact)
    assert error < 1e-3, (axis, "patch_logits", error)
    exact = reference.feedback_attention(near.double(), far.double())
    error = relative_error(fsa.feedback_attention(near, far, backend="triton"), exact)
    assert error < 1e-3, (axis, "uniform_logits", error)
    for name, pair in {"features": (far, near), "value": (near, far)}.items():
        exact = reference.proxy_attention(*(tensor.double() for tensor in pair))
        error = relative_error(fsa.proxy_attention(*pair, backend="triton"), exact)
        assert error < 2e-3, (axis, name, error)
"""


@pytest.mark.skipif(
    not fsa_kernels.interpreting() or sys.maxsize < 2**32, reason="for Triton's interpreter"
)
@pytest.mark.parametrize("axes", ["BN", "C"])
def test_strides_whose_products_pass_two_to_the_31_are_followed(axes):
    result = subprocess.run(
        [sys.executable, "-c", FAR_APART, *axes], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(
    not compiles_ahead_of_time(), reason="compiling for a chip that is not there needs triton 3.3"
)
def test_no_kernel_multiplies_an_argument_into_an_offset_in_32_bits():
    # Not in this process: under the interpreter there is nothing to compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.offsets"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.parametrize(("width", "narrow"), [("i32", 1), ("i64", 0)])
def test_a_product_in_32_bits_is_seen_in_the_intermediate_code(width, narrow):
    code = f"""
      tt.func public @kernel(%x_ptr: !tt.ptr<f16> loc("x"), %stride: i32 loc("y")) {{
        %c = tt.make_range {{end = 32 : i32}} : tensor<32x{width}> loc(#loc1)
        %s = tt.splat %stride : {width} -> tensor<32x{width}> loc(#loc1)
        %p = arith.muli %c, %s : tensor<32x{width}> loc(#loc1)
        %o = arith.addi %p, %c : tensor<32x{width}> loc(#loc1)
        %a = tt.addptr %q, %o : tensor<32x!tt.ptr<f16>>, tensor<32x{width}> loc(#loc1)
    """
    assert len(narrow_products(code)) == narrow


# --------------------------------------------------------------------------------------------------
# Memory


def test_sizes_that_fit_nowhere_are_an_error_in_words_and_the_next_call_works():
    logits = torch.zeros(1, 2_000_000, 1)
    message = r"out of memory: feedback attention for an input of shape \(1, 2000000, 1\) on cpu"
    with pytest.raises(OutOfMemoryError, match=message) as caught:
        fsa.feedback_attention(logits)
    assert isinstance(caught.value, MemoryError)
    assert "fewer patches" in str(caught.value)
    assert fsa.feedback_attention(logits[:, :3]).shape == (1, 3, 3)


def test_a_picture_that_does_not_fit_names_what_to_lower(monkeypatch):
    segmentor = fsa.load_segmentor(device="cpu")
    picture = torch.zeros(3, 32, 32)
    options = {"short_side": 32, "window": 32, "stride": 32}
    features = segmentor.host.features

    def full(*_, **__):
        return torch.empty(1 << 60)

    monkeypatch.setattr(segmentor.host, "features", full)
    with pytest.raises(OutOfMemoryError, match="windows of 32 pixels, 8 at once, on cpu; lower"):
        segmentor.segment(picture, ["cat"], **options)
    monkeypatch.setattr(segmentor.host, "features", features)
    assert segmentor.segment(picture, ["cat"], **options).labels.shape == (32, 32)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="something else"), named_out_of_memory("x", "y"):
        raise RuntimeError("something else")
    with (
        pytest.raises(OutOfMemoryError, match="out of memory: x; y"),
        named_out_of_memory("x", "y"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_full_gpu_is_an_error_in_words_and_the_next_call_works():
    logits = torch.zeros(1, 600_000, 1, device="cuda")
    for backend in BACKENDS:
        with pytest.raises(OutOfMemoryError, match="out of memory: feedback attention"):
            fsa.feedback_attention(logits, backend=backend)
        assert fsa.feedback_attention(logits[:, :3], backend=backend).isfinite().all()
    assert torch.cuda.memory_allocated() < 1 << 30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_computes_for_itself():
    logits, uniform = (t.float() for t in segment_logits(100, 21))
    assert torch.cuda.current_device() == 0
    second = fsa.feedback_attention(logits.to("cuda:1"), uniform.to("cuda:1"), backend="triton")
    assert second.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    first = fsa.feedback_attention(logits.to("cuda:0"), uniform.to("cuda:0"), backend="triton")
    assert torch.equal(first.cpu(), second.cpu())
    with pytest.raises(InputError, match="device"):
        fsa.feedback_attention(logits.to("cuda:0"), uniform.to("cuda:1"))


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_work_is_ordered_by_the_callers_stream():
    logits, uniform = (t.float().cuda() for t in segment_logits(784, 60))
    expected = fsa.feedback_attention(logits, uniform)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.empty_like(logits)
        torch.cuda._sleep(50_000_000)  # The input is written only after this.
        late.copy_(logits)
        feedback = fsa.feedback_attention(late, uniform)
    stream.synchronize()
    assert torch.equal(feedback, expected)
