"""ProxyCLIP's attention: affinity of features, applied to values, in four launches.

    normalise   one program: 16 patches. Unit features in half or single precision, and the sum of
                its 16 rows in float32. Reads the features twice (cached), writes them once.
    level       one program: one image. shift * |mean of the unit features|^2, from those sums:
                mean_ij(x_i . x_j) = |mean_i x_i|^2.
    affinity    one program: a tile of one image's N x N. The unnormalised weights, in the type of
                the values, and what each row of the tile sums to.
    apply       one program: a tile of the result. Weights times values, divided by the sums of the
                rows. On the way out it can add a tensor, or write what a feedback step multiplies
                next, which spares the launches that would do it.

An application reads weights that were made before: those of all rows where the matrix is stored,
so that a second application is one launch, and else block by block of rows, each made and applied
and forgotten. One kernel from features to result (the scores kept on the chip) would have to hold
768 or more columns of the result for each row, or compute the scores once for every few of them.

The largest score of a row is its own, cos_ii = 1, so the softmax needs no running maximum: weights
are exp(gain (cos - 1)). Sums have a fixed order (no atomics): the same input gives the same bits.
A feature that is not finite makes its own image NaN, and no other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch, runtime
from fsa_kernels.columns import columns_width, write_columns
from fsa_kernels.options import Adaptations
from fsa_kernels.tiles import tile_at

# How many partial sums of a row are loaded at once.
_PARTS: tl.constexpr = tl.constexpr(16)


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
def _level_kernel(
    sums_ptr,
    level_ptr,
    N,
    blocks,
    shift,
    padded_F,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    square = 0.0
    for start in range(0, padded_F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        total = tl.zeros((BLOCK_F,), tl.float32)
        # Many sums at once: one program waits for each of its loads.
        for first in range(0, blocks, BLOCK_B):
            block = first + tl.arange(0, BLOCK_B)
            sums = sums_ptr + (b * blocks + block)[:, None] * padded_F + f[None, :]
            mask = (block < blocks)[:, None] & (f < padded_F)[None, :]
            total += tl.sum(tl.load(sums, mask=mask, other=0.0), axis=0)
        mean = total / N
        square += tl.sum(mean * mean, axis=0)
    tl.store(level_ptr + b, shift * square)


@triton.jit(do_not_specialize=["N", "first_row", "rows"])
def _affinity_kernel(
    unit_ptr,
    level_ptr,
    weights_ptr,
    masses_ptr,
    N,
    first_row,
    rows,
    gain,
    padded_F,
    padded_N,
    DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # The rows from `first_row` on of every image; they lie from row 0 on in the workspace. A row
    # after the last patch's is uniform.
    b, place, j = tile_at(rows, N, BLOCK_M, BLOCK_N)
    i = first_row + place
    f = tl.arange(0, BLOCK_F)
    inside = ((place < rows) & (i < N))[:, None]
    x_i = unit_ptr + (b * N + i)[:, None] * padded_F + f[None, :]
    x_j = unit_ptr + (b * N + j)[None, :] * padded_F + f[:, None]

    cosine = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, padded_F, BLOCK_F):
        left = tl.load(x_i + start, mask=inside, other=0.0)
        right = tl.load(x_j + start, mask=(j < N)[None, :], other=0.0)
        cosine = tl.dot(left, right, cosine, input_precision=DOT_PRECISION)
    # Written so that NaN stays NaN.
    weight = tl.where(cosine < tl.load(level_ptr + b), 0.0, tl.exp(gain * (cosine - 1.0)))
    weight = tl.where((i == N)[:, None], 1.0, weight)
    weight = tl.where((j < N)[None, :], weight, 0.0).to(weights_ptr.dtype.element_ty)
    # Rows of the workspace are padded to whole tiles: its padding is written with zeros.
    out = weights_ptr + (b * rows + place)[:, None] * padded_N + j[None, :]
    tl.store(out, weight, mask=(place < rows)[:, None])
    mass = tl.sum(weight.to(tl.float32), axis=1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    masses = masses_ptr + (b * tiles_n + tl.program_id(0) % tiles_n) * rows + place
    tl.store(masses, mass, mask=place < rows)


# D belongs to the model: let the compiler see that it is a multiple of 16, so accesses are wide.
@triton.jit(do_not_specialize=["N", "first_row", "rows", "wanted"])
def _apply_kernel(
    weights_ptr,
    masses_ptr,
    v_ptr,
    add_ptr,
    out_ptr,
    columns_ptr,
    N,
    D,
    first_row,
    rows,
    wanted,
    scale,
    stride_vb,
    stride_vn,
    stride_vd,
    stride_ab,
    stride_an,
    stride_ad,
    padded_N,
    ADD: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    WEIGHTS_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, place, d = tile_at(wanted, D, BLOCK_M, BLOCK_D)
    i = first_row + place
    wide = (d < D)[None, :]
    weights = weights_ptr + (b * rows + place)[:, None] * padded_N + tl.arange(0, BLOCK_N)[None, :]
    v_image = v_ptr + b * stride_vb + d.to(tl.int64)[None, :] * stride_vd
    inside = (place < wanted)[:, None]

    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        weight = tl.load(weights + start, mask=inside, other=0.0)
        v_j = v_image + j.to(tl.int64)[:, None] * stride_vn
        v = tl.load(v_j, mask=(j < N)[:, None] & wide, other=0.0)
        total = tl.dot(weight, v, total, input_precision=DOT_PRECISION)

    mass = tl.zeros((BLOCK_M,), tl.float32)
    parts = tl.cdiv(N, WEIGHTS_TILE)
    for start in range(0, parts, _PARTS):
        part = start + tl.arange(0, _PARTS)
        sums = masses_ptr + (b * parts + part)[:, None] * rows + place[None, :]
        known = (part < parts)[:, None] & (place < wanted)[None, :]
        mass += tl.sum(tl.load(sums, mask=known, other=0.0), axis=0)

    # A row without any weight is its own value.
    is_patch = inside & (i < N)[:, None] & wide
    v_i = v_image + i.to(tl.int64)[:, None] * stride_vn
    value = tl.load(v_i, mask=is_patch, other=0.0)
    result = tl.where((mass == 0.0)[:, None], value.to(tl.float32), total / mass[:, None])
    if ADD:
        add = add_ptr + b * stride_ab + i.to(tl.int64)[:, None] * stride_an
        add += d.to(tl.int64)[None, :] * stride_ad
        result += tl.load(add, mask=is_patch, other=0.0).to(tl.float32)
    out = out_ptr + (b * (N + 1 if FIRST else N) + i)[:, None] * D + d[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside & wide)
    if FIRST:
        columns = columns_ptr + b * N * columns_width(D, SECOND)
        value = value.to(tl.float32)
        write_columns(columns, i, d, is_patch, result, value, D, scale, FIRST, SECOND)


# --------------------------------------------------------------------------------------------------
# The launchers

# Workspace for weights that are not stored, in bytes, and the rows of an image that it must hold.
_BLOCK_BYTES = 24 << 20
_BLOCK_ROWS = 128

State = tuple[Tensor, Tensor]


def prepare(features: Tensor, *, shift: float, gain: float, stored: bool) -> State:
    """What the applications of one attention share; the others take it as `state`.

    Args:
        features: (B,N,F); float16, bfloat16 or float32; any strides.
        shift, gain: ProxyCLIP's constants.
        stored: whether the weights of all rows are made at once and kept.

    Returns:
        Stored: the weights with a uniform row after the last, (B,N+1,N) with padded rows in
        `launch.weights_dtype`, and the sums of their rows by tiles. Else: the unit features, and
        the level of each image.
    """
    B, N, F = features.shape
    unit, level = (
        torch.empty(shape, dtype=dtype, device=features.device)
        for shape, dtype in launch.proxy_state(B, N, F, features.dtype, stored=False)
    )
    padded_F = unit.shape[-1]
    rows = launch.normalise(F)
    blocks = rows.blocks(BLOCK_N=N)
    sums = level.new_empty((B * blocks, padded_F))
    runtime.launch(
        _normalise_kernel,
        (B * blocks, 1, 1),
        (features, unit, sums),
        (N, F, *runtime.strides(features), padded_F),
        rows,
    )
    runtime.launch(
        _level_kernel,
        (B, 1, 1),
        (sums, level),
        (N, blocks, float(shift), padded_F),
        launch.level(F),
    )
    if not stored:
        return unit, level
    return _weights(unit, level, 0, N + 1, gain, launch.weights_dtype(features.dtype))


def apply(state: State, value: Tensor, *, gain: float, add: Tensor | None = None) -> Tensor:
    """The attention applied to values (B,N,D), plus a tensor of that shape; in their type."""
    if runtime.interpreting() and value.dtype == torch.bfloat16:
        # Triton's interpreter multiplies the bits of bfloat16 as integers.
        add = None if add is None else add.float()
        return apply(state, value.float(), gain=gain, add=add).to(value.dtype)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    for first, weights, masses in _blocks(state, value, gain):
        _apply(first, weights, masses, value, out, add=add)
    return out


def gather(
    state: State, value: Tensor, adaptations: Adaptations, *, gain: float
) -> tuple[Tensor, Tensor]:
    """The first half of a feedback step: what the tail takes, and what A_f is multiplied with.

    Args:
        state: of `prepare`.
        value: V (B,N,D).
        adaptations: the terms that are averaged.
        gain: ProxyCLIP's constant.

    Returns:
        As `fsa_kernels.columns.gather`.
    """
    if runtime.interpreting() and value.dtype == torch.bfloat16:
        gathered, columns = gather(state, value.float(), adaptations, gain=gain)
        return gathered.to(value.dtype), columns.to(value.dtype)
    B, N, D = value.shape
    gathered, columns = (value.new_empty(shape) for shape in adaptations.gather_shapes(B, N, D))
    for first, weights, masses in _blocks(state, value, gain):
        _apply(first, weights, masses, value, gathered, gathers=(columns, adaptations))
    return gathered, columns


def _blocks(state: State, value: Tensor, gain: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first row, the weights and their sums of blocks of rows, which together are all."""
    first, second = state
    if second.ndim == 3:
        yield 0, first, second
        return
    B, N, _ = value.shape
    count = _BLOCK_BYTES // (B * launch.padded_weights(N) * value.dtype.itemsize)
    count = max(_BLOCK_ROWS, count // _BLOCK_ROWS * _BLOCK_ROWS)
    for row in range(0, N, count):
        # With the uniform row in the last block.
        rows = count if row + count < N else N + 1 - row
        yield row, *_weights(first, second, row, rows, gain, value.dtype)


def _weights(
    unit: Tensor, level: Tensor, first_row: int, rows: int, gain: float, dtype: torch.dtype
) -> State:
    B, N, padded_F = unit.shape
    plan = launch.affinity(N, unit.dtype)
    padded_N = launch.padded_weights(N)
    tiles_n = padded_N // launch.WEIGHTS_TILE
    weights = torch.empty((B, rows, padded_N), dtype=dtype, device=unit.device)
    masses = torch.empty((B, tiles_n, rows), dtype=torch.float32, device=unit.device)
    runtime.launch(
        _affinity_kernel,
        (B * plan.blocks(BLOCK_M=rows, BLOCK_N=N), 1, 1),
        (unit, level, weights, masses),
        (N, first_row, rows, float(gain), padded_F, padded_N),
        plan,
        DOT_PRECISION=_dot_precision(unit.dtype),
    )
    return weights, masses


def _apply(
    first_row: int,
    weights: Tensor,
    masses: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    add: Tensor | None = None,
    gathers: tuple[Tensor, Adaptations] | None = None,
) -> None:
    """One block of rows of `apply`; or of `gather`, with its columns and the terms they are for."""
    columns, first, second, scale = out, 0, False, 1.0
    if gathers is not None:
        columns, adaptations = gathers
        first, second, scale = adaptations.first(), adaptations.second(), adaptations.scale()
    B, N, D = value.shape
    rows = weights.shape[1]
    wanted = min(rows, out.shape[1] - first_row)
    added = value if add is None else add
    plan = launch.apply_affinity(B * N, D, value.dtype, gather=gathers is not None)
    runtime.launch(
        _apply_kernel,
        (B * plan.blocks(BLOCK_M=wanted, BLOCK_D=D), 1, 1),
        (weights, masses, value, added, out, columns),
        (
            N,
            D,
            first_row,
            rows,
            wanted,
            scale,
            *runtime.strides(value),
            *runtime.strides(added),
            weights.stride(1),
        ),
        plan,
        ADD=add is not None,
        FIRST=first,
        SECOND=second,
        DOT_PRECISION=_dot_precision(value.dtype),
        WEIGHTS_TILE=launch.WEIGHTS_TILE,
    )


def _dot_precision(dtype: torch.dtype) -> str:
    # Three tf32 products are as exact as float32; half types take none of it.
    return "tf32x3" if dtype == torch.float32 else "tf32"
