"""Similarities -> rows of A_f, in place and in one launch.

One program: one row, in registers. It finds the kept patches by a search for the row's threshold,
scales, normalises and writes the row in the result's type over its own similarities. Reads 4 B and
writes 2 or 4 B an entry; the row is read once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch, runtime
from fsa_kernels.similarity import ABSENT

_PRUNINGS = {"confidence": 0, "ratio": 1, "threshold": 2, None: 3}

CONFIDENCE: tl.constexpr = tl.constexpr(0)
RATIO: tl.constexpr = tl.constexpr(1)
THRESHOLD: tl.constexpr = tl.constexpr(2)


@triton.jit
def _weight(S, PRUNING: tl.constexpr):
    """What a patch counts towards the target: its unnormalised confidence, or one."""
    if PRUNING == CONFIDENCE:
        return tl.where(S >= 0.0, tl.exp(S - 1.0), 0.0)
    else:
        return tl.where(S >= 0.0, 1.0, 0.0)


@triton.jit
def _scaled(S, beta, SCALING: tl.constexpr):
    """F of the definition."""
    if SCALING:
        return S * tl.exp(beta * S)
    else:
        return S


@triton.jit
def _pivot(low, high, excess, lack, step):
    """Where to cut: low < pivot <= high.

    Where the mass would meet the target if it were spread evenly over the interval, which takes
    about 8 steps of 1764 similarities where the middle takes 12; and every fifth time the middle,
    which halves the interval whatever the spread.
    """
    fraction = tl.where(step % 5 == 4, 0.5, excess / (excess + lack))
    pivot = tl.minimum(low + fraction * (high - low), high)
    return tl.where(pivot > low, pivot, high)


@triton.jit(do_not_specialize=["N", "first_row", "rows"])
def _select_kernel(
    s_ptr,
    h_ptr,
    out_ptr,
    N,
    first_row,
    rows,
    padded_N,
    stride_row,
    beta,
    share,
    limit,
    PRUNING: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_N)
    S = tl.load(s_ptr + row * padded_N + j, mask=j < padded_N, other=ABSENT)
    largest = tl.max(S, axis=0)

    if PRUNING <= RATIO:
        weight = _weight(S, PRUNING)
        # `limit` is the number of patches for a ratio; for confidence, `share` of the whole mass.
        mass = tl.sum(weight, axis=0)
        target = share * mass if PRUNING == CONFIDENCE else limit
        # Sought: v, the largest value in the row with mass(S >= v) > target, the first that does
        # not fit whole. Invariant: low <= v <= high, and both occur in the row:
        # mass(S >= low) = target + excess > target, and for every value x above high
        # mass(S >= x) <= target - lack <= target.
        # Each step cuts the interval and then shrinks it to values that occur, so it ends with
        # low == high == v, whatever the rounding of the pivot.
        low = tl.min(tl.where(S >= 0.0, S, 2.0), axis=0)
        high = largest
        excess = mass - target
        lack = target
        step = 0
        while low < high:
            pivot = _pivot(low, high, excess, lack, step)
            mass = tl.sum(tl.where(S >= pivot, weight, 0.0), axis=0)
            if mass > target:
                low = tl.min(tl.where(S >= pivot, S, 2.0), axis=0)
                excess = mass - target
            else:
                high = tl.max(tl.where(S < pivot, S, ABSENT), axis=0)
                lack = target - mass
            step += 1
        above = tl.sum(tl.where(S > low, weight, 0.0), axis=0)
        each = tl.exp(low - 1.0) if PRUNING == CONFIDENCE else 1.0
        room = tl.floor((target - above) / each)
        # The first of the order is always kept.
        room = tl.where(low == largest, tl.maximum(room, 1.0), room)
        tied = S == low
        # Among equals the lowest index goes first.
        kept = (S > low) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))
    elif PRUNING == THRESHOLD:
        first = tl.min(tl.where(S == largest, j, BLOCK_N), axis=0)
        kept = (S >= limit) | (j == first)
    else:
        kept = S >= 0.0

    F = tl.where(kept, _scaled(S, beta, SCALING), float("-inf"))
    exponential = tl.exp(F - tl.max(F, axis=0))
    attention = exponential / tl.sum(exponential, axis=0)
    h = tl.load(h_ptr + (row // rows) * N + first_row + row % rows)
    attention = tl.where(h == h, attention, float("nan"))
    # Every thread has read its part of S before this: the sum above took all of them.
    out = out_ptr + row * stride_row + j
    tl.store(out, attention.to(out_ptr.dtype.element_ty), mask=j < padded_N)


@triton.jit
def _piece(s_row, start, padded_N, BLOCK_N: tl.constexpr):
    j = start + tl.arange(0, BLOCK_N)
    return tl.load(s_row + j, mask=j < padded_N, other=ABSENT)


@triton.jit(do_not_specialize=["N", "first_row", "rows"])
def _select_long_kernel(
    s_ptr,
    h_ptr,
    out_ptr,
    N,
    first_row,
    rows,
    padded_N,
    stride_row,
    beta,
    share,
    limit,
    PRUNING: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`_select_kernel` for rows that registers cannot hold: the same search, piece by piece."""
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * padded_N
    largest = ABSENT
    smallest = 2.0
    mass = 0.0
    for start in range(0, N, BLOCK_N):
        S = _piece(s_row, start, padded_N, BLOCK_N)
        largest = tl.maximum(largest, tl.max(S, axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(S >= 0.0, S, 2.0), axis=0))
        mass += tl.sum(_weight(S, PRUNING), axis=0)

    # What is kept: all above `low`, and the first `room` of those equal to it.
    if PRUNING <= RATIO:
        target = share * mass if PRUNING == CONFIDENCE else limit
        low = smallest
        high = largest
        excess = mass - target
        lack = target
        step = 0
        while low < high:
            pivot = _pivot(low, high, excess, lack, step)
            mass = 0.0
            next_low = 2.0
            next_high = ABSENT
            for start in range(0, N, BLOCK_N):
                S = _piece(s_row, start, padded_N, BLOCK_N)
                mass += tl.sum(tl.where(S >= pivot, _weight(S, PRUNING), 0.0), axis=0)
                next_low = tl.minimum(next_low, tl.min(tl.where(S >= pivot, S, 2.0), axis=0))
                next_high = tl.maximum(next_high, tl.max(tl.where(S < pivot, S, ABSENT), axis=0))
            if mass > target:
                low = next_low
                excess = mass - target
            else:
                high = next_high
                lack = target - mass
            step += 1
        above = 0.0
        for start in range(0, N, BLOCK_N):
            S = _piece(s_row, start, padded_N, BLOCK_N)
            above += tl.sum(tl.where(S > low, _weight(S, PRUNING), 0.0), axis=0)
        each = tl.exp(low - 1.0) if PRUNING == CONFIDENCE else 1.0
        room = tl.floor((target - above) / each)
        room = tl.where(low == largest, tl.maximum(room, 1.0), room)
    elif PRUNING == THRESHOLD:
        # As if ties were cut: everything at the limit has room, or only the first of all.
        low = tl.where(largest >= limit, limit, largest)
        room = tl.where(largest >= limit, N, 1).to(tl.float32)
    else:
        low = smallest
        room = N.to(tl.float32)

    # F grows with S for beta >= 0; for a negative beta its maximum has to be looked for.
    top = float("-inf")
    total = 0.0
    seen = 0
    for start in range(0, N, BLOCK_N):
        S = _piece(s_row, start, padded_N, BLOCK_N)
        tied = S == low
        kept = (S > low) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) + seen <= room))
        seen += tl.sum(tied.to(tl.int32), axis=0)
        F = tl.where(kept, _scaled(S, beta, SCALING), float("-inf"))
        new_top = tl.maximum(top, tl.max(F, axis=0))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - reference) + tl.sum(tl.exp(F - reference), axis=0)
        top = new_top

    h = tl.load(h_ptr + (row // rows) * N + first_row + row % rows)
    seen = 0
    for start in range(0, N, BLOCK_N):
        S = _piece(s_row, start, padded_N, BLOCK_N)
        tied = S == low
        kept = (S > low) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) + seen <= room))
        seen += tl.sum(tied.to(tl.int32), axis=0)
        F = tl.where(kept, _scaled(S, beta, SCALING), float("-inf"))
        attention = tl.where(h == h, tl.exp(F - top) / total, float("nan"))
        j = start + tl.arange(0, BLOCK_N)
        # In half precision this piece ends before the next one of S begins; all threads must have
        # read this one.
        tl.debug_barrier()
        out = out_ptr + row * stride_row + j
        tl.store(out, attention.to(out_ptr.dtype.element_ty), mask=j < padded_N)


