"""ProxyCLIP's attention: affinity of features, applied to values, without an N x N matrix.

    normalise   one program: 16 patches. Unit features in half or single precision, and the sum of
                its 16 rows in float32. Reads the features twice (cached), writes them once.
    level       one program: one image. shift * |mean of the unit features|^2, from those sums:
                mean_ij(x_i . x_j) = |mean_i x_i|^2.
    attend      one program: a block of rows of one image and up to 1024 columns of the values (640
                in float32), the result in registers, so the scores are computed once for all heads;
                wider values are shared by programs that each compute them. Flash style over blocks
                of patches: reads every feature and value once per block of rows.

The largest score of a row is its own, cos_ii = 1, so the softmax needs no running maximum: weights
are exp(gain (cos - 1)). Sums have a fixed order (no atomics): the same input gives the same bits.
A feature that is not finite makes its own image NaN, and no other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

import fsa_kernels
from fsa_kernels import launch


@triton.jit(do_not_specialize=["N", "F"])
def _normalise_kernel(
    x_ptr,
    unit_ptr,
    sums_ptr,
    N,
    F,
    stride_xb,
    stride_xn,
    stride_xf,
    padded_F,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (n < N)[:, None]
    x_row = x_ptr + b * stride_xb + n.to(tl.int64)[:, None] * stride_xn
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = rows & (f < F)[None, :]
        x = tl.load(x_row + f.to(tl.int64)[None, :] * stride_xf, mask=mask, other=0.0).to(
            tl.float32
        )
        squares += tl.sum(x * x, axis=1)
    length = tl.maximum(tl.sqrt(squares), 1e-12)
    for start in range(0, padded_F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = rows & (f < F)[None, :]
        x = tl.load(x_row + f.to(tl.int64)[None, :] * stride_xf, mask=mask, other=0.0).to(
            tl.float32
        )
        unit = x / length[:, None]
        unit = tl.where(mask, unit, 0.0)
        inside = (f < padded_F)[None, :]
        out = unit_ptr + (b * N + n)[:, None] * padded_F + f[None, :]
        tl.store(out, unit.to(unit_ptr.dtype.element_ty), mask=rows & inside)
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * padded_F + f
        tl.store(sums, tl.sum(unit, axis=0), mask=f < padded_F)


@triton.jit(do_not_specialize=["N", "blocks"])
def _level_kernel(sums_ptr, level_ptr, N, blocks, shift, padded_F, BLOCK_F: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    square = 0.0
    for start in range(0, padded_F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        total = tl.zeros((BLOCK_F,), tl.float32)
        for block in range(0, blocks):
            sums = sums_ptr + (b * blocks + block) * padded_F + f
            total += tl.load(sums, mask=f < padded_F, other=0.0)
        mean = total / N
        square += tl.sum(mean * mean, axis=0)
    tl.store(level_ptr + b, shift * square)


@triton.jit
def _accumulate(total, weight, v_rows, columns, D, stride_vd, rows, DOT_PRECISION: tl.constexpr):
    """total + weight @ some columns of the values."""
    mask = rows & (columns < D)[None, :]
    v = tl.load(v_rows + columns.to(tl.int64)[None, :] * stride_vd, mask=mask, other=0.0)
    return tl.dot(weight.to(v.dtype), v, total, input_precision=DOT_PRECISION)


@triton.jit
def _finish(total, mass, v_rows, out_rows, columns, D, stride_vd, rows):
    """Writes some columns of the result; a row without any weight is its own value."""
    mask = rows & (columns < D)[None, :]
    own = tl.load(v_rows + columns.to(tl.int64)[None, :] * stride_vd, mask=mask, other=0.0).to(
        tl.float32
    )
    result = tl.where((mass == 0.0)[:, None], own, total / mass[:, None])
    tl.store(out_rows + columns[None, :], result.to(out_rows.dtype.element_ty), mask=mask)


# D belongs to the model: let the compiler see that it is a multiple of 16, so accesses are wide.
@triton.jit(do_not_specialize=["N"])
def _attend_kernel(
    unit_ptr,
    level_ptr,
    v_ptr,
    out_ptr,
    N,
    D,
    gain,
    stride_vb,
    stride_vn,
    stride_vd,
    padded_F,
    DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * (WIDE + NARROW)
    level = tl.load(level_ptr + b)
    f = tl.arange(0, BLOCK_F)
    wide = first + tl.arange(0, WIDE)
    rows_i = (i < N)[:, None]
    x_i = unit_ptr + (b * N + i)[:, None] * padded_F + f[None, :]
    v_image = v_ptr + b * stride_vb

    mass = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, WIDE), tl.float32)
    if NARROW > 0:
        narrow = first + WIDE + tl.arange(0, NARROW)
        rest = tl.zeros((BLOCK_M, NARROW), tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        x_j = unit_ptr + (b * N + j)[None, :] * padded_F + f[:, None]
        cosine = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, padded_F, BLOCK_F):
            left = tl.load(x_i + step, mask=rows_i, other=0.0)
            right = tl.load(x_j + step, mask=(j < N)[None, :], other=0.0)
            cosine = tl.dot(left, right, cosine, input_precision=DOT_PRECISION)
        # Written so that NaN stays NaN.
        masked = (cosine < level) | (j >= N)[None, :]
        weight = tl.where(masked, 0.0, tl.exp(gain * (cosine - 1.0)))
        mass += tl.sum(weight, axis=1)
        rows_j = (j < N)[:, None]
        v_j = v_image + j.to(tl.int64)[:, None] * stride_vn
        total = _accumulate(total, weight, v_j, wide, D, stride_vd, rows_j, DOT_PRECISION)
        if NARROW > 0:
            rest = _accumulate(rest, weight, v_j, narrow, D, stride_vd, rows_j, DOT_PRECISION)

    v_i = v_image + i.to(tl.int64)[:, None] * stride_vn
    out = out_ptr + (b * N + i)[:, None] * D
    _finish(total, mass, v_i, out, wide, D, stride_vd, rows_i)
    if NARROW > 0:
        _finish(rest, mass, v_i, out, narrow, D, stride_vd, rows_i)


def proxy_attention(features: Tensor, value: Tensor, *, shift: float, gain: float) -> Tensor:
    """Softmax of gain (cos - shift mean cos), negatives masked, applied to values.

    Args:
        features: (B,N,F); float16, bfloat16 or float32; any strides.
        value: (B,N,D) in the same type; any strides.
        shift, gain: ProxyCLIP's constants.

    Returns:
        (B,N,D). Works in one copy of the features besides.
    """
    if fsa_kernels.interpreting() and value.dtype == torch.bfloat16:
        # Triton's interpreter multiplies the bits of bfloat16 as integers.
        wide = proxy_attention(features.float(), value.float(), shift=shift, gain=gain)
        return wide.to(value.dtype)
    B, N, F = features.shape
    D = value.shape[-1]
    plan = launch.attend(D, value.dtype)
    padded_F = launch.round_up(F, plan.constants["BLOCK_F"])
    device = features.device
    # Unit features are within the range of float16, which is finer than bfloat16.
    unit_dtype = torch.float32 if features.dtype == torch.float32 else torch.float16
    unit = torch.empty((B, N, padded_F), dtype=unit_dtype, device=device)
    rows = launch.normalise(F)
    blocks = triton.cdiv(N, rows.constants["BLOCK_N"])
    sums = torch.empty((B * blocks, padded_F), dtype=torch.float32, device=device)
    level = torch.empty((B,), dtype=torch.float32, device=device)
    out = torch.empty((B, N, D), dtype=value.dtype, device=device)

    with launch.on_device(features):
        _normalise_kernel[(B * blocks,)](
            features, unit, sums, N, F, *features.stride(), padded_F, **rows.arguments()
        )
        _level_kernel[(B,)](sums, level, N, blocks, shift, padded_F, **launch.level(F).arguments())
        columns = plan.constants["WIDE"] + plan.constants["NARROW"]
        grid = (B * triton.cdiv(N, plan.constants["BLOCK_M"]), triton.cdiv(D, columns))
        _attend_kernel[grid](
            unit,
            level,
            value,
            out,
            N,
            D,
            gain,
            *value.stride(),
            padded_F,
            # Three tf32 products are as exact as float32; half types take none of it.
            DOT_PRECISION="tf32x3" if value.dtype == torch.float32 else "tf32",
            **plan.arguments(),
        )
    return out
