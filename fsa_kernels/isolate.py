"""Logits -> the operands of the similarity product, in one launch.

    P = softmax(z - u), L = log(P + 1e-10) - m, h = sum_c P L; P and L each as two halves

One program: a tile of 16 rows, which are 14 patches of one image and two samples of it. Up to 256
classes the tile holds all of them in registers, 16 values a thread, and the logits are read once;
more classes come in chunks and are read twice, for the cosine three times. Writes 4 halves for each
patch and class, 4 B for each patch.

Halves: x = high + low with high = half(x), low = half(x - high) keeps 22 bits, so high high + high
low + low high is as exact as float32 at the rate of half precision. P is scaled by 1024 to keep its
low half out of the subnormal numbers.

Centre: KL does not change when one row m is taken from all of l, and any m will do. Best is the one
that makes the terms P_i . L_j small where P_i is large: m_c = sum_s P_sc l_sc / (sum_s P_sc + 0.01)
over two samples s of the image. Every program computes it again, because a pass over the whole
image would be a launch that all programs wait for. What the samples do not predict keeps m near 0,
which is right for classes that others are nearly certain of: there l is near 0 itself. (The plain
mean would leave numbers near 20 to cancel.) A sample that is not finite counts nothing.

A patch with logits that are not finite has h = NaN and a row of zeros in P.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch, runtime
from fsa_kernels.arithmetic import LOG2E, fast_exp2

# P is scaled by this; the similarity product undoes it.
SCALE: tl.constexpr = tl.constexpr(1024.0)
FLOOR: tl.constexpr = tl.constexpr(1e-10)
# What the samples' probabilities of a class are weighed against in its centre.
NO_PREDICTION: tl.constexpr = tl.constexpr(0.01)


@triton.jit
def tile_rows(tile, N, PATCHES: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr):
    """Which patches the rows of a program's tile are: its own, then the samples, then others.

    Returns (ROWS,): the patch of each row in int64, whether it is one of the program's own, whether
    it is a sample of the image.
    """
    r = tl.arange(0, ROWS)
    is_sample = (r >= PATCHES) & (r < PATCHES + SAMPLES)
    n = tl.where(is_sample, ((r - PATCHES).to(tl.int64) * N) // SAMPLES, tile * PATCHES + r)
    return n, (r < PATCHES) & (n < N), is_sample


@triton.jit
def _exp(x):
    return fast_exp2(x * LOG2E)


@triton.jit
def load_isolated(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM: tl.constexpr):
    """Logits minus uniform logits of a tile, float32; -inf outside."""
    c = c.to(tl.int64)[None, :]
    x = tl.load(z_row[:, None] + c * stride_zc, mask=mask, other=0.0).to(tl.float32)
    if HAS_UNIFORM:
        x -= tl.load(u_row[:, None] + c * stride_uc, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x, float("-inf"))


@triton.jit
def _extend_softmax(x, mask, top, total):
    """Running maximum and sum of exponentials of rows, extended by a chunk.

    The sum becomes NaN where a logit is not finite: maxima alone may drop a NaN.
    """
    inside = tl.where(mask, x, 0.0)
    nan_if_not_finite = tl.sum(inside - inside, axis=1)
    new_top = tl.maximum(top, tl.max(x, axis=1))
    # Rows outside have no finite maximum; keep exp away from inf - inf.
    new_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    total = total * _exp(top - new_top) + tl.sum(_exp(x - new_top[:, None]), axis=1)
    return new_top, total + nan_if_not_finite


@triton.jit
def _store_halves(out, value, to_low, mask):
    """A value as the half nearest to it, and what that leaves, `to_low` entries further on."""
    high = value.to(tl.float16)
    tl.store(out, high, mask=mask)
    tl.store(out + to_low, (value - high.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def write_operands(
    x,
    z_row,
    u_row,
    stride_zc,
    stride_uc,
    operands_ptr,
    h_ptr,
    out_row,
    is_patch,
    is_sample,
    C,
    stride_operand,
    padded_C,
    HAS_UNIFORM: tl.constexpr,
    COSINE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """P, L and h of a tile's patches.

    Args:
        x: (ROWS,BLOCK_C) isolated logits, -inf outside, where all classes are one chunk; else None.
        z_row, u_row: (ROWS,) where they are not, pointers to the first logit, and uniform logit, of
            each row.
        out_row: (ROWS,) which row of the operands each row is written to, int64.
        is_patch: (ROWS,) the rows that are written.
        is_sample: (ROWS,) the rows that the centre is taken from.
        WHOLE: all padded classes are one chunk.
    """
    known = (is_patch | is_sample)[:, None]
    to_next = tl.cast(stride_operand, tl.int64)
    out = operands_ptr + out_row[:, None] * padded_C
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    chunk = tl.arange(0, BLOCK_C)
    if WHOLE:
        top, total = _extend_softmax(x, known & (chunk < C)[None, :], top, total)
    else:
        for start in range(0, C, BLOCK_C):
            c = start + chunk
            mask = known & (c < C)[None, :]
            part = load_isolated(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM)
            top, total = _extend_softmax(part, mask, top, total)
    intact = (total == total) & (total < float("inf"))
    inverse = tl.where(intact, 1.0 / total, 0.0)

    # The cosine needs the length of each row of P before it can be written.
    if COSINE:
        squares = tl.zeros((ROWS,), tl.float32)
        if WHOLE:
            p = _exp(x - top[:, None]) * inverse[:, None]
            squares = tl.sum(p * p, axis=1)
        else:
            for start in range(0, C, BLOCK_C):
                c = start + chunk
                mask = known & (c < C)[None, :]
                part = load_isolated(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM)
                p = _exp(part - top[:, None]) * inverse[:, None]
                squares += tl.sum(p * p, axis=1)
        inverse = inverse / tl.maximum(tl.sqrt(squares), 1e-12)

    counts = is_sample & intact
    h = tl.zeros((ROWS,), tl.float32)
    for start in range(0, BLOCK_C if WHOLE else padded_C, BLOCK_C):
        c = start + chunk
        if WHOLE:
            part = x
        else:
            mask = known & (c < C)[None, :]
            part = load_isolated(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM)
        # Zero outside, where the logits are -inf.
        p = tl.where(intact[:, None], _exp(part - top[:, None]) * inverse[:, None], 0.0)
        right = p
        if not COSINE:
            log_p = tl.log(p + FLOOR)
            of_samples = tl.sum(tl.where(counts[:, None], p, 0.0), axis=0)
            centre = tl.sum(tl.where(counts[:, None], p * log_p, 0.0), axis=0)
            centre = centre / (of_samples + NO_PREDICTION)
            right = log_p - centre[None, :]
            h += tl.sum(p * right, axis=1)
        written = is_patch[:, None] & (c < padded_C)[None, :]
        _store_halves(out + c[None, :], p * SCALE, to_next, written)
        _store_halves(out + 2 * to_next + c[None, :], right, to_next, written)
    tl.store(h_ptr + out_row, tl.where(intact, h, float("nan")), mask=is_patch)


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
    WHOLE: tl.constexpr,
    PATCHES: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(N, PATCHES)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n, is_patch, is_sample = tile_rows(tl.program_id(0) % tiles, N, PATCHES, SAMPLES, ROWS)
    z_row = z_ptr + b * stride_zb + n * stride_zn
    u_row = u_ptr + b * stride_ub + n * stride_un
    x = None
    if WHOLE:
        c = tl.arange(0, BLOCK_C)
        mask = (is_patch | is_sample)[:, None] & (c < C)[None, :]
        x = load_isolated(z_row, u_row, stride_zc, stride_uc, c, mask, HAS_UNIFORM)
    write_operands(
        x=x,
        z_row=z_row,
        u_row=u_row,
        stride_zc=stride_zc,
        stride_uc=stride_uc,
        operands_ptr=operands_ptr,
        h_ptr=h_ptr,
        out_row=b * N + n,
        is_patch=is_patch,
        is_sample=is_sample,
        C=C,
        stride_operand=stride_operand,
        padded_C=padded_C,
        HAS_UNIFORM=HAS_UNIFORM,
        COSINE=COSINE,
        WHOLE=WHOLE,
        ROWS=ROWS,
        BLOCK_C=BLOCK_C,
    )


class Operands(NamedTuple):
    """Of the similarity product S = 1 / (1 + max(0, h_i - P_i . L_j)).

    Attributes:
        halves: (4,B,N,padded C) float16: 1024 P, what rounding left of it, L, and what it left.
        h: (B,N) float32; NaN for a patch with logits that are not finite.
    """

    halves: Tensor
    h: Tensor

    @classmethod
    def empty(cls, B: int, N: int, C: int, device: torch.device) -> Operands:
        """Memory for the operands of B images with N patches and C classes."""
        padded_C = launch.round_up(C, launch.CLASS_STEP)
        return cls(
            torch.empty((4, B, N, padded_C), dtype=torch.float16, device=device),
            torch.empty((B, N), dtype=torch.float32, device=device),
        )


def isolate(patch_logits: Tensor, uniform_logits: Tensor | None, *, cosine: bool) -> Operands:
    """From logits (B,N,C) and uniform logits (B,1,C), (B,N,C) or None; any strides.

    Args:
        patch_logits, uniform_logits: float16, bfloat16 or float32.
        cosine: L is P and both have unit length, h does not count.
    """
    B, N, C = patch_logits.shape
    operands = Operands.empty(B, N, C, patch_logits.device)
    padded_C = operands.halves.shape[-1]
    uniform = patch_logits if uniform_logits is None else uniform_logits
    image, row, column = runtime.strides(uniform)
    uniform_strides = (image, row if uniform.shape[1] == N else 0, column)
    plan = launch.isolate(C)
    runtime.launch(
        _isolate_kernel,
        (B * plan.blocks(PATCHES=N), 1, 1),
        (patch_logits, uniform, operands.halves, operands.h),
        (
            N,
            C,
            *runtime.strides(patch_logits),
            *uniform_strides,
            B * N * padded_C,
            padded_C,
        ),
        plan,
        HAS_UNIFORM=uniform_logits is not None,
        COSINE=cosine,
    )
    return operands
