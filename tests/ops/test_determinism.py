"""The same input gives the same bits on every run of a backend, in this process and in others."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fsa
import fsa_kernels
from fsa import FSAConfig
from tests.support.accuracy import segment_logits
from tests.support.forms import FORMS, form_id

ON_GPU = torch.cuda.is_available() and fsa_kernels.available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ["torch", *(["triton"] if fsa_kernels.available() else [])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sizes(backend: str) -> list[tuple[int, int, int]]:
    """(B,N,C); small ones for Triton's interpreter."""
    if backend == "triton" and not ON_GPU:
        return [(1, 5, 3)]
    return [(2, 65, 21), (1, 441, 60), (3, 196, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_op_repeats_itself(backend, dtype):
    device = DEVICE if backend == "triton" else "cpu"
    for B, N, C in sizes(backend):
        logits, uniform = (t.to(device, dtype) for t in segment_logits(N, C, B=B))
        value = torch.randn(B, 2, N, 8, generator=torch.Generator().manual_seed(1))
        value = value.to(device, dtype)
        columns = value.transpose(1, 2).flatten(2)
        runs = []
        for number in range(3):
            # Memory that is used again is not clean, and is not always the same.
            litter = torch.full((1 + number, N, N), float("nan"), dtype=dtype, device=device)
            del litter
            feedback = fsa.feedback_attention(logits, uniform, backend=backend)
            adapted = fsa.adapt(value, feedback, feedback, backend=backend)
            attended = fsa.proxy_attention(logits, columns, backend=backend)
            runs.append((feedback, adapted, attended))
        for again in runs[1:]:
            assert all(torch.equal(one, two) for one, two in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_every_form_repeats_itself(config):
    # Ties to the bit, which an unstable order would break differently each time.
    distinct = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(1))
    logits = distinct[:, torch.arange(300) % 5]
    first = fsa.feedback_attention(logits, config=config)
    assert torch.equal(first, fsa.feedback_attention(logits.clone(), config=config))


def digest() -> str:
    """Of ops and of a segmentation."""
    logits, uniform = (tensor.float() for tensor in segment_logits(196, 21, B=2))
    attended = fsa.proxy_attention(logits, uniform.expand_as(logits))
    picture = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0))
    result = fsa.load_segmentor("sclip", device="cpu").segment(
        picture, ["cat", "grass"], short_side=48, window=48, stride=24
    )
    arrays = (fsa.feedback_attention(logits, uniform), attended, result.labels, result.scores)
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def test_another_process_gives_the_same_bits():
    result = subprocess.run(
        [sys.executable, "-c", "from tests.ops.test_determinism import digest; print(digest())"],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == digest(), result.stderr


def test_threads_calling_at_once_get_what_each_would_alone():
    inputs = [segment_logits(64 + i, 9, seed=i) for i in range(8)]
    inputs = [(logits.float(), uniform.float()) for logits, uniform in inputs]
    configs = [FSAConfig(beta=1 + i, confidence=0.3 + 0.05 * i) for i in range(8)]

    def run(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, uniform = inputs[i % 8]
        feedback = fsa.feedback_attention(logits, uniform, config=configs[i % 8])
        return feedback, fsa.proxy_attention(logits, logits)

    alone = [run(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for i, together in enumerate(pool.map(run, range(64))):
            assert all(
                torch.equal(one, two) for one, two in zip(together, alone[i % 8], strict=True)
            )


def test_threads_share_a_segmentor():
    segmentor = fsa.load_segmentor(device="cpu")
    pictures = [
        torch.rand(3, 40 + i, 50, generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    classes = [["cat", "dog"], ["grass", "sky", "tree"]]

    def run(i: int):
        return segmentor.segment(
            pictures[i % 4], classes[i % 2], short_side=32, window=32, stride=16
        )

    alone = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, together in enumerate(pool.map(run, range(12))):
            assert together.class_names == alone[i % 4].class_names
            assert np.array_equal(together.labels, alone[i % 4].labels)
            assert np.array_equal(together.scores, alone[i % 4].scores)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_threads_and_streams_share_a_gpu():
    inputs = [segment_logits(196 + i, 21, seed=i) for i in range(8)]
    inputs = [(logits.float().cuda(), uniform.float().cuda()) for logits, uniform in inputs]
    alone = [fsa.feedback_attention(*pair) for pair in inputs]
    torch.cuda.synchronize()

    def run(i: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            feedback = fsa.feedback_attention(*inputs[i % 8])
            torch.cuda.current_stream().synchronize()
        return feedback

    with ThreadPoolExecutor(8) as pool:
        for i, together in enumerate(pool.map(run, range(64))):
            assert torch.equal(together, alone[i % 8])
