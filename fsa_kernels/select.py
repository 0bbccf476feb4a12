"""Similarities -> rows of A_f, in place and in one launch.

One program: one row, up to 16,384 similarities in registers, 16 to 32 a thread, their weights
beside them. It searches the row's threshold, scales, normalises and writes the row in the result's
type over its own similarities. Shared memory holds the partial sums of warps only. Reads 4 B and
writes 2 or 4 B an entry; the row is read once. Longer rows come in pieces from the second-level
cache, once for every step of the search.

Similarities are float32 numbers >= 0, whose bits have the same order as integers: their
neighbours are found by integer minima. A patch that no row may keep is -inf, whose bits are
negative.

How exact A_f is: F = S exp(beta S) reaches e^beta, and softmax(F) turns an absolute error of F into
a relative one, so an error of S comes out e^beta (1 + beta) times as large. A_f is off by at most
2e-6 + 2e-7 e^beta (1 + beta) of its norm: 2e-5 at beta = 3, 1e-4 at 4.5, where similarities crowd
below 1; at 10 nothing is left of rows whose largest similarities lie within rounding of each other.
That comes from S, whose divergences are exact to about 1e-6; what is done with it here adds a tenth
of it. The differences F_max - F are computed as

    e^(beta S_max) (d + S (1 - e^(-beta d))),   d = S_max - S,

so that no two large numbers are subtracted.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch, runtime
from fsa_kernels.arithmetic import LOG2E, fast_exp2
from fsa_kernels.options import Options
from fsa_kernels.similarity import ABSENT

_PRUNINGS = {"confidence": 0, "ratio": 1, "threshold": 2, None: 3}

CONFIDENCE: tl.constexpr = tl.constexpr(0)
RATIO: tl.constexpr = tl.constexpr(1)
THRESHOLD: tl.constexpr = tl.constexpr(2)

# The first pivot of a long enough row is the threshold of every eighth of its entries.
SAMPLE_STRIDE: tl.constexpr = tl.constexpr(8)
SHORTEST_SAMPLED: tl.constexpr = tl.constexpr(256)


@triton.jit
def _bits(x):
    """A float32's bits as int32, which order like the numbers where those are >= 0."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weight(S, PRUNING: tl.constexpr):
    """What a patch counts towards the target: its unnormalised confidence, or one."""
    if PRUNING == CONFIDENCE:
        return fast_exp2(S * LOG2E - LOG2E)
    else:
        return (S >= 0.0).to(tl.float32)


@triton.jit
def _smallest(S):
    """The smallest of the similarities of a row, without those that are absent."""
    return _number(tl.min(_bits(S).to(tl.uint32, bitcast=True), axis=0).to(tl.int32, bitcast=True))


@triton.jit
def _smallest_from(S, pivot):
    """The smallest similarity >= pivot, of those there are."""
    distance = (_bits(S) - _bits(pivot)).to(tl.uint32, bitcast=True)
    return _number(_bits(pivot) + tl.min(distance, axis=0).to(tl.int32, bitcast=True))


@triton.jit
def _largest_below(S, pivot):
    """The largest similarity < pivot, of those there are."""
    distance = (_bits(pivot) - 1 - _bits(S)).to(tl.uint32, bitcast=True)
    return _number(_bits(pivot) - 1 - tl.min(distance, axis=0).to(tl.int32, bitcast=True))


@triton.jit
def _mass_from(S, weight, pivot):
    """The mass of the similarities >= pivot."""
    return tl.sum((S >= pivot).to(tl.float32) * weight, axis=0)


@triton.jit
def _pivot(low, high, excess, lack, step):
    """The next pivot of the search: low < pivot <= high.

    The false position: where the mass would meet the target if it were spread evenly over the
    interval, drawn 5% to the middle so that both bounds close in. Every fifth step bisects, which
    halves the interval whatever the spread.
    """
    position = tl.where(step % 5 == 4, 0.5, 0.95 * (excess / (excess + lack)) + 0.025)
    pivot = tl.minimum(low + position * (high - low), high)
    return tl.where(pivot > low, pivot, high)


