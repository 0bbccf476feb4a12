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

# From here on a result is judged by some of its rows, evenly spread, the first and last among them.
_JUDGED_WHOLE, _JUDGED_ROWS = 4096, 1024

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
    """What a row's result would be in float64, for the images and patches that are judged.

    Attributes:
        images: their numbers; of a batch the first and the last.
        patches: numbers (R,) of the patches whose rows are judged.
        result: of those: A_f (b,R,N), or the adapted values (b,H,R,d).
        similarities: S (b,R,N); None for steps.
    """

    images: list[int]
    patches: Tensor
    result: Tensor
    similarities: Tensor | None


class ExactFeedback:
    """Rows of A_f in float64, by exact algebra; the tests tie it to the definition.

    Args:
        patch_logits, uniform_logits: (b,N,C) and (b,1,C), float64.
    """

    def __init__(self, patch_logits: Tensor, uniform_logits: Tensor) -> None:
        self._probabilities = reference.isolated_probabilities(patch_logits, uniform_logits)
        self._log = (self._probabilities + 1e-10).log()
        self._own = (self._probabilities * self._log).sum(dim=-1, keepdim=True)
        self._config = FSAConfig()

    def similarities(self, patches: Tensor) -> Tensor:
        """S (b,R,N) of some patches with all."""
        product = self._probabilities[:, patches] @ self._log.transpose(1, 2)
        return 1 / (1 + (self._own[:, patches] - product).clamp(min=0))

    def rows(self, patches: Tensor) -> Tensor:
        """A_f (b,R,N) of some patches."""
        S = self.similarities(patches)
        scaled = reference.scaled_similarity(S, self._config)
        dropped = ~reference.kept_patches(S, self._config)
        return scaled.masked_fill(dropped, float("-inf")).softmax(dim=-1)


def exact(row: OpRow, inputs: Inputs) -> Exact:
    """What the judged rows of a result should be."""
    images = sorted({0, len(inputs.patch_logits) - 1})
    wide = inputs.images(images)
    N, device = wide.patch_logits.shape[1], wide.patch_logits.device
    every = torch.arange(N, device=device)
    # Sorting a long row of every patch in float64 takes as long as the rest of the job.
    judged = N if N <= _JUDGED_WHOLE else _JUDGED_ROWS
    patches = torch.linspace(0, N - 1, judged, device=device).round().long()
    feedback = ExactFeedback(wide.patch_logits, wide.uniform_logits)
    if row.kind == "op":
        return Exact(images, patches, feedback.rows(patches), feedback.similarities(patches))
    # The mean of A_f A V, A A_f V and A_f V; the second needs A_f V of every patch.
    columns = torch.cat([wide.attended, wide.value], dim=1).transpose(1, 2).flatten(2)
    product = torch.cat(
        [feedback.rows(some) @ columns for some in every.split(_JUDGED_ROWS)], dim=1
    )
    after, only = product.chunk(2, dim=-1)
    before = wide.attention[:, patches] @ only
    mean = (after[:, patches] + before + only[:, patches]) / 3
    adapted = mean.unflatten(-1, (wide.value.shape[1], -1)).transpose(1, 2)
    return Exact(images, patches, adapted, None)


def judge(result: Tensor, against: Exact) -> dict[str, Any]:
    """What is recorded of a contender's result.

    Returns:
        relative_error, of the whole; for A_f also the share of pruning decisions that differ, and
        how many of them rounding of the threshold does not explain; and how many rows were judged
        where those are not all. An entry that float64 keeps but whose value rounds to zero in the
        result's type is no decision.
    """
    rows = result.shape[-2]
    judged = result[against.images].index_select(-2, against.patches)
    found: dict[str, Any] = {"relative_error": relative_error(judged, against.result)}
    if len(against.patches) < rows:
        found["judged_rows"] = len(against.patches)
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
