"""What does not fit: offsets beyond 2^31, memory that is not there; and devices and streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsa
import fsa_kernels
from fsa import FSAConfig, InputError
from fsa.errors import OutOfMemoryError, named_out_of_memory
from tests.kernels.offsets import compiles_ahead_of_time, narrow_products
from tests.support.accuracy import segment_logits
from tests.support.backends import BACKENDS

ROOT = Path(__file__).parents[2]


def test_finite_products_that_overflow_their_type_are_not_blamed_on_the_input():
    value = torch.full((1, 1, 2, 2), 60_000.0, dtype=torch.float16)
    twice = torch.full((1, 2, 2), 1.0, dtype=torch.float16)
    adapted = fsa.adapt(value, twice, twice, config=FSAConfig(adaptations=("only",)))
    assert adapted.isinf().all()


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


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(
    not compiles_ahead_of_time(), reason="compiling for a chip that is not there needs triton 3.3"
)
def test_no_kernel_multiplies_an_argument_into_an_offset_in_32_bits():
    # Not in this process: under the interpreter there is nothing to compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.offsets"],
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


@pytest.mark.gpu
def test_a_full_gpu_is_an_error_in_words_and_the_next_call_works():
    logits = torch.zeros(1, 600_000, 1, device="cuda")
    for backend in BACKENDS:
        with pytest.raises(OutOfMemoryError, match="out of memory: feedback attention"):
            fsa.feedback_attention(logits, backend=backend)
        assert fsa.feedback_attention(logits[:, :3], backend=backend).isfinite().all()
    assert torch.cuda.memory_allocated() < 1 << 30


@pytest.mark.gpu
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


@pytest.mark.gpu
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
