"""Class predictions -> the operands of the similarity product, in one launch.

    isolate     from logits. One program: 8 or 16 patches of one image, all classes in chunks.
                P = softmax(z - u), L = log(P + 1e-10) - m, h = sum_c P L; P and L each as two
                halves. Reads the logits three times (cached), writes 4 x B N C halves.
    predict     the same from features and texts. One program: 16 patches, whose cosines with all
                texts go through a workspace of its own, as what isolate reads. Reads the features
                once for every chunk of classes (cached) and all texts once; each program computes
                the 16 samples of the centre again, which is cheaper than a launch to share them.

Why halves: x = hi + lo with hi = half(x), lo = half(x - hi) keeps 22 bits, so hi hi + hi lo + lo hi
is as exact as float32 at the rate of half precision. P is scaled by 1024 to keep lo out of the
subnormal numbers. KL does not change when one row m is taken from all of l, and any m will do: the
mean of l over a few patches makes L small without a pass over the image that all programs wait for.

A patch with logits that are not finite has h = NaN and operands of zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch

_SAMPLES = 16
_SCALE = 1024.0

# Of P, undone by the similarity product; and of texts, undone here.
SCALE: tl.constexpr = tl.constexpr(_SCALE)
FLOOR: tl.constexpr = tl.constexpr(1e-10)

# How many uniform rows there are: none, one for an image, one for each of its patches.
_NONE, _ONE, _EACH = 0, 1, 2
NONE: tl.constexpr = tl.constexpr(_NONE)
ONE: tl.constexpr = tl.constexpr(_ONE)
EACH: tl.constexpr = tl.constexpr(_EACH)


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


@triton.jit
def _write_operands(
    z_row,
    u_row,
    z_sample,
    u_sample,
    is_sample,
    stride_zc,
    stride_uc,
    operands_ptr,
    h_ptr,
    b,
    n,
    N,
    C,
    stride_operand,
    padded_C,
    HAS_UNIFORM: tl.constexpr,
    COSINE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From where the logits of patches `n` of image `b`, and of some samples of it, lie."""
    valid = n < N
    top, total = _softmax_statistics(
        z_row, u_row, stride_zc, stride_uc, valid, C, HAS_UNIFORM, BLOCK_N, BLOCK_C
    )
    intact = valid & (total == total) & (total < float("inf"))
    if not COSINE:
        sample_top, sample_total = _softmax_statistics(
            z_sample, u_sample, stride_zc, stride_uc, is_sample, C, HAS_UNIFORM, SAMPLES, BLOCK_C
        )
        sample_intact = is_sample & (sample_total == sample_total) & (sample_total < float("inf"))
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
            sample_mask = is_sample[:, None] & (c < C)[None, :]
            y = _load_difference(
                z_sample, u_sample, stride_zc, stride_uc, c, sample_mask, HAS_UNIFORM
            )
            y = tl.log(tl.exp(y - sample_top[:, None]) / sample_total[:, None] + FLOOR)
            y = tl.where(sample_mask & sample_intact[:, None], y, 0.0)
            centre = tl.sum(y, axis=0) / samples
            right = tl.log(p + FLOOR) - centre[None, :]
            right = tl.where(mask & intact[:, None], right, 0.0)
            h += tl.sum(p * right, axis=1)
        left = p * SCALE
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
    # The patches that the centre is the mean of, the same ones for every program of the image.
    s = (tl.arange(0, SAMPLES).to(tl.int64) * N) // SAMPLES
    z_image = z_ptr + b * stride_zb
    u_image = u_ptr + b * stride_ub
    _write_operands(
        z_image + n.to(tl.int64) * stride_zn,
        u_image + n.to(tl.int64) * stride_un,
        z_image + s * stride_zn,
        u_image + s * stride_un,
        tl.full((SAMPLES,), 1, tl.int1),
        stride_zc,
        stride_uc,
        operands_ptr,
        h_ptr,
        b,
        n,
        N,
        C,
        stride_operand,
        padded_C,
        HAS_UNIFORM,
        COSINE,
        SAMPLES,
        BLOCK_N,
        BLOCK_C,
    )


# --------------------------------------------------------------------------------------------------
# predict: isolate, from features


