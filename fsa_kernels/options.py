"""What a caller chooses, in the one form that the ops and both backends take.

Both are tuples of plain values, which is all that the schema of an op holds. Nothing is checked
here; `fsa.FSAConfig` checks what it holds. Imports without Triton and without a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """How A_f is made of predictions; each field as in `fsa.FSAConfig`.

    `logit_scale` and `uniform_logit_scale` multiply the cosines of features and texts; logits come
    scaled. The PyTorch backend always computes with the precision "exact".
    """

    beta: float
    confidence: float
    logit_scale: float = 1.0
    uniform_logit_scale: float = 1.0
    similarity: str = "kl"
    pruning: str | None = "confidence"
    ratio: float = 0.4
    threshold: float = 0.5
    scaling: bool = True
    precision: str = "exact"

    @property
    def cosine(self) -> bool:
        """Whether S is the cosine of the probabilities, not 1 / (1 + KL)."""
        return self.similarity == "cosine"


class Adaptations(NamedTuple):
    """Which of A_f A V, A A_f V and A_f V are averaged.

    A_f is multiplied once, with columns that stand side by side. A_f is linear, so the terms in
    which it comes last share D columns, which hold the sum of A V and V. A A_f V needs A_f V by
    itself: V takes D columns behind them, unless it is all that the first ones hold. Methods and
    no properties, which torch.compile of PyTorch 2.6 cannot trace on a tuple.
    """

    after: bool = True
    before: bool = True
    only: bool = True

    def first(self) -> int:
        """What the first D columns hold: 1 for A V, 2 for V, 3 for their sum."""
        return self.after + 2 * (self.only or not self.after)

    def second(self) -> bool:
        """Whether V takes D columns behind the first."""
        return self.before and (self.after or self.only)

    def scale(self) -> float:
        """Of the columns: the sum of the scaled terms is the mean of the terms."""
        return 1 / sum(self)

    def gather_shapes(
        self, B: int, N: int, D: int
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of what `gather` returns: attended values with the mean's row, and columns."""
        return (B, N + 1, D), (B, N, 2 * D if self.second() else D)
