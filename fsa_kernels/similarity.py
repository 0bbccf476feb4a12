"""The operands of the similarity product -> similarities (B,rows,N), in one launch.

One program: a tile of one image's rows x N. Three tensor-core products per chunk of classes with
float32 accumulation; S = 1 / (1 + max(0, h_i - P_i . L_j)), written in float32. Reads 4 halves per
class and row or column of the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsa_kernels import launch, runtime
from fsa_kernels.arithmetic import fast_reciprocal
from fsa_kernels.isolate import SCALE, Operands
from fsa_kernels.tiles import tile_at

# The similarity of a patch that no row may keep.
ABSENT: tl.constexpr = tl.constexpr(float("-inf"))


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
    total *= 1.0 / SCALE

    # The padding of a row is absent too, and written, so that rows are read and written in wide
    # pieces.
    h_j = tl.load(h_ptr + b * N + j, mask=j < N, other=float("nan"))
    if COSINE:
        # Not by a maximum, which may be -0.0.
        S = tl.where(total > 0.0, tl.minimum(total, 1.0), 0.0)
    else:
        h_i = tl.load(h_ptr + b * N + i, mask=place < rows, other=0.0)
        S = fast_reciprocal(1.0 + tl.maximum(h_i[:, None] - total, 0.0))
    S += tl.where(h_j == h_j, 0.0, ABSENT)[None, :]
    out = s_ptr + (b * rows + place)[:, None] * padded_N + j[None, :]
    tl.store(out, S, mask=inside & (j < padded_N)[None, :])


def similarity(
    operands: Operands, first_row: int, rows: int, *, cosine: bool, exact: bool
) -> Tensor:
    """Rows `first_row` to `first_row + rows` of S, (B,rows,padded N) float32.

    Args:
        operands: of `isolate` or `predict`.
        cosine: S is the cosine of the probabilities, not 1 / (1 + KL).
        exact: three products of halves, not one.

    Returns:
        S; `ABSENT` where the column's patch has logits that are not finite, and in the padding.
    """
    _, B, N, padded_C = operands.halves.shape
    padded_N = launch.padded_row(N)
    S = torch.empty((B, rows, padded_N), dtype=torch.float32, device=operands.h.device)
    plan = launch.similarity(N)
    runtime.launch(
        _similarity_kernel,
        (B * plan.blocks(BLOCK_M=rows, BLOCK_N=N), 1, 1),
        (*operands, S),
        (N, first_row, rows, B * N * padded_C, padded_C, padded_N),
        plan,
        COSINE=cosine,
        EXACT=exact,
        BLOCK_K=launch.CLASS_STEP,
    )
    return S