@triton.jit
def _times_text(x, text_high, text_low, total, HALVES: tl.constexpr):
    """total + x @ text, as exactly as float32."""
    if HALVES:
        # Halves times halves are exact in float32. The small product first.
        total = tl.dot(x, text_low, total)
        total = tl.dot(x, text_high, total)
    else:
        total = tl.dot(x.to(tl.float32), text_high, total, input_precision="tf32x3")
    return total


@triton.jit
def _write_logits(
    x_row,
    row_mask,
    row_scale,
    y_row,
    y_mask,
    v_row,
    v_mask,
    y_scale,
    stride_xe,
    stride_ve,
    text_ptr,
    stride_tc,
    stride_te,
    C,
    E,
    logits_ptr,
    padded_C,
    BLOCK_N: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Scaled cosines with all texts, of BLOCK_N rows x and of SAMPLES rows y + v, one below the
    other. Where y is masked, v may be there."""
    HALVES: tl.constexpr = x_row.dtype.element_ty == tl.float16
    rows = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    below = (BLOCK_N + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x_total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        y_total = tl.zeros((SAMPLES, BLOCK_C), tl.float32)
        x_squares = tl.zeros((BLOCK_N,), tl.float32)
        y_squares = tl.zeros((SAMPLES,), tl.float32)
        text_row = text_ptr + c.to(tl.int64)[None, :] * stride_tc
        for start in range(0, E, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            known = (e < E)[None, :]
            at = e.to(tl.int64)
            x = tl.load(x_row[:, None] + at[None, :] * stride_xe, row_mask & known, other=0.0)
            y = tl.load(y_row[:, None] + at[None, :] * stride_xe, y_mask & known, other=0.0)
            y += tl.load(v_row[:, None] + at[None, :] * stride_ve, v_mask & known, other=0.0)
            text_mask = (e < E)[:, None] & (c < C)[None, :]
            text = tl.load(text_row + at[:, None] * stride_te, text_mask, other=0.0)
            # Scaled, so that its lower half is no subnormal number.
            text = text.to(tl.float32) * SCALE
            high = text
            low = text
            if HALVES:
                high = text.to(tl.float16)
                low = (text - high.to(tl.float32)).to(tl.float16)
            x_total = _times_text(x, high, low, x_total, HALVES)
            y_total = _times_text(y, high, low, y_total, HALVES)
            x = x.to(tl.float32)
            y = y.to(tl.float32)
            x_squares += tl.sum(x * x, axis=1)
            y_squares += tl.sum(y * y, axis=1)
        x_factor = row_scale / SCALE / tl.maximum(tl.sqrt(x_squares), 1e-12)
        y_factor = y_scale / SCALE / tl.maximum(tl.sqrt(y_squares), 1e-12)
        inside = (c < C)[None, :]
        tl.store(logits_ptr + rows * padded_C + c[None, :], x_total * x_factor[:, None], inside)
        tl.store(logits_ptr + below * padded_C + c[None, :], y_total * y_factor[:, None], inside)


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
    UNIFORM: tl.constexpr,
    COSINE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_image = x_ptr + b * stride_xb
    u_image = u_ptr + b * stride_ub
    # This program's rows of logits: of its patches, and below them of the samples that the centre
    # is the mean of. One uniform row for the whole image takes the place of the last sample.
    lone: tl.constexpr = UNIFORM == ONE
    r = tl.arange(0, SAMPLES)
    is_sample = r < (SAMPLES - 1 if lone else SAMPLES)
    s = (r.to(tl.int64) * N) // (SAMPLES - 1 if lone else SAMPLES)
    height: tl.constexpr = BLOCK_N + SAMPLES
    sets: tl.constexpr = 2 if UNIFORM == EACH else 1
    set_size = tl.cast(padded_C, tl.int64) * height
    logits = logits_ptr + tl.program_id(0) * sets * set_size
    _write_logits(
        x_image + n.to(tl.int64) * stride_xn,
        (n < N)[:, None],
        scale,
        x_image + s * stride_xn,
        is_sample[:, None],
        u_image + r * 0,
        (r == SAMPLES - 1)[:, None] if lone else (r < 0)[:, None],
        tl.where(is_sample, scale, uniform_scale),
        stride_xe,
        stride_ue,
        text_ptr,
        stride_tc,
        stride_te,
        C,
        E,
        logits,
        padded_C,
        BLOCK_N,
        SAMPLES,
        BLOCK_C,
        BLOCK_E,
    )
    if UNIFORM == EACH:
        _write_logits(
            u_image + n.to(tl.int64) * stride_un,
            (n < N)[:, None],
            uniform_scale,
            u_image + s * stride_un,
            is_sample[:, None],
            u_image + r * 0,
            (r < 0)[:, None],
            uniform_scale,
            stride_ue,
            stride_ue,
            text_ptr,
            stride_tc,
            stride_te,
            C,
            E,
            logits + set_size,
            padded_C,
            BLOCK_N,
            SAMPLES,
            BLOCK_C,
            BLOCK_E,
        )
    # Each row is read by other threads than those that wrote it.
    tl.debug_barrier()
    own = tl.arange(0, BLOCK_N).to(tl.int64) * padded_C
    sample = (BLOCK_N + r).to(tl.int64) * padded_C
    uniform = logits + (set_size if UNIFORM == EACH else set_size - padded_C)
    _write_operands(
        logits + own,
        uniform + (own if UNIFORM == EACH else own * 0),
        logits + sample,
        uniform + (sample if UNIFORM == EACH else sample * 0),
        is_sample,
        1,
        1,
        operands_ptr,
        h_ptr,
        b,
        n,
        N,
        C,
        stride_operand,
        padded_C,
        UNIFORM != NONE,
        COSINE,
        SAMPLES,
        BLOCK_N,
        BLOCK_C,
    )


# --------------------------------------------------------------------------------------------------
# The launchers


@dataclass(frozen=True)
class Operands:
    """Of the similarity product S = 1 / (1 + max(0, h_i - P_i . L_j)).

    Attributes:
        halves: (4,B,N,padded C) float16: 1024 P, what rounding left of it, L, and what it left.
        h: (B,N) float32; NaN for a patch with logits that are not finite.
        C: classes.
    """

    halves: Tensor
    h: Tensor
    C: int


def isolate(patch_logits: Tensor, uniform_logits: Tensor | None, *, cosine: bool) -> Operands:
    """From logits (B,N,C) and uniform logits (B,1,C), (B,N,C) or None; any strides.

    Args:
        patch_logits, uniform_logits: float16, bfloat16 or float32.
        cosine: L is P and both have unit length, h does not count.
    """
    B, N, C = patch_logits.shape
    operands = _empty(B, N, C, patch_logits.device)
    uniform = patch_logits if uniform_logits is None else uniform_logits.expand_as(patch_logits)
    plan = launch.isolate(C)
    with launch.on_device(patch_logits):
        _isolate_kernel[(B * plan.blocks(BLOCK_N=N),)](
            patch_logits,
            uniform,
            operands.halves,
            operands.h,
            N,
            C,
            *patch_logits.stride(),
            *uniform.stride(),
            operands.halves.stride(0),
            operands.halves.shape[-1],
            HAS_UNIFORM=uniform_logits is not None,
            COSINE=cosine,
            SAMPLES=_SAMPLES,
            **plan.arguments(),
        )
    return operands


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
    operands = _empty(B, N, C, features.device)
    padded_C = operands.halves.shape[-1]
    uniform = features if uniform_features is None else uniform_features
    form = _NONE if uniform_features is None else _ONE if uniform.shape[1] == 1 else _EACH
    plan = launch.predict()
    programs = B * plan.blocks(BLOCK_N=N)
    rows = (plan.constants["BLOCK_N"] + _SAMPLES) * (2 if form == _EACH else 1)
    logits = torch.empty((programs, rows, padded_C), dtype=torch.float32, device=features.device)
    with launch.on_device(features):
        _predict_kernel[(programs,)](
            features,
            uniform,
            text_features,
            logits,
            operands.halves,
            operands.h,
            N,
            C,
            E,
            scale,
            uniform_scale,
            *features.stride(),
            *uniform.stride(),
            *text_features.stride(),
            operands.halves.stride(0),
            padded_C,
            UNIFORM=form,
            COSINE=cosine,
            SAMPLES=_SAMPLES,
            **plan.arguments(),
        )
    return operands


def _empty(B: int, N: int, C: int, device: torch.device) -> Operands:
    padded_C = launch.round_up(C, launch.CLASS_STEP)
    return Operands(
        torch.empty((4, B, N, padded_C), dtype=torch.float16, device=device),
        torch.empty((B, N), dtype=torch.float32, device=device),
        C,
    )
