"""Class predictions -> feedback attention A_f, in three launches.

    operands    P and L each as two halves, and h; see `fsa_kernels.isolate`.
    similarity  one program: a tile of one image's N x N. Three tensor-core products per chunk of
                classes, float32 accumulation; S = 1 / (1 + max(0, h_i - P_i . L_j)), written in
                float32. Reads 4 x 2 B per class and row or column of the tile.
    select      one program: one row, in registers. Finds the kept patches by a threshold search,
                scales, normalises, writes the row in the wanted type over its own
                similarities. Reads 4 B and writes 2 or 4 B an entry; the row is read once.

A_f takes the place of S row by row, so 4 B an entry are kept and no more: in half precision its
rows lie twice their length apart. `apply_feedback` does the last two launches for a block of rows
at a time and multiplies each block at once, so it keeps no N x N matrix at all.

A patch with logits that are not finite gets a row of NaN; no other row keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import isolate, launch
from fsa_kernels.isolate import SCALE
from fsa_kernels.tiles import tile_at

_PRUNINGS = {"confidence": 0, "ratio": 1, "threshold": 2, None: 3}

# In the workspace of similarities: a patch that no row may keep.
_ABSENT = -1.0

CONFIDENCE: tl.constexpr = tl.constexpr(0)
RATIO: tl.constexpr = tl.constexpr(1)
THRESHOLD: tl.constexpr = tl.constexpr(2)
ABSENT: tl.constexpr = tl.constexpr(_ABSENT)


# --------------------------------------------------------------------------------------------------
# similarity


@triton.jit(do_not_specialize=["N", "first_row", "rows"])
def _similarity_kernel(
    operands_ptr,
    h_ptr,
    s_ptr,
    N,
    first_row,
    rows,
    stride_operand,
    padded_C,
    padded_N,
    COSINE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The rows from `first_row` on of every image; they lie from row 0 on in the workspace.
    b, place, j = tile_at(rows, N, BLOCK_M, BLOCK_N)
    i = first_row + place
    k = tl.arange(0, BLOCK_K)
    to_next = tl.cast(stride_operand, tl.int64)
    left = operands_ptr + (b * N + i)[:, None] * padded_C + k[None, :]
    right = operands_ptr + 2 * to_next + (b * N + j)[None, :] * padded_C + k[:, None]
    inside = (place < rows)[:, None]
    columns = (j < N)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, padded_C, BLOCK_K):
        left_high = tl.load(left + start, mask=inside, other=0.0)
        right_high = tl.load(right + start, mask=columns, other=0.0)
        if EXACT:
            left_low = tl.load(left + to_next + start, mask=inside, other=0.0)
            right_low = tl.load(right + to_next + start, mask=columns, other=0.0)
            # The small products first, so that they are not lost one by one in the large sum.
            total = tl.dot(left_low, right_high, total)
            total = tl.dot(left_high, right_low, total)
        total = tl.dot(left_high, right_high, total)
    total = total / SCALE

    # The padding of a row is absent too, and written, so that rows are read and written in wide
    # pieces.
    h_j = tl.load(h_ptr + b * N + j, mask=j < N, other=float("nan"))
    if COSINE:
        S = tl.minimum(tl.maximum(total, 0.0), 1.0)
    else:
        h_i = tl.load(h_ptr + b * N + i, mask=place < rows, other=0.0)
        S = 1.0 / (1.0 + tl.maximum(h_i[:, None] - total, 0.0))
    S = tl.where((h_j == h_j)[None, :], S, ABSENT)
    out = s_ptr + (b * rows + place)[:, None] * padded_N + j[None, :]
    tl.store(out, S, mask=inside & (j < padded_N)[None, :])


# --------------------------------------------------------------------------------------------------
# select


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


# --------------------------------------------------------------------------------------------------
# The launchers

# Workspace of `apply_feedback` for similarities, in bytes, and the rows of an image that it must
# hold: whole tiles of the similarity kernel.
_BLOCK_BYTES = 24 << 20
_BLOCK_ROWS = 128


def feedback_attention(
    patches: Tensor,
    uniform: Tensor | None,
    text_features: Tensor | None = None,
    *,
    dtype: torch.dtype,
    **options: object,
) -> Tensor:
    """A_f (B,N,N), with `launch.result_strides`.

    Args:
        patches: logits (B,N,C), scaled; or with texts, features (B,N,E) of any length. float16,
            bfloat16 or float32; any strides.
        uniform: the same under uniform attention, (B,1,C) or (B,N,C), or with E; or None.
        text_features: (C,E) of unit length, or None.
        dtype: of A_f: float16, bfloat16 or float32.
        **options: as in `_Options`.

    Takes 4 B N^2 bytes, the result among them, and (8 C + 4) B N besides; from features, 8 C B N
    more before A_f is begun, and twice that where each patch has a uniform row of its own.
    """
    feedback = Feedback(patches, uniform, text_features, **options)
    return feedback.rows(0, patches.shape[1], dtype)


def apply_feedback(
    patches: Tensor,
    uniform: Tensor | None,
    text_features: Tensor | None,
    columns: Tensor,
    **options: object,
) -> Tensor:
    """A_f times columns (B,N,K), by blocks of rows; no N x N matrix is kept.

    Args:
        patches, uniform, text_features, **options: as `feedback_attention` takes them.
        columns: (B,N,K) float16, bfloat16 or float32; A_f is rounded to their type.

    Takes what `feedback_attention` takes, but for A_f: the result (B,N,K), and for similarities
    24 MiB or 128 rows of each image, whichever is more.
    """
    B, N, _ = patches.shape
    feedback = Feedback(patches, uniform, text_features, **options)
    count = _BLOCK_BYTES // (B * launch.padded_row(N) * torch.float32.itemsize)
    count = max(_BLOCK_ROWS, count // _BLOCK_ROWS * _BLOCK_ROWS)
    out = torch.empty((B, N, columns.shape[-1]), dtype=columns.dtype, device=columns.device)
    for first in range(0, N, count):
        rows = feedback.rows(first, min(count, N - first), columns.dtype)
        torch.bmm(rows, columns, out=out[:, first : first + count])
    return out


@dataclass(frozen=True)
class _Options:
    """As in `fsa.FSAConfig`; precision: "exact", three products, or "fast", one."""

    beta: float
    confidence: float
    logit_scale: float = 1.0
    uniform_logit_scale: float = 1.0
    similarity: str = "kl"
    pruning: str | None = "confidence"
    ratio: float = 0.4
    threshold: float = 0.5
    scaling: bool = True
    precision: str = "exact"


class Feedback:
    """A_f of some images, whole or by blocks of rows; the first launch is done at once.

    Args:
        patches, uniform, text_features: as `feedback_attention` takes them.
        **options: as in `_Options`.
    """

    def __init__(
        self,
        patches: Tensor,
        uniform: Tensor | None,
        text_features: Tensor | None,
        **options: object,
    ) -> None:
        self.options = _Options(**options)
        cosine = self.options.similarity == "cosine"
        if text_features is None:
            self.operands = isolate.isolate(patches, uniform, cosine=cosine)
        else:
            self.operands = isolate.predict(
                patches,
                uniform,
                text_features,
                scale=self.options.logit_scale,
                uniform_scale=self.options.uniform_logit_scale,
                cosine=cosine,
            )

    def rows(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows `first` to `first + count` of A_f, (B,count,N) in `dtype`, in two launches."""
        halves, h = self.operands.halves, self.operands.h
        B, N = h.shape
        options = self.options
        padded_N = launch.padded_row(N)
        S = torch.empty((B, count, padded_N), dtype=torch.float32, device=h.device)
        out = S.view(dtype)
        limit = options.threshold
        if options.pruning == "ratio":
            limit = max(1, math.floor(options.ratio * N))
        with launch.on_device(S):
            plan = launch.similarity(N)
            _similarity_kernel[(B * plan.blocks(BLOCK_M=count, BLOCK_N=N),)](
                halves,
                h,
                S,
                N,
                first,
                count,
                halves.stride(0),
                halves.shape[-1],
                padded_N,
                COSINE=options.similarity == "cosine",
                EXACT=options.precision == "exact",
                BLOCK_K=launch.CLASS_STEP,
                **plan.arguments(),
            )
            if N <= launch.LONGEST_ROW_IN_REGISTERS:
                kernel, plan = _select_kernel, launch.select(N)
            else:
                kernel, plan = _select_long_kernel, launch.select_long()
            kernel[(B * count,)](
                S,
                h,
                out,
                N,
                first,
                count,
                padded_N,
                out.stride(1),
                options.beta,
                options.confidence,
                float(limit),
                PRUNING=_PRUNINGS[options.pruning],
                SCALING=options.scaling,
                **plan.arguments(),
            )
        return out[:, :, :N]