@triton.jit
def _narrowed(low, high, excess, lack, value, mass, target, PRUNING: tl.constexpr):
    """The bounds of the search after a step, from the value that one of them moves to.

    `mass` is that of the similarities >= pivot, so `value` is the smallest of those if mass >
    target, the new low, and else the largest below the pivot, the new high. Where its own weight is
    what is in excess, or more than is lacking, it is the threshold, and both bounds are.
    """
    each = _weight(value, PRUNING)
    raised = mass > target
    excess = tl.where(raised, mass - target, excess)
    lack = tl.where(raised, lack, target - mass)
    found = tl.where(raised, excess <= each, lack < each)
    return (
        tl.where(raised | found, value, low),
        tl.where(raised & (found == 0), high, value),
        excess,
        lack,
    )


@triton.jit
def _search(S, weight, low, high, mass, target, first, slope, PRUNING: tl.constexpr):
    """The row's threshold v: the largest similarity with mass(S >= v) > target.

    Args:
        low, high: the smallest and the largest similarity.
        mass: of the row.
        first: where to look first, if it lies between them.
        slope: mass by similarity around `first`, for the second step; 0 where it is not known.

    Invariant: low <= v <= high, both occur in the row, mass(S >= low) = target + excess > target,
    and mass(S > high) = target - lack <= target. Every step raises low to the smallest similarity
    >= pivot or lowers high to the largest < pivot, so the search ends at low = high = v whatever
    the rounding of the pivot. v is the smallest where the whole row fits.
    """
    high = tl.where(mass > target, high, low)
    excess = mass - target
    lack = target
    guess = first
    step = 0
    while low < high:
        pivot = _pivot(low, high, excess, lack, step)
        pivot = tl.where((guess > low) & (guess <= high), guess, pivot)
        mass = _mass_from(S, weight, pivot)
        if mass > target:
            value = _smallest_from(S, pivot)
        else:
            value = _largest_below(S, pivot)
        # Half as far again as the slope says, so that the other bound moves next.
        guess = tl.where(step == 0, value + 1.5 * (mass - target) / slope, ABSENT)
        low, high, excess, lack = _narrowed(low, high, excess, lack, value, mass, target, PRUNING)
        step += 1
    return low


@triton.jit
def _search_sample(s_row, padded_N, target, PRUNING: tl.constexpr, LENGTH: tl.constexpr):
    """The threshold of every eighth entry of a row, and the row's mass by similarity around it.

    `target` is a share of the mass. Where no sample is present the threshold is -inf.
    """
    k = tl.arange(0, LENGTH) * SAMPLE_STRIDE
    S = tl.load(s_row + k, mask=k < padded_N, other=ABSENT)
    weight = _weight(S, PRUNING)
    mass = tl.sum(weight, axis=0)
    low = _smallest(S)
    high = tl.max(S, axis=0)
    threshold = _search(S, weight, low, high, mass, target * mass, ABSENT, 0.0, PRUNING)
    reach = (high - low) / 64
    near = tl.sum((tl.abs(S - threshold) <= reach).to(tl.float32) * weight, axis=0)
    return threshold, near * SAMPLE_STRIDE / (2 * reach)


@triton.jit
def _target(limit, mass, PRUNING: tl.constexpr):
    """The mass that is kept of a row: a share of its confidence, or so many patches."""
    return limit * mass if PRUNING == CONFIDENCE else limit


@triton.jit
def _room(above, target, threshold, largest, PRUNING: tl.constexpr):
    """The tie rule: how many patches at the threshold are kept, lowest index first.

    As many as fit besides the mass above them; the first of the whole order is always kept.
    """
    room = tl.floor((target - above) / _weight(threshold, PRUNING))
    return tl.where(threshold == largest, tl.maximum(room, 1.0), room)


