"""The op-level rows under pytest-benchmark: `pytest bench --benchmark-only`.

On the GPU where there is one, else on the CPU at sizes that it does in a moment.
"""

from __future__ import annotations

import pytest
import torch

from bench.rows.contenders import DoesNotFit, NotInstalled, synchronise
from bench.rows.op import OpRow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
PATCHES = (196, 784, 1764) if DEVICE.type == "cuda" else (196, 441)
CONTENDERS = ("published", "algebra", "torch.compile", "flashinfer", "fsa torch", "fsa triton")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("C", [21, 171])
@pytest.mark.parametrize("N", PATCHES)
@pytest.mark.parametrize("kind", ["op", "step"])
def test_op(benchmark, kind: str, N: int, C: int, contender: str) -> None:
    builds = OpRow(kind, 1, N, C, compiled=True).contenders(DEVICE, DTYPE)
    if contender not in builds:
        pytest.skip(f"{contender} is no contender of a {kind} on {DEVICE.type}")
    benchmark.group = f"{kind} N={N} C={C}"
    with torch.no_grad():
        try:
            call = builds[contender]()
        except (DoesNotFit, NotInstalled) as reason:
            pytest.skip(str(reason))

        def run() -> torch.Tensor:
            result = call()
            synchronise(DEVICE)
            return result

        # Compiles.
        run()
        result = benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    assert result.isfinite().all()
