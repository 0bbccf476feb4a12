"""How results are judged, and every tolerance of the suite, in one place.

A result is judged in two steps against the definition in float64. First by its pruning decisions:
a patch may be kept or dropped differently only where rounding decides, that is where the cumulative
confidence lies within rounding of the threshold, or the patch's similarity within rounding of the
similarity at which its row is cut. Then by its weights: the relative error of the whole,
||out - exact|| / ||exact||, against the definition with those few decisions taken as the result
took them. A single decision at rounding moves the weights of its row by far more than rounding
does, so a bound on the error without the first step would have to be loose or would depend on luck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fsa import reference
from fsa.config import PROBABILITY_FLOOR, FSAConfig

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

# How far, relative to the row's whole mass, the cumulative confidence of a patch may lie from the
# threshold for its decision to be called rounding. It is inherited from the similarities: 1e-6.
DECISION_MARGIN = 5e-6

# How far a kept similarity may lie from the highest dropped one of its row, and a dropped one from
# the lowest kept, for their order to be called rounding: a KL in float32 is off by up to 5e-6, and
# two of them are compared.
SIMILARITY_MARGIN = 1e-5

# The same where predictions may be nearly certain: 1e-7 of rounding in logarithms of up to 23,
# summed over classes.
CERTAIN_SIMILARITY_MARGIN = 2e-5

# Both margins for a result in float64: some hundred roundings of 1e-16, as in RELATIVE_ERROR.
FLOAT64_MARGIN = 1e-12

# Entries of the N x N x C tensor of the definition that are made at once.
_BLOCK_ENTRIES = 1 << 24


def vector(name: str) -> dict[str, Tensor]:
    """A file of published inputs and outputs, as float64 tensors (states stay float32)."""
    with np.load(VECTORS / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; NaN where the result has NaN."""
    difference = result.double() - exact.double()
    return float(difference.norm() / exact.double().norm())


def exact_similarities(
    logits: Tensor, uniform: Tensor | None = None, config: FSAConfig | None = None
) -> Tensor:
    """S (B,N,N) of the definition in float64, by blocks of rows, for sizes up to a full grid."""
    config = config or FSAConfig()
    uniform = None if uniform is None or not config.isolation else uniform.double()
    P = reference.isolated_probabilities(logits.double(), uniform)
    B, N, C = P.shape
    if B * N * N * C <= _BLOCK_ENTRIES:
        return reference.similarity(P, config)
    log = (P + PROBABILITY_FLOOR).log()
    unit = torch.nn.functional.normalize(P, dim=-1)
    S = torch.empty((B, N, N), dtype=torch.float64, device=P.device)
    step = max(1, _BLOCK_ENTRIES // (N * C))
    for b in range(B):
        for first in range(0, N, step):
            rows = slice(first, first + step)
            if config.similarity == "cosine":
                S[b, rows] = (unit[b, rows, None] * unit[b]).sum(dim=-1).clamp(0, 1)
            else:
                KL = (P[b, rows, None] * (log[b, rows, None] - log[b])).sum(dim=-1)
                S[b, rows] = 1 / (1 + KL.clamp(min=0))
    return S


@dataclass(frozen=True)
class Judgement:
    """How a result compares with the definition.

    Attributes:
        error: relative error of the whole, against the definition with the result's own decisions
            wherever rounding explains them.
        unexplained: how many pruning decisions differ from the definition's beyond rounding.
        explained: how many differ within rounding.
    """

    error: float
    unexplained: int
    explained: int


def judge(
    feedback: Tensor,
    similarities: Tensor,
    config: FSAConfig | None = None,
    similarity_margin: float = SIMILARITY_MARGIN,
) -> Judgement:
    """Judges A_f (B,N,N) by the exact similarities S (B,N,N) in float64."""
    config = config or FSAConfig()
    exact_kept = reference.kept_patches(similarities, config)
    exact = _weights(similarities, exact_kept, config)
    # Weights that the result's type cannot hold tell nothing about the decision.
    too_small = exact_kept & (exact < torch.finfo(feedback.dtype).tiny)
    kept = (feedback > 0) | too_small
    margin, mass_margin = similarity_margin, DECISION_MARGIN
    if feedback.dtype == torch.float64:
        margin = mass_margin = FLOAT64_MARGIN
    rounding = _decided_by_rounding(similarities, exact_kept, config, margin, mass_margin)
    differs = kept != exact_kept
    expected = _weights(similarities, torch.where(rounding, kept, exact_kept), config)
    return Judgement(
        error=relative_error(feedback, expected),
        unexplained=int((differs & ~rounding).sum()),
        explained=int((differs & rounding).sum()),
    )


def assert_conforms(
    feedback: Tensor,
    logits: Tensor,
    uniform: Tensor | None = None,
    config: FSAConfig | None = None,
    *,
    tolerance: float | None = None,
    similarity_margin: float = SIMILARITY_MARGIN,
) -> None:
    """That A_f is the definition's for these logits, to `RELATIVE_ERROR` of its type."""
    N = logits.shape[1]
    assert feedback.shape == (len(logits), N, N)
    # On the GPU where there is one: N x N x C entries in float64 take a CPU minutes.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    uniform = None if uniform is None else uniform.to(device)
    S = exact_similarities(logits.to(device), uniform, config)
    judged = judge(feedback.to(device), S, config, similarity_margin)
    assert judged.unexplained == 0, judged
    assert judged.error < (RELATIVE_ERROR[feedback.dtype] if tolerance is None else tolerance), (
        judged
    )


def unexplained_decisions(kept: Tensor, similarities: Tensor, config: FSAConfig) -> int:
    """How many pruning decisions differ from the definition's beyond rounding of the threshold.

    Args:
        kept: (B,N,N) bool, the decisions to judge.
        similarities: (B,N,N), exact, float64.
        config: any; its pruning says what the threshold is.
    """
    exact = reference.kept_patches(similarities, config)
    rounding = _decided_by_rounding(similarities, exact, config, SIMILARITY_MARGIN, DECISION_MARGIN)
    return int(((kept != exact) & ~rounding).sum())


def _decided_by_rounding(
    similarities: Tensor, exact: Tensor, config: FSAConfig, margin: float, mass_margin: float
) -> Tensor:
    """(B,N,N) bool: which of the exact decisions rounding may turn around."""
    if config.pruning is None:
        return torch.zeros_like(exact)
    lowest = similarities.masked_fill(~exact, math.inf).amin(dim=-1, keepdim=True)
    highest = similarities.masked_fill(exact, -math.inf).amax(dim=-1, keepdim=True)
    rounding = (similarities - torch.where(exact, highest, lowest)).abs() <= margin
    if config.pruning == "threshold":
        rounding |= (similarities - config.threshold).abs() <= margin
    if config.pruning == "confidence":
        ordered, order = similarities.sort(dim=-1, descending=True, stable=True)
        mass = torch.empty_like(similarities)
        mass.scatter_(-1, order, ordered.softmax(dim=-1).cumsum(dim=-1))
        rounding |= (mass - config.confidence).abs() <= mass_margin
    return rounding


def _weights(similarities: Tensor, kept: Tensor, config: FSAConfig) -> Tensor:
    """A_f of the definition with given decisions."""
    scaled = reference.scaled_similarity(similarities, config)
    return scaled.masked_fill(~kept, -math.inf).softmax(dim=-1)


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
