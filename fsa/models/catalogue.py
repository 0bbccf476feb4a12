"""Which of open_clip's pretrained models the hosts run on, from the configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import open_clip
import timm

# timm's modules whose models are a `VisionTransformer` or an `Eva`.
_TRANSFORMERS = ("vision_transformer", "vision_transformer_hybrid", "eva", "vitamin")


@dataclass(frozen=True)
class Pair:
    """A pretrained model of open_clip's.

    Attributes:
        model, pretrained: as `fsa.load_segmentor` takes them.
        family: which kind of vision tower it has.
        refused: why the hosts do not run on it, and what to take instead; empty where they do.
        needs_transformers: whether its text goes through the transformers library.
    """

    model: str
    pretrained: str
    family: str
    refused: str
    needs_transformers: bool

    @property
    def runs(self) -> bool:
        return not self.refused


@dataclass(frozen=True)
class _Family:
    name: str
    refused: str = ""


_PLAIN = _Family("CLIP's ViT, as open_clip writes it")
_RESNET = _Family(
    "CLIP's ResNet",
    "a ResNet has no blocks of attention between patches; take ViT-B-16 (openai)",
)
_COCA = _Family(
    "CoCa",
    "CoCa pools by an attention that leaves no patch features in the space shared with text; take "
    "ViT-L-14 (laion2b_s32b_b82k)",
)
_CONVNEXT = _Family(
    "ConvNeXt",
    "a ConvNeXt has no blocks of attention between patches; take ViT-L-14 (laion2b_s32b_b82k)",
)
_FASTVIT = _Family(
    "MobileCLIP's FastViT",
    "a FastViT mixes patches by convolutions; take MobileCLIP-B (datacompdr)",
)
_OTHER_TRANSFORMER = _Family("another vision transformer of timm's")
_OTHER = _Family(
    "another model of timm's",
    "not a plain vision transformer; take ViT-B-16-SigLIP2 (webli)",
)
# What a name in timm begins with or holds, the first that fits.
_OF_TIMM = {
    "siglip": _Family("SigLIP and SigLIP2"),
    "vit_pe_core": _Family("PE-Core"),
    "eva": _Family("EVA01 and EVA02"),
    "vitamin": _Family("ViTamin"),
    "vit_base_mci": _Family("MobileCLIP's ViT"),
    "vit_large_patch14_clip": _Family("MobileCLIP's ViT"),
    "convnext": _CONVNEXT,
    "fastvit": _FASTVIT,
}


def catalogue() -> list[Pair]:
    """Every pretrained (name, tag) pair of the installed open_clip, in its order.

    Nothing is downloaded and no model is made.
    """
    pairs = []
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(name)
        family = _family(config["vision_cfg"])
        text = config["text_cfg"]
        needs = "hf_model_name" in text or "hf_tokenizer_name" in text
        pairs.append(Pair(name, tag, family.name, family.refused, needs))
    return pairs


def listing(pairs: list[Pair]) -> str:
    """One line a pair: its name and tag, and "runs" or "refused: why"."""
    widths = [max(len(getattr(pair, part)) for pair in pairs) for part in ("model", "pretrained")]
    lines = []
    for pair in pairs:
        verdict = f"refused: {pair.refused}" if pair.refused else "runs"
        if pair.runs and pair.needs_transformers:
            verdict += ", its text with transformers"
        lines.append(f"{pair.model:<{widths[0]}}  {pair.pretrained:<{widths[1]}}  {verdict}")
    return "\n".join(lines)


def summary(pairs: list[Pair]) -> str:
    """The count in words, with the version of open_clip that it holds for."""
    runs = sum(pair.runs for pair in pairs)
    return (
        f"{runs} of the {len(pairs)} pretrained models of open_clip {open_clip.__version__} run, "
        f"{len(pairs) - runs} are refused"
    )


def markdown(pairs: list[Pair]) -> str:
    """A table for the documentation: a row for each family, those that run first."""
    families: dict[str, list[Pair]] = {}
    for pair in pairs:
        families.setdefault(pair.family, []).append(pair)
    rows = sorted(families.values(), key=lambda group: (not group[0].runs, -len(group)))
    lines = [
        f"{summary(pairs)}.",
        "",
        "| Vision tower | Pretrained models | For example | Runs |",
        "|---|---|---|---|",
    ]
    for group in rows:
        first = group[0]
        verdict = "yes" if first.runs else f"no: {first.refused}"
        example = f"`{first.model}` (`{first.pretrained}`)"
        lines.append(f"| {first.family} | {len(group)} | {example} | {verdict} |")
    return "\n".join(lines)


def _family(vision: dict[str, Any]) -> _Family:
    name = vision.get("timm_model_name")
    if name is None:
        # The blocks of a ResNet's four stages come as a list.
        if isinstance(vision["layers"], (list, tuple)):
            return _RESNET
        return _COCA if vision.get("attentional_pool") else _PLAIN
    for part, family in _OF_TIMM.items():
        if part in name:
            return family
    module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    return _OTHER_TRANSFORMER if module in _TRANSFORMERS else _OTHER