@triton.jit
def _limited(limit, largest, N):
    """Threshold and room where the threshold is given: all that reach it, or the first of all."""
    reached = largest >= limit
    return tl.where(reached, limit, largest), tl.where(reached, N, 1).to(tl.float32)


@triton.jit
def _exponentials(S, largest, beta, SCALING: tl.constexpr):
    """exp(F - F_max); see the head of the file. For a negative beta, which lets F fall with S in
    places, the reference is F of the largest similarity all the same: F < 1 there."""
    below = largest - S
    if SCALING:
        below += S - S * fast_exp2(below * (-beta * LOG2E))
        below *= tl.exp(beta * largest)
    return fast_exp2(below * -LOG2E)


@triton.jit
def _normaliser(total, h_ptr, N, first_row, rows):
    """What the exponentials of this program's row are multiplied with: 1 / total, or NaN where the
    logits of the row's patch are not finite."""
    image = (tl.program_id(0) // rows).to(tl.int64)
    h = tl.load(h_ptr + image * N + first_row + tl.program_id(0) % rows)
    return tl.where(h == h, 1.0 / total, float("nan"))


@triton.jit
def _store(out_ptr, stride_row, j, value, padded_N):
    """Entries j of this program's row of A_f."""
    out = out_ptr + tl.program_id(0).to(tl.int64) * stride_row + j
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=j < padded_N)


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
    limit,
    PRUNING: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_row = s_ptr + tl.program_id(0).to(tl.int64) * padded_N
    j = tl.arange(0, BLOCK_N)
    S = tl.load(s_row + j, mask=j < padded_N, other=ABSENT)
    largest = tl.max(S, axis=0)
    threshold = 0.0
    room = N.to(tl.float32)

    if PRUNING <= RATIO:
        weight = _weight(S, PRUNING)
        mass = tl.sum(weight, axis=0)
        target = _target(limit, mass, PRUNING)
        first = ABSENT
        slope = 0.0
        if BLOCK_N >= SHORTEST_SAMPLED:
            first, slope = _search_sample(
                s_row, padded_N, target / mass, PRUNING, BLOCK_N // SAMPLE_STRIDE
            )
        low = _smallest(S)
        threshold = _search(S, weight, low, largest, mass, target, first, slope, PRUNING)
        above = tl.sum((S > threshold).to(tl.float32) * weight, axis=0)
        room = _room(above, target, threshold, largest, PRUNING)
    elif PRUNING == THRESHOLD:
        threshold, room = _limited(limit, largest, N)

    # What is kept has bits >= cut. Ties are counted only where some but not all of them are kept.
    cut = _bits(threshold)
    if room < 1.0:
        cut += 1
    elif room < N:
        tied = _bits(S) == cut
        S = tl.where(tied & (tl.cumsum(tied.to(tl.int32), axis=0) > room), ABSENT, S)

    exponential = tl.where(_bits(S) >= cut, _exponentials(S, largest, beta, SCALING), 0.0)
    scale = _normaliser(tl.sum(exponential, axis=0), h_ptr, N, first_row, rows)
    # Every thread has read its part of S before this: the sum above took all of them.
    _store(out_ptr, stride_row, j, exponential * scale, padded_N)


@triton.jit
def _piece(s_row, start, padded_N, BLOCK_N: tl.constexpr):
    j = start + tl.arange(0, BLOCK_N)
    return tl.load(s_row + j, mask=j < padded_N, other=ABSENT)


