"""Every constant of the paper, in one place."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fsa.arguments import as_float, as_integer
from fsa.errors import InputError

Similarity = Literal["kl", "cosine"]
Pruning = Literal["confidence", "ratio", "threshold"]
Adaptation = Literal["after", "before", "only"]
Precision = Literal["exact", "fast"]

SIMILARITIES = ("kl", "cosine")
PRUNINGS = ("confidence", "ratio", "threshold", None)
ADAPTATIONS: tuple[Adaptation, ...] = ("after", "before", "only")
PRECISIONS = ("exact", "fast")

PROBABILITY_FLOOR = 1e-10
"""Added to a probability before its logarithm, as the published implementation does."""

SEGMENTATION_SCALE = 40.0
"""The merged cosines are multiplied with it before the softmax over queries."""

SOFTMAX_TEMPERATURE = 100.0
"""What CLIP's cosines were multiplied with at the end of its training, by which the logit scales of
the published methods were chosen."""

PROXY_SHIFT = 1.2
PROXY_GAIN = 3.0
"""ProxyCLIP's own constants: s <- (s - shift * mean(s)) * gain, negative entries masked."""

NACLIP_STD = 5.0
"""NACLIP's own constant: the deviation of its Gaussian neighbourhood, in patches."""

SEGEARTH_CLASS_WEIGHT = 0.3
"""SegEarth-OV's own constant: how much of the class token's cosines is subtracted."""

PEARL_STEPS = 5
PEARL_KEY_WEIGHT = 0.08
PEARL_KEY_WEIGHT_OF_SCENES = 0.3
"""PEARL's own constants: Newton-Schulz steps, and the weight of the keys' own product; the second
one is that of its runs on ADE20K and Cityscapes."""

# The published code's values of beta (the paper's text says 2 for all of them).
_BETA_DEFAULT = 3.0
_BETA_VIT_H = 2.3
_BETA_MAE = 4.5
# exp(88.7) is the largest float32; beyond it every weight would be inf / inf.
_BETA_LARGEST = 80