def select(
    S: Tensor,
    h: Tensor,
    first_row: int,
    dtype: torch.dtype,
    *,
    beta: float,
    scaling: bool,
    pruning: str | None,
    confidence: float,
    ratio: float,
    threshold: float,
) -> Tensor:
    """Rows of A_f (B,rows,N) in `dtype`, over the memory of S (B,rows,padded N).

    Args:
        S: of `similarity`; overwritten.
        h: (B,N), NaN for patches whose row is NaN.
        first_row: the patch that the first row belongs to.
        dtype: float16, bfloat16 or float32.
        beta, scaling, pruning, confidence, ratio, threshold: as in `fsa.FSAConfig`.
    """
    B, rows, padded_N = S.shape
    N = h.shape[1]
    out = S.view(dtype)
    limit = max(1, math.floor(ratio * N)) if pruning == "ratio" else threshold
    if N <= launch.LONGEST_ROW_IN_REGISTERS:
        kernel, plan = _select_kernel, launch.select(N)
    else:
        kernel, plan = _select_long_kernel, launch.select_long()
    with runtime.on_device(S):
        kernel[(B * rows,)](
            S,
            h,
            out,
            N,
            first_row,
            rows,
            padded_N,
            out.stride(1),
            beta,
            confidence,
            float(limit),
            PRUNING=_PRUNINGS[pruning],
            SCALING=scaling,
            **plan.arguments(),
        )
    return out[:, :, :N]