@triton.jit
def _kept_exponentials(S, seen, threshold, room, largest, beta, SCALING: tl.constexpr):
    """Exponentials of what is kept of a piece, and how many ties there were up to its end."""
    tied = S == threshold
    kept = (S > threshold) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) + seen <= room))
    exponential = tl.where(kept, _exponentials(S, largest, beta, SCALING), 0.0)
    return exponential, seen + tl.sum(tied.to(tl.int32), axis=0)


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
    limit,
    PRUNING: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`_select_kernel` for rows that registers cannot hold: the same search, piece by piece."""
    s_row = s_ptr + tl.program_id(0).to(tl.int64) * padded_N
    largest = ABSENT
    smallest = 2.0
    mass = 0.0
    for start in range(0, N, BLOCK_N):
        S = _piece(s_row, start, padded_N, BLOCK_N)
        largest = tl.maximum(largest, tl.max(S, axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(S >= 0.0, S, 2.0), axis=0))
        mass += tl.sum(_weight(S, PRUNING), axis=0)
    threshold = 0.0
    room = N.to(tl.float32)

    if PRUNING <= RATIO:
        target = _target(limit, mass, PRUNING)
        # The search of `_search`.
        low = smallest
        high = tl.where(mass > target, largest, smallest)
        excess = mass - target
        lack = target
        step = 0
        while low < high:
            pivot = _pivot(low, high, excess, lack, step)
            mass = 0.0
            above = 2.0
            below = ABSENT
            for start in range(0, N, BLOCK_N):
                S = _piece(s_row, start, padded_N, BLOCK_N)
                mass += _mass_from(S, _weight(S, PRUNING), pivot)
                above = tl.minimum(above, tl.min(tl.where(S >= pivot, S, 2.0), axis=0))
                below = tl.maximum(below, tl.max(tl.where(S < pivot, S, ABSENT), axis=0))
            value = tl.where(mass > target, above, below)
            low, high, excess, lack = _narrowed(
                low, high, excess, lack, value, mass, target, PRUNING
            )
            step += 1
        threshold = low
        above = 0.0
        for start in range(0, N, BLOCK_N):
            S = _piece(s_row, start, padded_N, BLOCK_N)
            above += tl.sum((S > threshold).to(tl.float32) * _weight(S, PRUNING), axis=0)
        room = _room(above, target, threshold, largest, PRUNING)
    elif PRUNING == THRESHOLD:
        threshold, room = _limited(limit, largest, N)

    total = 0.0
    seen = 0
    for start in range(0, N, BLOCK_N):
        S = _piece(s_row, start, padded_N, BLOCK_N)
        exponential, seen = _kept_exponentials(S, seen, threshold, room, largest, beta, SCALING)
        total += tl.sum(exponential, axis=0)

    scale = _normaliser(total, h_ptr, N, first_row, rows)
    seen = 0
    for start in range(0, N, BLOCK_N):
        S = _piece(s_row, start, padded_N, BLOCK_N)
        exponential, seen = _kept_exponentials(S, seen, threshold, room, largest, beta, SCALING)
        # In half precision this piece ends before the next one of S begins; all threads must have
        # read this one.
        tl.debug_barrier()
        j = start + tl.arange(0, BLOCK_N)
        _store(out_ptr, stride_row, j, exponential * scale, padded_N)


def select(
    S: Tensor,
    h: Tensor,
    first_row: int,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of A_f (B,rows,N) in `dtype`, over the memory of S (B,rows,padded N).

    Args:
        S: of `similarity`; overwritten.
        h: (B,N), NaN for patches whose row is NaN.
        first_row: the patch that the first row belongs to.
        options: how A_f is made; `beta` within 80 of 0, beyond which its exponential overflows.
        dtype: float16, bfloat16 or float32.
    """
    B, rows, padded_N = S.shape
    N = h.shape[1]
    out = S.view(dtype)
    limit = {
        "confidence": options.confidence,
        "ratio": max(1, math.floor(options.ratio * N)),
        # The bits of -0.0 are negative.
        "threshold": options.threshold + 0.0,
        None: 0.0,
    }[options.pruning]
    if N <= launch.LONGEST_ROW_IN_REGISTERS:
        kernel, plan = _select_kernel, launch.select(N)
    else:
        kernel, plan = _select_long_kernel, launch.select_long()
    runtime.launch(
        kernel,
        (B * rows, 1, 1),
        (S, h, out),
        (N, first_row, rows, padded_N, out.stride(1), float(options.beta), float(limit)),
        plan,
        PRUNING=_PRUNINGS[options.pruning],
        SCALING=options.scaling,
    )
    return out[:, :, :N]
