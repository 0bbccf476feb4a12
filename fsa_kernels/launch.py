"""The launch table: block sizes, warps and stages of every kernel, by problem size.

Sizes fall into few buckets, and N and C are run-time integers, so a new picture size or class list
rarely compiles anything. Not tuned on a GPU yet; chosen so that nothing spills on sm_80, sm_90 and
sm_100 (`python -m bench resources` prints the table).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Constants and resources of one compiled kernel."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int = 1

    def arguments(self) -> dict[str, int]:
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# The similarity product runs over classes in steps of this many; operands are padded to it.
CLASS_STEP = 32

# The longest row of similarities that is held in registers by one program.
LONGEST_ROW_IN_REGISTERS = 16384


def padded_row(N: int) -> int:
    """Entries from one row of similarities to the next."""
    return round_up(N, 16)


def result_strides(N: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Strides of A_f (B,N,N): its rows lie where those of the similarities, in float32, lay."""
    row = padded_row(N) * (torch.float32.itemsize // dtype.itemsize)
    return N * row, row, 1


def isolate(C: int) -> Launch:
    """Logits -> probabilities, centred logarithms, their halves."""
    block_c = min(128, max(CLASS_STEP, next_power_of_2(C)))
    # 16 x 64 in four warps spills (measured: 8 bytes), in eight it takes 60 registers.
    return Launch(
        {"BLOCK_N": 16 if block_c < 128 else 8, "BLOCK_C": block_c},
        num_warps=8 if block_c == 64 else 4,
    )


def similarity(N: int) -> Launch:
    """The tensor-core product."""
    if N <= 512:
        return Launch({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2)
    return Launch({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2)


def select(N: int) -> Launch:
    """A row in registers: about 16 to 32 values a thread, so that searching stays in few warps."""
    block_n = max(32, next_power_of_2(N))
    return Launch({"BLOCK_N": block_n}, num_warps=min(16, max(1, block_n // 1024)))


def select_long() -> Launch:
    """A row too long for registers, in pieces."""
    return Launch({"BLOCK_N": 8192}, num_warps=8)


def normalise(F: int) -> Launch:
    """Rows of features to unit length."""
    return Launch({"BLOCK_N": 16, "BLOCK_F": min(256, max(32, next_power_of_2(F)))}, num_warps=4)


def level(F: int) -> Launch:
    """The threshold of each image."""
    return Launch({"BLOCK_F": min(1024, max(32, next_power_of_2(F)))}, num_warps=4)


def attend(D: int, dtype: torch.dtype) -> Launch:
    """Scores once for all columns of the values, held as a wide and a narrow power of two.

    One program holds up to 1024 columns, or 640 in float32; wider values are shared by several
    programs, each of which computes the scores.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    programs = -(-D // (1024 if half else 640))
    columns = max(16, -(-D // programs))
    wide = 1 << (columns.bit_length() - 1)
    narrow = next_power_of_2(max(16, columns - wide)) if columns > wide else 0
    blocks = {
        "BLOCK_M": 32 if half and columns <= 768 else 16,
        "BLOCK_N": 32,
        "BLOCK_F": 64 if half else 32,
        "WIDE": wide,
        "NARROW": narrow,
    }
    return Launch(blocks, num_warps=8, num_stages=2)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one; Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def warmup(
    device: torch.device | str = "cuda",
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.float32),
    patches: Sequence[int] = (196, 441, 784, 1024, 1764, 4096),
    classes: Sequence[int] = (21, 60, 171),
    proxy_widths: Sequence[tuple[int, int]] = ((768, 768),),
) -> None:
    """Compiles the kernels for these sizes, so that no later call waits for the compiler.

    Args:
        device: a CUDA device.
        dtypes: of logits, features and values.
        patches: N; every size in the same bucket is covered.
        classes: C, likewise.
        proxy_widths: pairs (F, D) of features and values.
    """
    from fsa_kernels.feedback import feedback_attention
    from fsa_kernels.proxy import proxy_attention

    for dtype in dtypes:
        for N in patches:
            for C in classes:
                logits = torch.zeros((1, N, C), dtype=dtype, device=device)
                feedback_attention(logits, logits[:, :1], dtype=dtype, beta=3.0, confidence=0.45)
        for F, D in proxy_widths:
            features = torch.ones((1, 64, F), dtype=dtype, device=device)
            value = torch.ones((1, 64, D), dtype=dtype, device=device)
            proxy_attention(features, value, shift=1.2, gain=3.0)
