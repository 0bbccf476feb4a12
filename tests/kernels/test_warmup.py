"""What `fsa_kernels.warmup` compiles, and that no call of the same kind compiles anything after it.

Triton is asked what it would compile, for a driver that stands for a GPU, and kept from doing it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fsa_kernels

if not fsa_kernels.available():
    pytest.skip("triton is not installed", allow_module_level=True)
triton = pytest.importorskip("triton")
if not hasattr(triton, "knobs"):
    pytest.skip(
        f"triton {triton.__version__} has no hook before it compiles; 3.4 has",
        allow_module_level=True,
    )

# Not in this process, where Triton's interpreter may be in the place of its compiler.
PREAMBLE = """
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
compiled = set()

def record(*, key, repr, **_):
    compiled.add((repr.split("[")[0], str(key)))
    return True

knobs.runtime.jit_cache_hook = record
import fsa_kernels
from fsa_kernels import Adaptations, Options
from fsa_kernels.warmup import warmup

half, single = torch.float16, torch.float32
options = Options(beta=2.3, confidence=0.3, logit_scale=20)

def new(before):
    return sorted(name for name, _ in compiled - before)
"""

AFTER_WARMUP = """
warmup("cpu", dtypes=(half,), patches=(196, 441, 784, 1764))
assert compiled
before = set(compiled)
sizes = [(1, 196, 21), (1, 1764, 171), (3, 784, 19), (5, 441, 59), (1, 900, 160), (2, 784, 80)]
for B, N, C in sizes:
    logits = torch.zeros((B, N, C), dtype=half)
    for uniform in (torch.zeros((B, 1, C), dtype=half), torch.zeros((B, N, C), dtype=half), None):
        fsa_kernels.feedback_attention(logits, uniform, options=options, dtype=half)
    tokens = torch.zeros((B, N + 1, 512), dtype=half)
    for texts in (torch.zeros((C, 512)), torch.zeros((C, 512), dtype=half)):
        for uniform in (torch.zeros((B, 1, 512), dtype=half), tokens[:, 1:], None):
            fsa_kernels.feedback_attention(
                tokens[:, 1:], uniform, texts, options=options, dtype=half
            )
    qkv = torch.zeros((B, N + 1, 3, 12, 64), dtype=half)
    value = qkv[:, :, 2].transpose(1, 2)
    attended = torch.zeros((B, N, 12, 64), dtype=half).transpose(1, 2)
    fsa_kernels.gather(value, attended, Adaptations())
    for features in (
        torch.zeros((B, N, 768), dtype=half),
        torch.zeros((B, 768, N), dtype=half).transpose(1, 2),
    ):
        state = fsa_kernels.proxy_prepare(features, shift=1.2, gain=3.0, stored=True)
    values = torch.zeros((B, N, 768), dtype=half)
    for given in (values, values.mT.contiguous().mT):
        _, columns = fsa_kernels.proxy_gather(state, given, Adaptations(), gain=3.0)
    fsa_kernels.proxy_apply(state, columns[..., 768:], gain=3.0, add=columns[..., :768])
assert not new(before), new(before)
"""

SECOND_CALL = """
def call(B, N, C):
    logits = torch.zeros((B, N, C), dtype=half)
    fsa_kernels.feedback_attention(logits, logits[:, :1], options=options, dtype=half)
    return len(compiled)

# Other sizes of the same bucket: odd numbers of classes, then pictures of other sizes.
assert call(1, 1764, 171) == call(1, 1764, 150) == call(1, 1025, 203) == call(1, 2047, 129) == 3
assert call(1, 1764, 171) < call(1, 1764, 160) == call(1, 1764, 144) == 4
"""


@pytest.mark.parametrize("calls", [AFTER_WARMUP, SECOND_CALL], ids=["after warmup", "second call"])
def test_nothing_compiles_again(calls):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + calls],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
