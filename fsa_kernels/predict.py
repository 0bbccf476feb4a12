"""Features and texts -> the operands of the similarity product, in one launch.

One program: a tile of rows as in `fsa_kernels.isolate`, with the image's uniform row below the
samples where there is one. The scaled cosines of its rows with all texts stay in registers up to
256 classes, and go on as logits do; more classes come in chunks, through a workspace of the
program's own in float32. Where every patch has a uniform row of its own, a second product takes
those.

Reads the features once for each chunk of classes (cached) and all texts once a program. Texts come
as two halves in products with float16 features, so cosines are as exact as in float32; bfloat16 and
float32 features take three tf32 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch, runtime
from fsa_kernels.isolate import Operands, tile_rows, write_operands


@triton.jit
def _times_text(x, text, total, HALVES: tl.constexpr):
    """total + x @ text, as exactly as float32."""
    text = text.to(tl.float32)
    if HALVES:
        # Halves times halves are exact in float32. The small product first.
        high = text.to(tl.float16)
        low = (text - high.to(tl.float32)).to(tl.float16)
        total = tl.dot(x, low, total)
        total = tl.dot(x, high, total)
    else:
        total = tl.dot(x.to(tl.float32), text, total, input_precision="tf32x3")
    return total


@triton.jit
def _logits(
    x_row,
    stride_xe,
    known,
    scale,
    text_ptr,
    stride_tc,
    stride_te,
    c,
    C,
    E,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Logits (ROWS,BLOCK_C) of classes c: scaled cosines of rows of features with texts.

    Args:
        x_row: (ROWS,1) pointers to the first feature of each row.
        stride_xe: from one feature to the next, of all rows or (ROWS,1).
        known: (ROWS,) rows that have features.
        scale: of the cosines, of all rows or (ROWS,).
    """
    HALVES: tl.constexpr = x_row.dtype.element_ty == tl.float16
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_E), tl.float32)
    text_row = text_ptr + c.to(tl.int64)[None, :] * stride_tc
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        at = e.to(tl.int64)
        mask = known[:, None] & (e < E)[None, :]
        x = tl.load(x_row + at[None, :] * stride_xe, mask=mask, other=0.0)
        text_mask = (e < E)[:, None] & (c < C)[None, :]
        text = tl.load(text_row + at[:, None] * stride_te, mask=text_mask, other=0.0)
        total = _times_text(x, text, total, HALVES)
        x = x.to(tl.float32)
        squares += x * x
    factor = scale / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), 1e-12)
    return total * factor[:, None]


