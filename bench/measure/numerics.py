"""Errors of contenders: of ops and steps against the exact algebra in float64, with their pruning
decisions; of hosts against the same forward in a wider type.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fsa
from bench.rows.contenders import is_ours
from bench.rows.hosts import HostInputs, HostRow
from bench.rows.op import Inputs, OpRow
from fsa import reference
from fsa.config import FSAConfig
from tests.support.accuracy import RELATIVE_ERROR, relative_error, unexplained_decisions

# (contender, its result) -> what is recorded of it.
Judge = Callable[[str, Tensor], dict[str, Any]]

_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
}


def judge_for(row: OpRow | HostRow, inputs: Inputs | HostInputs) -> Judge:
    """Computes what a row's contenders should give, and judges them by it."""
    if isinstance(row, HostRow):
        return _host_judge(row, inputs)
    against = exact(row, inputs)
    return lambda contender, result: judge(result, against)


def _host_judge(row: HostRow, inputs: HostInputs) -> Judge:
    """Relative errors of the features, and the largest accepted: twice that of plain PyTorch."""
    dtype = inputs.images.dtype
    wide = _WIDER[dtype]
    images, text, vfm_features = inputs.images, inputs.text, inputs.vfm_features()
    # Without the GPU's short mantissas in convolutions, which are the patch embedding.
    with torch.backends.cudnn.flags(allow_tf32=False):
        widened = copy.deepcopy(inputs.visual).to(wide)
        ways = []
        for visual, kind in ((widened, wide), (inputs.visual, dtype)):
            host = fsa.hosts.build(row.host, visual, backend="torch")
            vfm = None if vfm_features is None else vfm_features.to(kind)
            ways.append(
                {
                    mode: host.features(images.to(kind), text, vfm_features=vfm, config=config)
                    for mode, config in inputs.configs.items()
                }
            )
    exact, plain = ways
    limits = {
        mode: max(RELATIVE_ERROR[dtype], 2 * relative_error(plain[mode], exact[mode]))
        for mode in exact
    }

    def judge(contender: str, result: Tensor) -> dict[str, Any]:
        mode = contender.split()[-1]
        return {"relative_error": relative_error(result, exact[mode]), "limit": limits[mode]}

    return judge


@dataclass(frozen=True)
class Exact:
    """What a row's result would be in float64, for the images that are judged.

    Attributes:
        images: their numbers; of a batch the first and the last.
        result: A_f (b,N,N), or the adapted values (b,H,N,d).
        similarities: S (b,N,N); None for steps.
    """

    images: list[int]
    result: Tensor
    similarities: Tensor | None


def exact(row: OpRow, inputs: Inputs) -> Exact:
    """By exact algebra; the tests tie it to the definition."""
    images = sorted({0, row.B - 1})
    wide = inputs.images(images)
    feedback = fsa.feedback_attention(wide.patch_logits, wide.uniform_logits, backend="torch")
    if row.kind == "step":
        attention = wide.attention
        return Exact(images, fsa.adapt(wide.value, feedback, attention, backend="torch"), None)
    probabilities = reference.isolated_probabilities(wide.patch_logits, wide.uniform_logits)
    log = (probabilities + 1e-10).log()
    own = (probabilities * log).sum(dim=-1, keepdim=True)
    divergence = (own - probabilities @ log.transpose(1, 2)).clamp(min=0)
    return Exact(images, feedback, 1 / (1 + divergence))


def judge(result: Tensor, against: Exact) -> dict[str, Any]:
    """What is recorded of a contender's result.

    Returns:
        relative_error, of the whole; for A_f also the share of pruning decisions that differ, and
        how many of them rounding of the threshold does not explain. An entry that float64 keeps
        but whose value rounds to zero in the result's type is no decision.
    """
    judged = result[against.images]
    found: dict[str, Any] = {"relative_error": relative_error(judged, against.result)}
    if against.similarities is not None:
        kept = against.result > 0
        vanishes = kept & (against.result.to(judged.dtype) == 0)
        decided = torch.where(vanishes, kept, judged > 0)
        found["decisions_that_differ"] = float((decided != kept).double().mean())
        found["unexplained_decisions"] = unexplained_decisions(
            decided, against.similarities, FSAConfig()
        )
    return found


def beyond_limits(contender: str, found: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """What a contender of ours breaks of the limits that the tests hold; empty for others."""
    if not is_ours(contender):
        return []
    broken = []
    limit = found.get("limit", RELATIVE_ERROR[dtype])
    # Written so that NaN breaks it.
    if not found["relative_error"] < limit:
        broken.append(f"relative error {found['relative_error']:.1e}, limit {limit:.0e}")
    if found.get("unexplained_decisions"):
        broken.append(f"{found['unexplained_decisions']} pruning decisions beyond rounding")
    return broken
