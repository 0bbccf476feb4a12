"""The launch table: block sizes, warps and stages of every kernel, by problem size.

Sizes fall into few buckets, and N and C are run-time integers, so a new picture size or class list
rarely compiles anything. Not tuned on a GPU yet; chosen so that nothing spills on sm_80, sm_90 and
sm_100 (`python -m bench resources` prints the table).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fsa_kernels import runtime


@dataclass(frozen=True, eq=False)
class Launch:
    """Constants and resources of one compiled kernel.

    Told apart by identity: the functions below return the same object for the same sizes.
    """

    constants: dict[str, int]
    num_warps: int
    num_stages: int = 1
    # The most registers of a thread. Unless told, the assembler would rather spill a few than take
    # more than let a second program share the multiprocessor.
    max_registers: int | None = None

    def arguments(self) -> dict[str, int]:
        """Constants and options, as a kernel is called with.

        Multiplications and additions are fused, said here because Triton's default changes.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return {**self.constants, **options, "enable_fp_fusion": True}

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
    interpreted = dtype == torch.bfloat16 and runtime.interpreting()
    return torch.float32 if interpreted else dtype


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


# How many patches of an image the centre of the logarithms is the mean of: one would do, the other
# is for where it is not finite.
_SAMPLES = 2

# The most classes that a tile of logits holds in registers at once.
_CLASSES_IN_REGISTERS = 256


def _classes(C: int) -> dict[str, int]:
    """How a tile of logits runs over classes: all at once, or in chunks."""
    block_c = max(CLASS_STEP, next_power_of_2(C))
    return {"WHOLE": block_c <= _CLASSES_IN_REGISTERS, "BLOCK_C": min(block_c, 256)}


@lru_cache(maxsize=256)
def isolate(C: int) -> Launch:
    """Logits -> probabilities, centred logarithms, their halves: 16 values a thread."""
    classes = _classes(C)
    rows = {"ROWS": 16, "PATCHES": 16 - _SAMPLES, "SAMPLES": _SAMPLES}
    return Launch({**rows, **classes}, num_warps=classes["BLOCK_C"] // 32)


@lru_cache(maxsize=256)
def predict(C: int, uniform_row: bool, dtype: torch.dtype) -> Launch:
    """Features in `dtype` and texts -> the same; one row of the tile may be the uniform row."""
    rows = {"ROWS": 32, "PATCHES": 32 - _SAMPLES - uniform_row, "SAMPLES": _SAMPLES}
    classes = _classes(C)
    if not classes["WHOLE"]:
        # Three tf32 products of more classes at once spill.
        classes["BLOCK_C"] = 64
    blocks = {**rows, **classes, "BLOCK_E": 32}
    return Launch(blocks, num_warps=8, num_stages=2, max_registers=255)


@lru_cache(maxsize=256)
def similarity(N: int) -> Launch:
    """The tensor-core product. Three tiles of 64 x 128 share a multiprocessor, so that one's
    epilogue runs beside another's product: at N=1764 all of them are one wave on 132."""
    block_n = 64 if N <= 512 else 128
    return Launch({"BLOCK_M": 64, "BLOCK_N": block_n}, num_warps=4, num_stages=3)


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
    blocks = {"BLOCK_N": 16, "BLOCK_D": 64, "MEAN_ROWS": 128, "MEAN_COLUMNS": 16}
    return Launch(blocks, num_warps=4, max_registers=255)


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
    # Rows of another width than a multiple of 16 are read value by value, each by an address of its
    # own, which large tiles have no registers for.
    aligned = D % 16 == 0
    block_m = 128 if half and rows > 1024 and aligned else 64
    block_d = 64 if gather else block_m
    block_d = min(block_d if aligned else 32, max(16, next_power_of_2(D)))
    # In steps of 64 weights, a tile of 128 x 128 spills 8 bytes on sm_80.
    block_n = 64 if half and block_d < 128 and aligned else 32
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return Launch(
        blocks,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3 if half else 2,
        # For narrow values the assembler aims at so few registers that it spills some on sm_100.
        max_registers=255 if block_d < 64 else None,
    )
