"""What a feedback step takes of values and attended values, laid out for its products.

    gather      one program: 16 rows of one image and 64 columns; or for 16 columns the mean of all
                values, row by row. Moves each value once, and once more for the mean.

Without it, the mean, its place after the attended rows, the heads side by side, the sum of the
terms that A_f is multiplied with and their scale are five launches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch, runtime
from fsa_kernels.options import Adaptations

# What the first D columns hold; see `Adaptations`.
ATTENDED: tl.constexpr = tl.constexpr(1)
VALUE: tl.constexpr = tl.constexpr(2)


@triton.jit
def columns_width(D, SECOND: tl.constexpr):
    """How many columns A_f is multiplied with, in int64."""
    return tl.cast(D, tl.int64) * (2 if SECOND else 1)


@triton.jit
def write_columns(
    columns,
    n,
    c,
    mask,
    attended,
    value,
    D,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Rows n of an image's columns, from columns c of A V and of V (float32), scaled.

    Args:
        FIRST, SECOND: as in `Adaptations`.
    """
    to_type = columns.dtype.element_ty
    out = columns + n.to(tl.int64)[:, None] * columns_width(D, SECOND) + c[None, :]
    if FIRST == ATTENDED:
        first = attended
    elif FIRST == VALUE:
        first = value
    else:
        first = attended + value
    tl.store(out, (first * scale).to(to_type), mask=mask)
    if SECOND:
        tl.store(out + D, (value * scale).to(to_type), mask=mask)


@triton.jit
def _columns_of_heads(c, d, stride_h, stride_d):
    """Offsets of columns c of heads side by side, each of width d."""
    return (c // d).to(tl.int64) * stride_h + (c % d).to(tl.int64) * stride_d


@triton.jit
def _write_mean(
    v_image,
    out_row,
    L,
    D,
    d,
    stride_vh,
    stride_vn,
    stride_vd,
    tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of the mean of all L values."""
    c = tile * COLUMNS + tl.arange(0, COLUMNS)
    columns = v_image + _columns_of_heads(c, d, stride_vh, stride_vd)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, L, ROWS):
        n = start + tl.arange(0, ROWS)
        rows = columns[None, :] + n.to(tl.int64)[:, None] * stride_vn
        v = tl.load(rows, mask=(n < L)[:, None] & (c < D)[None, :], other=0.0)
        total += tl.sum(v.to(tl.float32), axis=0)
    tl.store(out_row + c, (total / L).to(out_row.dtype.element_ty), mask=c < D)


@triton.jit(do_not_specialize=["N", "L"])
def _gather_kernel(
    v_ptr,
    attended_ptr,
    gathered_ptr,
    columns_ptr,
    N,
    L,
    D,
    d,
    scale,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ab,
    stride_ah,
    stride_an,
    stride_ad,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN_ROWS: tl.constexpr,
    MEAN_COLUMNS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    wide = tl.cast(D, tl.int64)
    gathered = gathered_ptr + b * (N + 1) * wide
    v_image = v_ptr + b * stride_vb
    # First the programs of the mean, which have most to do.
    means = tl.cdiv(D, MEAN_COLUMNS)
    tile = tl.program_id(0) - means
    if tile < 0:
        _write_mean(
            v_image,
            gathered + N * wide,
            L,
            D,
            d,
            stride_vh,
            stride_vn,
            stride_vd,
            tl.program_id(0),
            MEAN_ROWS,
            MEAN_COLUMNS,
        )
        return

    tiles_d = tl.cdiv(D, BLOCK_D)
    n = (tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (c < D)[None, :]
    # The patches are the last N of the L tokens.
    v = v_image + (n + (L - N)).to(tl.int64)[:, None] * stride_vn
    v = tl.load(v + _columns_of_heads(c, d, stride_vh, stride_vd)[None, :], mask=mask, other=0.0)
    attended = attended_ptr + b * stride_ab + n.to(tl.int64)[:, None] * stride_an
    attended += _columns_of_heads(c, d, stride_ah, stride_ad)[None, :]
    attended = tl.load(attended, mask=mask, other=0.0)
    tl.store(gathered + n[:, None] * wide + c[None, :], attended, mask=mask)
    columns = columns_ptr + b * N * columns_width(D, SECOND)
    value = v.to(tl.float32)
    attended = attended.to(tl.float32)
    write_columns(columns, n, c, mask, attended, value, D, scale, FIRST, SECOND)


def gather(value: Tensor, attended: Tensor, adaptations: Adaptations) -> tuple[Tensor, Tensor]:
    """The first half of a feedback step: what the tail takes, and what A_f is multiplied with.

    Args:
        value: V (B,H,L,d) of all tokens, those of the patches last; float16, bfloat16 or float32;
            any strides.
        attended: A V (B,H,N,d) of the patches, in the same type; any strides.
        adaptations: the terms that are averaged.

    Returns:
        A V with its heads side by side, and after its last row the mean of V, (B,N+1,D); and the
        scaled columns (B,N,D) or (B,N,2D) of `Adaptations`.
    """
    B, H, L, d = value.shape
    N, D = attended.shape[2], H * d
    shapes = adaptations.gather_shapes(B, N, D)
    gathered, columns = (value.new_empty(shape) for shape in shapes)
    plan = launch.gather()
    programs = plan.blocks(MEAN_COLUMNS=D) + plan.blocks(BLOCK_N=N, BLOCK_D=D)
    runtime.launch(
        _gather_kernel,
        (programs, B, 1),
        (value, attended, gathered, columns),
        (
            N,
            L,
            D,
            d,
            adaptations.scale(),
            *runtime.strides(value),
            *runtime.strides(attended),
        ),
        plan,
        FIRST=adaptations.first(),
        SECOND=adaptations.second(),
    )
    return gathered, columns
