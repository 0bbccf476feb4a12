"""How results are judged, and every tolerance of the suite, in one place.

A result is judged by its relative error as a whole, ||out - exact|| / ||exact||, against the
definition in float64, and by its pruning decisions: a patch may be kept or dropped differently
only where the cumulative confidence lies within rounding of the threshold, or its similarity within
rounding of the row's own threshold, so that rounding decides the order there.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fsa import reference
from fsa.config import FSAConfig

VECTORS = Path(__file__).parents[1] / "vectors"
OP_VECTORS = sorted(path.stem for path in VECTORS.glob("op_*.npz"))
MODEL_VECTORS = sorted(path.stem for path in VECTORS.glob("model_*.npz"))

# The largest relative error of a whole result. float64: a few hundred roundings of 1e-16, and the
# published vectors round differently. float32: 1e-7 of rounding in logits becomes 1e-6 in KL, and
# exp(beta S) multiplies it by beta. Half types: the result itself is rounded to 11 or 8 bits; the
# arithmetic between is float32.
RELATIVE_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

# The same in float32 where nearly every prediction is certain, its probability above 0.98. KL is
# h_i - P_i . L_j then, of two numbers near 20 that are the same but for their last bits, which a
# direct sum of P (l_i - l_j) would keep.
CERTAIN_RELATIVE_ERROR = 2e-4

# How far, relative to the row's whole mass, the cumulative confidence of a patch may lie from the
# threshold for its decision to be called rounding. It is inherited from the similarities: 1e-6.
DECISION_MARGIN = 5e-6

# How far a kept similarity may lie from the highest dropped one of its row, and a dropped one from
# the lowest kept, for their order to be called rounding: a KL in float32 is off by up to 5e-6, and
# two of them are compared.
SIMILARITY_MARGIN = 1e-5


def vector(name: str) -> dict[str, Tensor]:
    """A file of published inputs and outputs, as float64 tensors (states stay float32)."""
    with np.load(VECTORS / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; NaN where the result has NaN."""
    difference = result.double() - exact.double()
    return float(difference.norm() / exact.double().norm())


def unexplained_decisions(kept: Tensor, similarities: Tensor, config: FSAConfig) -> int:
    """How many pruning decisions differ from the definition's beyond rounding of the threshold.

    Args:
        kept: (B,N,N) bool, the decisions to judge.
        similarities: (B,N,N), exact, float64.
        config: with pruning="confidence".
    """
    ordered, order = similarities.sort(dim=-1, descending=True, stable=True)
    mass = torch.empty_like(similarities)
    mass.scatter_(-1, order, ordered.softmax(dim=-1).cumsum(dim=-1))
    exact = reference.kept_patches(similarities, config)
    lowest = similarities.masked_fill(~exact, math.inf).amin(dim=-1, keepdim=True)
    highest = similarities.masked_fill(exact, -math.inf).amax(dim=-1, keepdim=True)
    other_side = torch.where(exact, highest, lowest)
    beyond_rounding = ((mass - config.confidence).abs() > DECISION_MARGIN) & (
        (similarities - other_side).abs() > SIMILARITY_MARGIN
    )
    return int(((kept != exact) & beyond_rounding).sum())


def segment_logits(
    N: int, C: int, *, B: int = 1, segments: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Patch logits (B,N,C) and uniform logits (B,1,C), float64, as a picture's segments give them.

    Each patch belongs to a segment whose logits peak at a class; noise makes every KL distinct.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    centres = normal(segments, C)
    membership = torch.randint(segments, (B, N), generator=generator)
    return centres[membership] * 1.5 + normal(B, N, C) * 0.4, normal(B, 1, C) * 0.5
