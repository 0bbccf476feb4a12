"""Features and texts -> the operands of the similarity product, in one launch.

One program: a tile of rows as in `fsa_kernels.isolate`, with the image's uniform row below the
samples where there is one. The scaled cosines of its rows with all texts go through a workspace of
its own, in float32, and then on as logits do. Where every patch has a uniform row of its own, a
second tile holds those.

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
from fsa_kernels.isolate import SCALE, Operands, tile_rows, write_operands


@triton.jit
def _times_text(x, text, total, HALVES: tl.constexpr):
    """total + x @ (SCALE text), as exactly as float32."""
    # Scaled, so that its low half is no subnormal number.
    text = text.to(tl.float32) * SCALE
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
def _write_logits(
    x_row,
    stride_xe,
    has_x,
    u_row,
    stride_ue,
    is_uniform,
    scale,
    text_ptr,
    stride_tc,
    stride_te,
    logits_ptr,
    padded_C,
    C,
    E,
    UNIFORM_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Logits (ROWS,padded C) of a tile: scaled cosines of its rows of features with all texts.

    Args:
        x_row: (ROWS,) pointers to the first feature of each row.
        has_x: (ROWS,) rows whose features lie there.
        u_row: pointer to the first feature of the image's uniform row; read if UNIFORM_ROW.
        is_uniform: (ROWS,) the row that is the uniform row.
        scale: (ROWS,) of the cosines.
    """
    HALVES: tl.constexpr = x_row.dtype.element_ty == tl.float16
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        total = tl.zeros((ROWS, BLOCK_C), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        text_row = text_ptr + c.to(tl.int64)[None, :] * stride_tc
        for start in range(0, E, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            at = e.to(tl.int64)
            wide = (e < E)[None, :]
            x = tl.load(
                x_row[:, None] + at[None, :] * stride_xe, mask=has_x[:, None] & wide, other=0.0
            )
            if UNIFORM_ROW:
                u = u_row + rows * 0 + at[None, :] * stride_ue
                x += tl.load(u, mask=is_uniform[:, None] & wide, other=0.0)
            text_mask = (e < E)[:, None] & (c < C)[None, :]
            text = tl.load(text_row + at[:, None] * stride_te, mask=text_mask, other=0.0)
            total = _times_text(x, text, total, HALVES)
            x = x.to(tl.float32)
            squares += tl.sum(x * x, axis=1)
        factor = scale / SCALE / tl.maximum(tl.sqrt(squares), 1e-12)
        out = logits_ptr + rows * padded_C + c[None, :]
        tl.store(out, total * factor[:, None], mask=(c < C)[None, :])


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
    CHUNK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tiles = tl.cdiv(N, PATCHES)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n, is_patch, is_sample = tile_rows(tl.program_id(0) % tiles, N, PATCHES, SAMPLES, ROWS)
    r = tl.arange(0, ROWS)
    is_uniform = r == ROWS - 1
    has_x = is_patch | is_sample
    u_image = u_ptr + b * stride_ub
    tile_size = tl.cast(padded_C, tl.int64) * ROWS
    logits = logits_ptr + tl.program_id(0) * (2 if UNIFORM_TILE else 1) * tile_size
    _write_logits(
        x_row=x_ptr + b * stride_xb + n * stride_xn,
        stride_xe=stride_xe,
        has_x=has_x,
        u_row=u_image,
        stride_ue=stride_ue,
        is_uniform=is_uniform,
        scale=tl.where(is_uniform, uniform_scale, scale) if UNIFORM_ROW else scale,
        text_ptr=text_ptr,
        stride_tc=stride_tc,
        stride_te=stride_te,
        logits_ptr=logits,
        padded_C=padded_C,
        C=C,
        E=E,
        UNIFORM_ROW=UNIFORM_ROW,
        ROWS=ROWS,
        BLOCK_C=BLOCK_C,
        BLOCK_E=BLOCK_E,
    )
    if UNIFORM_TILE:
        _write_logits(
            x_row=u_image + n * stride_un,
            stride_xe=stride_ue,
            has_x=has_x,
            u_row=u_image,
            stride_ue=stride_ue,
            is_uniform=is_uniform,
            scale=uniform_scale,
            text_ptr=text_ptr,
            stride_tc=stride_tc,
            stride_te=stride_te,
            logits_ptr=logits + tile_size,
            padded_C=padded_C,
            C=C,
            E=E,
            UNIFORM_ROW=False,
            ROWS=ROWS,
            BLOCK_C=BLOCK_C,
            BLOCK_E=BLOCK_E,
        )
    # Each row is read by other threads than those that wrote it.
    tl.debug_barrier()
    row = r.to(tl.int64) * padded_C
    u_row = logits + tile_size + row
    if UNIFORM_ROW:
        u_row = logits + tile_size - padded_C + row * 0
    write_operands(
        z_row=logits + row,
        u_row=u_row,
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
        HAS_UNIFORM=UNIFORM_ROW or UNIFORM_TILE,
        COSINE=COSINE,
        WHOLE=WHOLE,
        ROWS=ROWS,
        BLOCK_C=CHUNK_C,
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
    rows = plan.constants["ROWS"] * (2 if uniform_tile else 1)
    logits = torch.empty((programs, rows, padded_C), dtype=torch.float32, device=features.device)
    with runtime.on_device(features):
        runtime.launch(
            _predict_kernel,
            (programs,),
            features,
            uniform,
            text_features,
            logits,
            operands.halves,
            operands.h,
            N,
            C,
            E,
            float(scale),
            float(uniform_scale),
            *runtime.strides(features),
            *runtime.strides(uniform),
            *text_features.stride(),
            operands.halves.stride(0),
            padded_C,
            UNIFORM_ROW=uniform_row,
            UNIFORM_TILE=uniform_tile,
            COSINE=cosine,
            **plan.arguments(),
        )
    return operands
