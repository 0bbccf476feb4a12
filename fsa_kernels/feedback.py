"""Logits -> feedback attention A_f, in three launches.

    isolate     one program: 8 or 16 patches of one image, all classes in chunks.
                P = softmax(z - u), L = log(P + 1e-10) - m, h = sum_c P L; P and L each as two
                halves. Reads the logits three times (cached), writes 4 x B N C halves.
    similarity  one program: a tile of one image's N x N. Three tensor-core products per chunk of
                classes, float32 accumulation; S = 1 / (1 + max(0, h_i - P_i . L_j)), written in
                float32. Reads 4 x 2 B per class and row or column of the tile.
    select      one program: one row, in registers. Finds the kept patches by a threshold search,
                scales, normalises, writes the row in the wanted type over its own
                similarities. Reads 4 B and writes 2 or 4 B an entry; the row is read once.

A_f takes the place of S row by row, so 4 B an entry are kept and no more: in half precision its
rows lie twice their length apart. `apply_feedback` does the last two launches for a block of rows
at a time and multiplies each block at once, so it keeps no N x N matrix at all.

Why halves: x = hi + lo with hi = half(x), lo = half(x - hi) keeps 22 bits, so hi hi + hi lo + lo hi
is as exact as float32 at the rate of half precision. P is scaled by 1024 to keep lo out of the
subnormal numbers. KL does not change when one row m is taken from all of l, and any m will do: the
mean of l over a few patches makes L small without a pass over the image that all programs wait for.

A patch with logits that are not finite gets a row of NaN; no other row keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch

_SAMPLES = 16
_P_SCALE = 1024.0
_PRUNINGS = {"confidence": 0, "ratio": 1, "threshold": 2, None: 3}

# In the workspace of similarities: a patch that no row may keep.
_ABSENT = -1.0

CONFIDENCE: tl.constexpr = tl.constexpr(0)
RATIO: tl.constexpr = tl.constexpr(1)
THRESHOLD: tl.constexpr = tl.constexpr(2)
ABSENT: tl.constexpr = tl.constexpr(_ABSENT)
P_SCALE: tl.constexpr = tl.constexpr(_P_SCALE)
FLOOR: tl.constexpr = tl.constexpr(1e-10)


# --------------------------------------------------------------------------------------------------
# isolate


@triton.jit
def _load_difference(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM: tl.constexpr):
    """Logits minus uniform logits of a tile, float32; -inf outside."""
    c = c.to(tl.int64)[None, :]
    z = tl.load(z_row[:, None] + c * stride_zc, mask=mask, other=0.0).to(tl.float32)
    if HAS_UNIFORM:
        z -= tl.load(u_row[:, None] + c * stride_uc, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, z, float("-inf"))


@triton.jit
def _softmax_statistics(
    z_row,
    u_row,
    stride_zc,
    stride_uc,
    valid,
    C,
    HAS_UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maximum and sum of exponentials of rows, by chunks; NaN where a logit is not finite."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    # NaN - and inf - inf - in any logit makes this NaN; maxima alone may drop a NaN.
    alarm = tl.zeros((ROWS,), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (c < C)[None, :]
        x = _load_difference(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM)
        inside = tl.where(mask, x, 0.0)
        alarm += tl.sum(inside - inside, axis=1)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        # Rows outside have no finite maximum yet; keep exp away from inf - inf.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - reference) + tl.sum(tl.exp(x - reference[:, None]), axis=1)
        top = new_top
    return top, total + alarm


@triton.jit(do_not_specialize=["N", "C"])
def _isolate_kernel(
    z_ptr,
    u_ptr,
    operands_ptr,
    h_ptr,
    N,
    C,
    stride_zb,
    stride_zn,
    stride_zc,
    stride_ub,
    stride_un,
    stride_uc,
    stride_operand,
    padded_C,
    HAS_UNIFORM: tl.constexpr,
    COSINE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < N
    z_image = z_ptr + b * stride_zb
    u_image = u_ptr + b * stride_ub
    z_row = z_image + n.to(tl.int64) * stride_zn
    u_row = u_image + n.to(tl.int64) * stride_un
    top, total = _softmax_statistics(
        z_row, u_row, stride_zc, stride_uc, valid, C, HAS_UNIFORM, BLOCK_N, BLOCK_C
    )
    intact = valid & (total == total) & (total < float("inf"))

    # The patches that the centre is the mean of, the same ones for every program of the image.
    s = (tl.arange(0, SAMPLES).to(tl.int64) * N) // SAMPLES
    z_sample = z_image + s * stride_zn
    u_sample = u_image + s * stride_un
    anywhere = tl.full((SAMPLES,), 1, tl.int1)
    if not COSINE:
        sample_top, sample_total = _softmax_statistics(
            z_sample, u_sample, stride_zc, stride_uc, anywhere, C, HAS_UNIFORM, SAMPLES, BLOCK_C
        )
        sample_intact = (sample_total == sample_total) & (sample_total < float("inf"))
        samples = tl.maximum(tl.sum(sample_intact.to(tl.float32), axis=0), 1.0)

    # Cosine needs the length of each row of P before it can be written.
    squares = tl.zeros((BLOCK_N,), tl.float32)
    if COSINE:
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = valid[:, None] & (c < C)[None, :]
            x = _load_difference(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM)
            p = tl.where(mask, tl.exp(x - top[:, None]) / total[:, None], 0.0)
            squares += tl.sum(p * p, axis=1)

    h = tl.zeros((BLOCK_N,), tl.float32)
    row = (b * N + n) * padded_C
    for start in range(0, padded_C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (c < C)[None, :]
        x = _load_difference(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM)
        p = tl.exp(x - top[:, None]) / total[:, None]
        p = tl.where(mask & intact[:, None], p, 0.0)
        if COSINE:
            p = p / tl.maximum(tl.sqrt(squares), 1e-12)[:, None]
            p = tl.where(mask & intact[:, None], p, 0.0)
            right = p
        else:
            sample_mask = anywhere[:, None] & (c < C)[None, :]
            y = _load_difference(
                z_sample, u_sample, stride_zc, stride_uc, c, sample_mask, HAS_UNIFORM
            )
            y = tl.log(tl.exp(y - sample_top[:, None]) / sample_total[:, None] + FLOOR)
            y = tl.where(sample_mask & sample_intact[:, None], y, 0.0)
            centre = tl.sum(y, axis=0) / samples
            right = tl.log(p + FLOOR) - centre[None, :]
            right = tl.where(mask & intact[:, None], right, 0.0)
            h += tl.sum(p * right, axis=1)
        left = p * P_SCALE
        left_high = left.to(tl.float16)
        right_high = right.to(tl.float16)
        out = operands_ptr + row[:, None] + c[None, :]
        to_next = tl.cast(stride_operand, tl.int64)
        inside = valid[:, None] & (c < padded_C)[None, :]
        tl.store(out, left_high, mask=inside)
        tl.store(out + to_next, (left - left_high.to(tl.float32)).to(tl.float16), inside)
        tl.store(out + 2 * to_next, right_high, mask=inside)
        tl.store(out + 3 * to_next, (right - right_high.to(tl.float32)).to(tl.float16), inside)
    tl.store(h_ptr + b * N + n, tl.where(intact, h, float("nan")), mask=valid)


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
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    b = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    place = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = first_row + place
    j = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    total = total / P_SCALE

    h_j = tl.load(h_ptr + b * N + j, mask=j < N, other=0.0)
    if COSINE:
        S = tl.minimum(tl.maximum(total, 0.0), 1.0)
    else:
        h_i = tl.load(h_ptr + b * N + i, mask=place < rows, other=0.0)
        S = 1.0 / (1.0 + tl.maximum(h_i[:, None] - total, 0.0))
    S = tl.where((h_j == h_j)[None, :], S, ABSENT)
    out = s_ptr + (b * rows + place)[:, None] * padded_N + j[None, :]
    tl.store(out, S, mask=inside & columns)


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
    S = tl.load(s_ptr + row * padded_N + j, mask=j < N, other=ABSENT)
    largest = tl.max(S, axis=0)

    if PRUNING <= RATIO:
        weight = _weight(S, PRUNING)
        # `limit` is the number of patches for a ratio; for confidence, `share` of the whole mass.
        target = share * tl.sum(weight, axis=0) if PRUNING == CONFIDENCE else limit
        # Sought: v, the largest value in the row with mass(S >= v) > target, the first that does
        # not fit whole. Invariant: low <= v <= high, and both occur in the row:
        # mass(S >= low) > target, and mass(S >= x) <= target for every value x above high.
        # Each step halves the interval and then shrinks it to values that occur, so it ends with
        # low == high == v, whatever the rounding of the pivot.
        low = tl.min(tl.where(S >= 0.0, S, 2.0), axis=0)
        high = largest
        while low < high:
            pivot = low + 0.5 * (high - low)
            pivot = tl.where(pivot > low, pivot, high)
            mass = tl.sum(tl.where(S >= pivot, weight, 0.0), axis=0)
            if mass > target:
                low = tl.min(tl.where(S >= pivot, S, 2.0), axis=0)
            else:
                high = tl.max(tl.where(S < pivot, S, ABSENT), axis=0)
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
    tl.store(out, attention.to(out_ptr.dtype.element_ty), mask=j < N)


@triton.jit
def _piece(s_row, start, N, BLOCK_N: tl.constexpr):
    j = start + tl.arange(0, BLOCK_N)
    return tl.load(s_row + j, mask=j < N, other=ABSENT)


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
        S = _piece(s_row, start, N, BLOCK_N)
        largest = tl.maximum(largest, tl.max(S, axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(S >= 0.0, S, 2.0), axis=0))
        mass += tl.sum(_weight(S, PRUNING), axis=0)

    # What is kept: all above `low`, and the first `room` of those equal to it.
    if PRUNING <= RATIO:
        target = share * mass if PRUNING == CONFIDENCE else limit
        low = smallest
        high = largest
        while low < high:
            pivot = low + 0.5 * (high - low)
            pivot = tl.where(pivot > low, pivot, high)
            mass = 0.0
            next_low = 2.0
            next_high = ABSENT
            for start in range(0, N, BLOCK_N):
                S = _piece(s_row, start, N, BLOCK_N)
                mass += tl.sum(tl.where(S >= pivot, _weight(S, PRUNING), 0.0), axis=0)
                next_low = tl.minimum(next_low, tl.min(tl.where(S >= pivot, S, 2.0), axis=0))
                next_high = tl.maximum(next_high, tl.max(tl.where(S < pivot, S, ABSENT), axis=0))
            if mass > target:
                low = next_low
            else:
                high = next_high
        above = 0.0
        for start in range(0, N, BLOCK_N):
            S = _piece(s_row, start, N, BLOCK_N)
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
        S = _piece(s_row, start, N, BLOCK_N)
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
        S = _piece(s_row, start, N, BLOCK_N)
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
        tl.store(out, attention.to(out_ptr.dtype.element_ty), mask=j < N)


# --------------------------------------------------------------------------------------------------
# The launchers

# Workspace of `apply_feedback` for similarities, in bytes, and the rows of an image that it must
# hold: whole tiles of the similarity kernel.
_BLOCK_BYTES = 24 << 20
_BLOCK_ROWS = 128


def feedback_attention(
    patch_logits: Tensor, uniform_logits: Tensor | None, *, dtype: torch.dtype, **options: object
) -> Tensor:
    """A_f (B,N,N), with `launch.result_strides`.

    Args:
        patch_logits: (B,N,C), scaled; float16, bfloat16 or float32; any strides.
        uniform_logits: (B,1,C) or (B,N,C), scaled, or None.
        dtype: of A_f: float16, bfloat16 or float32.
        **options: as in `_Options`.

    Takes 4 B N^2 bytes, the result among them, and (8 C + 4) B N besides.
    """
    feedback = Feedback(patch_logits, uniform_logits, **options)
    return feedback.rows(0, patch_logits.shape[1], dtype)


def apply_feedback(
    patch_logits: Tensor, uniform_logits: Tensor | None, columns: Tensor, **options: object
) -> Tensor:
    """A_f times columns (B,N,K), by blocks of rows; no N x N matrix is kept.

    Args:
        patch_logits, uniform_logits, **options: as `feedback_attention` takes them.
        columns: (B,N,K) float16, bfloat16 or float32; A_f is rounded to their type.

    Takes (8 C + 4) B N bytes besides the result (B,N,K), and for similarities 24 MiB or 128 rows of
    each image, whichever is more.
    """
    B, N, _ = patch_logits.shape
    feedback = Feedback(patch_logits, uniform_logits, **options)
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
    similarity: str = "kl"
    pruning: str | None = "confidence"
    ratio: float = 0.4
    threshold: float = 0.5
    scaling: bool = True
    precision: str = "exact"


class Feedback:
    """A_f of some images, whole or by blocks of rows; the first launch is done at once."""

    def __init__(
        self, patch_logits: Tensor, uniform_logits: Tensor | None, **options: object
    ) -> None:
        B, N, C = patch_logits.shape
        self.options = _Options(**options)
        self.shape = (B, N, C)
        self.padded_C = launch.round_up(C, launch.CLASS_STEP)
        device = patch_logits.device
        self.operands = torch.empty((4, B, N, self.padded_C), dtype=torch.float16, device=device)
        self.h = torch.empty((B, N), dtype=torch.float32, device=device)
        uniform = patch_logits if uniform_logits is None else uniform_logits.expand_as(patch_logits)
        plan = launch.isolate(C)
        with launch.on_device(patch_logits):
            _isolate_kernel[(B * triton.cdiv(N, plan.constants["BLOCK_N"]),)](
                patch_logits,
                uniform,
                self.operands,
                self.h,
                N,
                C,
                *patch_logits.stride(),
                *uniform.stride(),
                self.operands.stride(0),
                self.padded_C,
                HAS_UNIFORM=uniform_logits is not None,
                COSINE=self.options.similarity == "cosine",
                SAMPLES=_SAMPLES,
                **plan.arguments(),
            )

    def rows(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows `first` to `first + count` of A_f, (B,count,N) in `dtype`, in two launches."""
        B, N, _ = self.shape
        options = self.options
        padded_N = launch.padded_row(N)
        S = torch.empty((B, count, padded_N), dtype=torch.float32, device=self.h.device)
        out = S.view(dtype)
        limit = options.threshold
        if options.pruning == "ratio":
            limit = max(1, math.floor(options.ratio * N))
        with launch.on_device(S):
            plan = launch.similarity(N)
            tiles = triton.cdiv(count, plan.constants["BLOCK_M"]) * triton.cdiv(
                N, plan.constants["BLOCK_N"]
            )
            _similarity_kernel[(B * tiles,)](
                self.operands,
                self.h,
                S,
                N,
                first,
                count,
                self.operands.stride(0),
                self.padded_C,
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
                self.h,
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
