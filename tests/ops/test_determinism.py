"""The same input gives the same bits in other processes, and to threads that call at once.

That every backend repeats itself is in test_conformance.
"""

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
from fsa import FSAConfig
from tests.support.accuracy import segment_logits


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


def test_threads_calling_at_once_get_what_each_would_by_itself():
    inputs = [segment_logits(64 + i, 9, seed=i) for i in range(8)]
    inputs = [(logits.float(), uniform.float()) for logits, uniform in inputs]
    configs = [FSAConfig(beta=1 + i, confidence=0.3 + 0.05 * i) for i in range(8)]

    def run(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, uniform = inputs[i % 8]
        feedback = fsa.feedback_attention(logits, uniform, config=configs[i % 8])
        return feedback, fsa.proxy_attention(logits, logits)

    by_itself = [run(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for i, together in enumerate(pool.map(run, range(64))):
            assert all(
                torch.equal(one, two) for one, two in zip(together, by_itself[i % 8], strict=True)
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

    by_itself = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, together in enumerate(pool.map(run, range(12))):
            assert together.class_names == by_itself[i % 4].class_names
            assert np.array_equal(together.labels, by_itself[i % 4].labels)
            assert np.array_equal(together.scores, by_itself[i % 4].scores)


@pytest.mark.gpu
def test_threads_and_streams_share_a_gpu():
    inputs = [segment_logits(196 + i, 21, seed=i) for i in range(8)]
    inputs = [(logits.float().cuda(), uniform.float().cuda()) for logits, uniform in inputs]
    by_itself = [fsa.feedback_attention(*pair) for pair in inputs]
    torch.cuda.synchronize()

    def run(i: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            feedback = fsa.feedback_attention(*inputs[i % 8])
            torch.cuda.current_stream().synchronize()
        return feedback

    with ThreadPoolExecutor(8) as pool:
        for i, together in enumerate(pool.map(run, range(64))):
            assert torch.equal(together, by_itself[i % 8])