@triton.jit
def _isolated_logits(
    x_row,
    u_row,
    stride_xe,
    stride_ue,
    known,
    scale,
    uniform_scale,
    text_ptr,
    stride_tc,
    stride_te,
    c,
    C,
    E,
    UNIFORM_ROW: tl.constexpr,
    UNIFORM_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Logits (ROWS,BLOCK_C) of classes c minus uniform logits; -inf outside.

    Args:
        x_row: (ROWS,) pointers to the first feature of each row.
        u_row: the same of the uniform features, or if UNIFORM_ROW one pointer for all.
        known: (ROWS,) rows that have features.
    """
    x_row = x_row[:, None]
    given = known
    if UNIFORM_ROW:
        # The last row of the tile is the uniform one: one product does for both.
        is_uniform = tl.arange(0, ROWS) == ROWS - 1
        x_row = tl.where(is_uniform[:, None], u_row, x_row)
        stride_xe = tl.where(is_uniform[:, None], stride_ue, stride_xe)
        scale = tl.where(is_uniform, uniform_scale, scale)
        given = known | is_uniform
    z = _logits(
        x_row, stride_xe, given, scale, text_ptr, stride_tc, stride_te, c, C, E, ROWS, BLOCK_C,
        BLOCK_E,
    )  # fmt: skip
    if UNIFORM_ROW:
        z -= tl.sum(tl.where(is_uniform[:, None], z, 0.0), axis=0)[None, :]
    if UNIFORM_TILE:
        z -= _logits(
            u_row[:, None], stride_ue, known, uniform_scale, text_ptr, stride_tc, stride_te, c, C,
            E, ROWS, BLOCK_C, BLOCK_E,
        )  # fmt: skip
    return tl.where(known[:, None] & (c < C)[None, :], z, float("-inf"))


@triton.jit(do_not_specialize=["N", "C"])
def _predict_kernel(
    x_ptr,
    u_ptr,
    text_ptr,
    logits_ptr,
    operands_ptr,
    h_ptr,
    N,
    C,
    E,
    scale,
    uniform_scale,
    stride_xb,
    stride_xn,
    stride_xe,
    stride_ub,
    stride_un,
    stride_ue,
    stride_tc,
    stride_te,
    stride_operand,
    padded_C,
    UNIFORM_ROW: tl.constexpr,
    UNIFORM_TILE: tl.constexpr,
    COSINE: tl.constexpr,
    WHOLE: tl.constexpr,
    PATCHES: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tiles = tl.cdiv(N, PATCHES)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n, is_patch, is_sample = tile_rows(tl.program_id(0) % tiles, N, PATCHES, SAMPLES, ROWS)
    known = is_patch | is_sample
    x_row = x_ptr + b * stride_xb + n * stride_xn
    u_row = u_ptr + b * stride_ub + (n * stride_un if UNIFORM_TILE else 0)
    x = None
    z_row = None
    if WHOLE:
        x = _isolated_logits(
            x_row, u_row, stride_xe, stride_ue, known, scale, uniform_scale, text_ptr, stride_tc,
            stride_te, tl.arange(0, BLOCK_C), C, E, UNIFORM_ROW, UNIFORM_TILE, ROWS, BLOCK_C,
            BLOCK_E,
        )  # fmt: skip
    else:
        # Through a workspace of the program's own.
        tile_size = tl.cast(padded_C, tl.int64) * ROWS
        r = tl.arange(0, ROWS).to(tl.int64)
        z_row = logits_ptr + tl.program_id(0) * tile_size + r * padded_C
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            z = _isolated_logits(
                x_row, u_row, stride_xe, stride_ue, known, scale, uniform_scale, text_ptr,
                stride_tc, stride_te, c, C, E, UNIFORM_ROW, UNIFORM_TILE, ROWS, BLOCK_C, BLOCK_E,
            )  # fmt: skip
            tl.store(z_row[:, None] + c[None, :], z, mask=(c < C)[None, :])
        # Each row is read by other threads than those that wrote it.
        tl.debug_barrier()
    write_operands(
        x=x,
        z_row=z_row,
        u_row=z_row,
        stride_zc=1,
        stride_uc=1,
        operands_ptr=operands_ptr,
        h_ptr=h_ptr,
        out_row=b * N + n,
        is_patch=is_patch,
        is_sample=is_sample,
        C=C,
        stride_operand=stride_operand,
        padded_C=padded_C,
        HAS_UNIFORM=False,
        COSINE=COSINE,
        WHOLE=WHOLE,
        ROWS=ROWS,
        BLOCK_C=BLOCK_C,
    )


def predict(
    features: Tensor,
    uniform_features: Tensor | None,
    text_features: Tensor,
    *,
    scale: float,
    uniform_scale: float,
    cosine: bool,
) -> Operands:
    """From features (B,N,E), of any length, and texts (C,E) of unit length; any strides.

    Args:
        features: float16, bfloat16 or float32.
        uniform_features: (B,1,E) or (B,N,E) in the same type, or None.
        text_features: float16, bfloat16 or float32.
        scale, uniform_scale: of the cosines.
        cosine: as `isolate` takes it.
    """
    B, N, E = features.shape
    C = len(text_features)
    operands = Operands.empty(B, N, C, features.device)
    padded_C = operands.halves.shape[-1]
    uniform = features if uniform_features is None else uniform_features
    uniform_row = uniform_features is not None and uniform.shape[1] == 1
    uniform_tile = uniform_features is not None and uniform.shape[1] > 1
    plan = launch.predict(C, uniform_row, features.dtype)
    programs = B * plan.blocks(PATCHES=N)
    size = 0 if plan.constants["WHOLE"] else programs * plan.constants["ROWS"] * padded_C
    logits = torch.empty((size,), dtype=torch.float32, device=features.device)
    runtime.launch(
        _predict_kernel,
        (programs, 1, 1),
        (features, uniform, text_features, logits, operands.halves, operands.h),
        (
            N,
            C,
            E,
            float(scale),
            float(uniform_scale),
            *runtime.strides(features),
            *runtime.strides(uniform),
            *text_features.stride(),
            B * N * padded_C,
            padded_C,
        ),
        plan,
        UNIFORM_ROW=uniform_row,
        UNIFORM_TILE=uniform_tile,
        COSINE=cosine,
    )
    return operands
