"""The launch table: block sizes, warps and stages of every kernel, by problem size.

Sizes fall into few buckets, and N and C are run-time integers, so a new picture size or class list
rarely compiles anything. Not tuned on a GPU yet; chosen so that nothing spills on sm_80, sm_90 and
sm_100 (`python -m bench resources` prints the table).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

import fsa_kernels


@dataclass(frozen=True)
class Launch:
    """Constants and resources of one compiled kernel."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int = 1

    def arguments(self) -> dict[str, int]:
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def blocks(self, **sizes: int) -> int:
        """How many blocks cover these sizes, such as BLOCK_N=N, together."""
        count = 1
        # Not triton.cdiv, which takes four microseconds outside of a kernel.
        for name, size in sizes.items():
            count *= -(-size // self.constants[name])
        return count


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# The similarity product runs over classes in steps of this many; operands are padded to it.
CLASS_STEP = 32

# Weights of the proxy affinity come in tiles of this many columns; their rows are padded to it.
WEIGHTS_TILE = 128

# The longest row of similarities that is held in registers by one program.
LONGEST_ROW_IN_REGISTERS = 16384


def padded_row(N: int) -> int:
    """Entries from one row of similarities to the next."""
    return round_up(N, 16)


def result_strides(N: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Strides of A_f (B,N,N): its rows lie where those of the similarities, in float32, lay."""
    row = padded_row(N) * (torch.float32.itemsize // dtype.itemsize)
    return N * row, row, 1


def padded_weights(N: int) -> int:
    """Entries from one row of weights of the proxy affinity to the next."""
    return round_up(N, WEIGHTS_TILE)


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of those weights, for features and values in `dtype`."""
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    interpreted = dtype == torch.bfloat16 and fsa_kernels.interpreting()
    return torch.float32 if interpreted else dtype


def gathered(
    B: int, N: int, D: int, *, after: bool, before: bool, only: bool
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of what `fsa_kernels.columns.gather` returns."""
    return (B, N + 1, D), (B, N, 2 * D if before and (after or only) else D)


def feature_step(dtype: torch.dtype) -> int:
    """The affinity product runs over features in steps of this many; they are padded to it."""
    return 128 // dtype.itemsize


def proxy_state(
    B: int, N: int, F: int, dtype: torch.dtype, stored: bool
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and types of what `fsa_kernels.proxy.prepare` returns for features in `dtype`."""
    if stored:
        weights = ((B, N + 1, padded_weights(N)), weights_dtype(dtype))
        return weights, ((B, padded_weights(N) // WEIGHTS_TILE, N + 1), torch.float32)
    # Unit features are within the range of float16, which is finer than bfloat16.
    unit_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    return ((B, N, round_up(F, feature_step(dtype))), unit_dtype), ((B,), torch.float32)


@lru_cache(maxsize=256)
def isolate(C: int) -> Launch:
    """Logits -> probabilities, centred logarithms, their halves."""
    block_c = min(128, max(CLASS_STEP, next_power_of_2(C)))
    # 16 x 64 in four warps spills (measured: 8 bytes), in eight it takes 60 registers.
    return Launch(
        {"BLOCK_N": 16 if block_c < 128 else 8, "BLOCK_C": block_c},
        num_warps=8 if block_c == 64 else 4,
    )


@lru_cache(maxsize=256)
def predict() -> Launch:
    """Features and texts -> the same. Of 32 classes at once in four warps it spills (24 bytes)."""
    return Launch({"BLOCK_N": 16, "BLOCK_C": 64, "BLOCK_E": 64}, num_warps=8, num_stages=3)


@lru_cache(maxsize=256)
def similarity(N: int) -> Launch:
    """The tensor-core product. Larger tiles read the operands less often, smaller ones are more."""
    if N <= 512:
        return Launch({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3)
    if N <= 1024:
        return Launch({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3)
    return Launch({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3)


@lru_cache(maxsize=256)
def select(N: int) -> Launch:
    """A row in registers: about 16 to 32 values a thread, so that searching stays in few warps."""
    block_n = max(32, next_power_of_2(N))
    return Launch({"BLOCK_N": block_n}, num_warps=min(16, max(1, block_n // 1024)))


@lru_cache(maxsize=256)
def select_long() -> Launch:
    """A row too long for registers, in pieces."""
    return Launch({"BLOCK_N": 8192}, num_warps=8)


@lru_cache(maxsize=256)
def gather() -> Launch:
    """Values and attended values side by side, and their mean."""
    blocks = {"BLOCK_N": 16, "BLOCK_D": 64, "MEAN_ROWS": 512, "MEAN_COLUMNS": 16}
    return Launch(blocks, num_warps=4)


@lru_cache(maxsize=256)
def normalise(F: int) -> Launch:
    """Rows of features to unit length."""
    return Launch({"BLOCK_N": 16, "BLOCK_F": min(256, max(32, next_power_of_2(F)))}, num_warps=4)


@lru_cache(maxsize=256)
def level(F: int) -> Launch:
    """The threshold of each image: 64 values a thread at once."""
    block_f = min(1024, max(64, next_power_of_2(F)))
    return Launch({"BLOCK_B": 32, "BLOCK_F": block_f}, num_warps=block_f // 64)


@lru_cache(maxsize=256)
def affinity(N: int, dtype: torch.dtype) -> Launch:
    """The tensor-core product of unit features in `dtype`."""
    half = dtype.itemsize == 2
    block_m = 128 if half and N > 512 else 64
    return Launch(
        {"BLOCK_M": block_m, "BLOCK_N": WEIGHTS_TILE, "BLOCK_F": feature_step(dtype)},
        num_warps=4 if half and block_m == 64 else 8,
        num_stages=3 if half else 2,
    )


@lru_cache(maxsize=256)
def apply_affinity(rows: int, D: int, dtype: torch.dtype, gather: bool) -> Launch:
    """The tensor-core product of weights and values in `dtype`, for so many rows in all images.

    What bounds it is reading both from the second-level cache, once for each tile: large tiles,
    where there are enough of them, and where what `gather` writes leaves the registers.
    """
    half = dtype.itemsize == 2
    block_m = 128 if half and rows > 1024 else 64
    block_d = 64 if gather else block_m
    blocks = {
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if half else 32,
        "BLOCK_D": min(block_d, max(16, next_power_of_2(D))),
    }
    return Launch(blocks, num_warps=8 if block_m == 128 else 4, num_stages=3 if half else 2)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one; Triton launches on the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


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
    from fsa_kernels import proxy
    from fsa_kernels.feedback import feedback_attention

    options = {"beta": 3.0, "confidence": 0.45}
    for dtype in dtypes:
        for N in patches:
            for C in classes:
                logits = torch.zeros((1, N, C), dtype=dtype, device=device)
                feedback_attention(logits, logits[:, :1], dtype=dtype, **options)
                features = torch.ones((1, N, 64), dtype=dtype, device=device)
                texts = torch.ones((C, 64), device=device)
                for uniform in (features[:, :1], features):
                    feedback_attention(features, uniform, texts, dtype=dtype, **options)
            for F, D in proxy_widths:
                features = torch.ones((1, N, F), dtype=dtype, device=device)
                value = torch.ones((1, N, D), dtype=dtype, device=device)
                state = proxy.prepare(features, shift=1.2, gain=3.0, stored=True)
                proxy.apply(state, value, gain=3.0)
                terms = dict.fromkeys(("after", "before", "only"), True)
                _, columns = proxy.gather(state, value, gain=3.0, scale=1 / 3, **terms)
                proxy.apply(state, columns[..., D:], gain=3.0, add=columns[..., :D])