@dataclass(frozen=True)
class FSAConfig:
    """How feedback self-adaptive attention is computed. The defaults are the published ones.

    Args:
        beta: sharpness of the scaling S * exp(beta * S) of the kept similarities (Eq. 10), from 0
            to 80: a negative one would give less similar patches more weight, and beyond 80
            exp(beta) comes near the end of float32.
        confidence: p, the cumulative confidence up to which patches are kept, in (0, 1] (Eq. 9).
        logit_scale: what the hosts multiply the cosine of a patch and a text with.
        uniform_logit_scale: the same for the uniform-attention branch (section 4.1).
        similarity: "kl", S = 1 / (1 + KL) (Eqs. 7 and 8), or "cosine" of the class
            probabilities (the paper's Table S9).
        pruning: which patches of a row are kept, most similar first, the first always:
            "confidence": the longest prefix whose cumulative softmax(S) is <= `confidence`;
            "ratio": the first floor(`ratio` * N); "threshold": those with S >= `threshold`;
            None: all (Table 5).
        ratio: share of the patches kept by pruning="ratio", in (0, 1].
        threshold: similarity kept by pruning="threshold", in [0, 1].
        scaling: False leaves the kept similarities as they are (Table 5).
        isolation: False ignores the uniform-attention branch (Table 6).
        adaptations: which of "after" A_f A V, "before" A A_f V and "only" A_f V are averaged
            (Eqs. 11 to 14, Table 7).
        iterations: how many times the adapted logits are fed back (section 6).
        precision: of the similarity product on the GPU: "exact" is as exact as float32,
            "fast" is one half-precision product. The other paths always compute in float32.

    Numbers may be Python's or numpy's; they are kept as Python's.

    Raises:
        InputError: a value outside of what is accepted.
    """

    beta: float = _BETA_DEFAULT
    confidence: float = 0.45
    logit_scale: float = 20.0
    uniform_logit_scale: float = 35.0
    similarity: Similarity = "kl"
    pruning: Pruning | None = "confidence"
    ratio: float = 0.4
    threshold: float = 0.5
    scaling: bool = True
    isolation: bool = True
    adaptations: tuple[Adaptation, ...] = ADAPTATIONS
    iterations: int = 1
    precision: Precision = "exact"

    def __post_init__(self) -> None:
        for name in ("beta", "logit_scale", "uniform_logit_scale"):
            self._take(name, as_float(getattr(self, name)), "a finite number")
        self._require(
            "beta",
            self.beta >= 0,
            "at least 0 (below 0, the less similar a patch is, the more it would weigh)",
        )
        self._require("beta", self.beta <= _BETA_LARGEST, f"at most {_BETA_LARGEST}")
        for name in ("confidence", "ratio"):
            self._take(name, as_float(getattr(self, name)), "a number in (0, 1]")
            self._require(name, 0 < getattr(self, name) <= 1, "a number in (0, 1]")
        self._take("threshold", as_float(self.threshold), "a number in [0, 1]")
        self._require("threshold", 0 <= self.threshold <= 1, "a number in [0, 1]")
        for name, accepted in (
            ("similarity", SIMILARITIES),
            ("pruning", PRUNINGS),
            ("precision", PRECISIONS),
        ):
            self._require(name, getattr(self, name) in accepted, f"one of {accepted}")
        for name in ("scaling", "isolation"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        if isinstance(self.adaptations, list):
            object.__setattr__(self, "adaptations", tuple(self.adaptations))
        self._require(
            "adaptations",
            isinstance(self.adaptations, tuple)
            and len(self.adaptations) > 0
            and len(set(self.adaptations)) == len(self.adaptations)
            and set(self.adaptations) <= set(ADAPTATIONS),
            f"a non-empty tuple without repeats out of {ADAPTATIONS}",
        )
        self._take("iterations", as_integer(self.iterations), "an integer >= 1")
        self._require("iterations", self.iterations >= 1, "an integer >= 1")

    def _take(self, name: str, number: float | None, accepted: str) -> None:
        """Keeps a field as Python's own type of number, which JSON and the ops take."""
        self._require(name, number is not None, accepted)
        object.__setattr__(self, name, number)

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise InputError(
                f"{name}={getattr(self, name)!r} is not accepted: it must be {accepted}"
            )

    @classmethod
    def preset(
        cls,
        vfm: str | None = None,
        model: str | None = None,
        temperature: float | None = None,
        **overrides: Any,
    ) -> FSAConfig:
        """The published values for a proxy model and a CLIP backbone.

        Args:
            vfm: name of the proxy model ("dino", "dinov2", "sam", "mae", ...) or None.
            model: open_clip name of the backbone ("ViT-B-16", "ViT-L-14", "ViT-H-14", ...) or None.
            temperature: exp(logit_scale) of a model that was trained with a sigmoid, such as
                SigLIP; None for one that was trained with a softmax. See `logit_scale_factor`.
            **overrides: any field of the configuration.

        beta is 4.5 for MAE with every backbone, otherwise 2.3 for ViT-H and 3.0 for the rest.
        The source publishes no values for other proxies and backbones; they get the default.
        """
        if vfm is not None and vfm.lower() == "mae":
            beta = _BETA_MAE
        elif model is not None and model.lower().startswith("vit-h"):
            beta = _BETA_VIT_H
        else:
            beta = _BETA_DEFAULT
        factor = logit_scale_factor(temperature)
        scales = {
            name: getattr(cls, name) * factor for name in ("logit_scale", "uniform_logit_scale")
        }
        return cls(**{"beta": beta, **scales, **overrides})

    def replace(self, **changes: Any) -> FSAConfig:
        """A copy with some fields changed, validated like a new one."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return asdict(self)


def logit_scale_factor(temperature: float | None) -> float:
    """By how much the published logit scales (20, 35 and 40) are multiplied for a model.

    CLIP learns to multiply its cosines by 100 before the softmax, and the published scales are
    fixed shares of that. A model trained with a sigmoid multiplies them by a temperature of its
    own, 112 for SigLIP SO400M/14 at 384 pixels, and adds a bias, the same for every class, which
    drops out of a softmax over classes. Two classes' cosines are thus apart in proportion to
    1 / temperature, so the scales keep their shares: factor = temperature / 100. No paper has
    evaluated this, nor FSA on any sigmoid-trained model.

    Args:
        temperature: exp(logit_scale) of a model trained with a sigmoid; None for a softmax: 1.

    Raises:
        InputError: a temperature that is not finite and positive.
    """
    if temperature is None:
        return 1.0
    if not 0 < temperature < math.inf:
        raise InputError(
            f"temperature={temperature!r} is not accepted: it must be finite and positive"
        )
    return temperature / SOFTMAX_TEMPERATURE
