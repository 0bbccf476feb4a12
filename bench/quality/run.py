"""Does feedback help? Segments the test splits with every host, without and with FSA.

Two protocols, with published constants only:

- `20 names`: a picture is asked for the classes in it and for others drawn to make 20, about as
  many as VOC has;
- `all names`: every picture is asked for all classes of the vocabulary.

Either way there is one confusion matrix of all classes per split, and mIoU is the mean over the
classes that its masks hold. Labels and masks are compared at every fourth pixel in each direction.
Intervals come from resampling the pictures; those of a gain from resampling host and host + FSA
together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from bench import RESULTS
from bench.environment import environment
from fsa import hosts, tiny
from fsa.config import ADAPTATIONS, FSAConfig
from fsa.models.guides import LAYER, load_vfm
from fsa.models.loading import load_model
from fsa.models.text import TextEncoder
from fsa.models.tower import Tower
from fsa.pictures import windows
from fsa.segment.inspection import Attentions, attentions
from fsa.segment.segmentor import load_segmentor
from fsa.tiny.compose import (
    NAMES,
    PICTURES,
    SIDE,
    SINGLE_PICTURES,
    SINGLES,
    TESTS,
    Split,
    asked_classes,
)
from fsa.tiny.vocabulary import CLASSES, OBJECTS

FILE = RESULTS / "quality.json"

# Host and options by what the results call them; "qq" is ClearCLIP.
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", {}),
    "maskclip": ("maskclip", {}),
    "sclip": ("sclip", {}),
    "sclip, matched mass": ("sclip", {"match_mass": True}),
    **{name: (name, {}) for name in ("clearclip", "proxyclip", "qk", "kk", "vv")},
}
PROTOCOLS = (f"{NAMES} names", "all names")
TOP_K = (1, 5, 10)

# What the paper's Tables 5, 6, 7 and S9 and its section 6 vary, by the changes to its constants.
ABLATED_HOSTS = ("maskclip", "sclip", "clearclip", "proxyclip")
ABLATED_PICTURES = 100
AS_PUBLISHED = "as published"
ABLATIONS: dict[str, dict[str, Any]] = {
    AS_PUBLISHED: {},
    **{
        f"pruning {pruning or 'none'}, scaling {'on' if scaling else 'off'}": {
            "pruning": pruning,
            "scaling": scaling,
        }
        for pruning in (None, "ratio", "threshold", "confidence")
        for scaling in (False, True)
        if (pruning, scaling) != ("confidence", True)
    },
    "isolation off": {"isolation": False},
    **{f"adaptation {name}": {"adaptations": (name,)} for name in ADAPTATIONS},
    "similarity cosine": {"similarity": "cosine"},
    "iterations 2": {"iterations": 2},
}

_STEP = 4
_RESAMPLES = 1000
_SEED = 7


class SharedTower(Tower):
    """A tower that remembers the tokens of the last pictures, so that hosts share the trunk."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__(visual)
        self._remembered: tuple[Tensor | None, Tensor | None] = (None, None)

    def trunk(self, images: Tensor) -> Tensor:
        if images is not self._remembered[0]:
            self._remembered = (images, super().trunk(images))
        return self._remembered[1]


@dataclass(frozen=True)
class Sizes:
    """Of a segmentor's protocol, in pixels."""

    short_side: int
    window: int
    stride: int

    @classmethod
    def default(cls) -> Sizes:
        """What the segmentor takes for the embedded model."""
        settings = load_segmentor().segment(np.zeros((16, 16, 3), np.uint8), ["a"]).settings
        return cls(*(settings[name] for name in ("short_side", "window", "stride")))


class Evaluator:
    """Segments pictures as `Segmentor.segment` does, with what hosts share computed once.

    Args:
        sizes: of the protocol, None for the segmentor's; windows are whole patches.
    """

    def __init__(self, sizes: Sizes | None = None) -> None:
        self.sizes = sizes = sizes or Sizes.default()
        self.loaded = load_model(device="cpu")
        self._text = TextEncoder(self.loaded)
        visual = self.loaded.model.visual
        self.tower = SharedTower(visual)
        self.hosts = {
            name: hosts.build(host, visual, **options) for name, (host, options) in HOSTS.items()
        }
        for host in self.hosts.values():
            host.tower = self.tower
        self.vfm = load_vfm(LAYER, tower=self.tower, mean=self.loaded.mean, std=self.loaded.std)
        self.parts = windows.plan(sizes.short_side, sizes.short_side, sizes.window, sizes.stride)
        self.grid = self.tower.grid(self.parts[0].height, self.parts[0].width)
        self._merging = self._merging_matrix()

    def text(self, names: Sequence[str]) -> Tensor:
        """Text features (C,E) of class names."""
        return self._text.encode(names).features

    def normalised(self, pictures: Tensor) -> Tensor:
        """Pictures (B,3,SIDE,SIDE) uint8 with CLIP's mean and deviation."""
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.loaded.mean, self.loaded.std))
        return (pictures.float() / 255 - mean) / std

    def image_features(self, pictures: Tensor) -> Tensor:
        """The model's own embedding (B,E) of pictures (B,3,SIDE,SIDE) uint8, of unit length."""
        return functional.normalize(
            self.loaded.model.encode_image(self.normalised(pictures)), dim=-1
        )

    def crops(self, picture: Tensor) -> Tensor:
        """The windows (W,3,h,w) of a picture (3,SIDE,SIDE) uint8, normalised."""
        image = self.normalised(picture[None])
        if self.sizes.short_side != SIDE:
            size = (self.sizes.short_side, self.sizes.short_side)
            image = functional.interpolate(image, size=size, mode="bilinear", antialias=True)
        return torch.stack([image[0][(slice(None), *part.slices)] for part in self.parts])

    def labels(self, features: Tensor, text_features: Tensor) -> np.ndarray:
        """Labels at every fourth pixel, from patch features (W,N,E) and text features (C,E)."""
        unit = functional.normalize(features, dim=-1).flatten(0, 1)
        return (self._merging @ (unit @ text_features.T)).argmax(dim=1).numpy()

    def sampled(self, mask: Tensor) -> np.ndarray:
        """A mask (SIDE,SIDE) at the pixels of `labels`."""
        return mask[_STEP // 2 :: _STEP, _STEP // 2 :: _STEP].flatten().numpy()

    def of_patches(self, mask: Tensor) -> Tensor:
        """What a mask (SIDE,SIDE) has in the middle of every patch of every window: (W,N)."""
        size = (self.sizes.short_side, self.sizes.short_side)
        resized = functional.interpolate(mask[None, None].float(), size=size, mode="nearest")
        rows, columns = self.tower.patch_size
        middles = (slice(rows // 2, None, rows), slice(columns // 2, None, columns))
        return torch.stack(
            [resized[0, 0][part.slices][middles].long().flatten() for part in self.parts]
        )

    def _merging_matrix(self) -> Tensor:
        """From the patches of all windows to sampled pixels: upsampling and merging are linear.

        Sparse, (pixels, windows * patches).
        """
        side, count = self.sizes.short_side, self.grid[0] * self.grid[1]
        upsampled = functional.interpolate(
            torch.eye(count).unflatten(1, self.grid)[None],
            size=(self.parts[0].height, self.parts[0].width),
            mode="bilinear",
        )[0]
        covered = torch.zeros(side, side)
        for part in self.parts:
            covered[part.slices] += 1
        columns = []
        for part in self.parts:
            whole = torch.zeros(count, side, side)
            whole[(slice(None), *part.slices)] = upsampled
            whole /= covered
            if side != SIDE:
                whole = functional.interpolate(whole[None], size=(SIDE, SIDE), mode="bilinear")[0]
            columns.append(whole[:, _STEP // 2 :: _STEP, _STEP // 2 :: _STEP].flatten(1))
        return torch.cat(columns).T.to_sparse()


@dataclass
class Areas:
    """Per picture and class: pixels labelled right, labelled so, and truly so."""

    right: list[np.ndarray] = field(default_factory=list)
    labelled: list[np.ndarray] = field(default_factory=list)
    true: list[np.ndarray] = field(default_factory=list)

    def add(self, labels: np.ndarray, truth: np.ndarray) -> None:
        """Adds a picture, from its labels and true classes (pixels,)."""
        counted = (
            (self.right, labels[labels == truth]),
            (self.labelled, labels),
            (self.true, truth),
        )
        for areas, classes in counted:
            areas.append(np.bincount(classes, minlength=len(CLASSES)))

    def first(self, pictures: int) -> Areas:
        """Those of the first pictures."""
        return Areas(self.right[:pictures], self.labelled[:pictures], self.true[:pictures])

    def mean_iou(self, weights: np.ndarray) -> np.ndarray:
        """In percent, (R,), for weights (R,pictures) of the pictures.

        The mean over the classes that truly occur, so that resamples with fewer of them are not
        worse for it.
        """
        right, labelled, true = (
            weights @ np.array(areas) for areas in (self.right, self.labelled, self.true)
        )
        union = labelled + true - right
        iou = np.divide(right, union, out=np.full(union.shape, np.nan), where=true > 0)
        return 100 * np.nanmean(iou, axis=1)


def resamples(pictures: int) -> np.ndarray:
    """(1 + R, pictures): every picture once, then how often each is in a resample."""
    share = np.full(pictures, 1 / pictures)
    drawn = np.random.default_rng(_SEED).multinomial(pictures, share, size=_RESAMPLES)
    return np.concatenate([np.ones((1, pictures), dtype=drawn.dtype), drawn])


def with_interval(values: np.ndarray) -> dict[str, float]:
    """The first value, and the middle 95% of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def compared(baseline: Areas, adapted: Areas) -> dict[str, dict[str, float]]:
    """mIoU of a host, of host + FSA, and the gain, in percent, on the pictures that both have."""
    count = len(adapted.true)
    weights = resamples(count)
    before, after = baseline.first(count).mean_iou(weights), adapted.mean_iou(weights)
    return {
        "baseline": with_interval(before),
        "fsa": with_interval(after),
        "gain": with_interval(after - before),
    }


def retention(attention: Tensor, labels: Tensor, k: int) -> float:
    """The paper's top-k retention, in [0, 1].

    The share of the k patches that a patch attends to most, itself left out, that are predicted
    as the same class as the patch.

    Args:
        attention: (W,N,N).
        labels: (W,N), the classes predicted for the patches.
        k: at most N - 1 patches are taken.
    """
    N = attention.shape[-1]
    itself = torch.eye(N, dtype=torch.bool)
    attended = attention.masked_fill(itself, -1).topk(min(k, N - 1)).indices
    same = labels.gather(1, attended.flatten(1)).unflatten(1, attended.shape[1:])
    return float((same == labels[..., None]).float().mean())


def purity(attention: Tensor, truth: Tensor) -> float:
    """The share of attention (W,N,N) that falls on patches of the same true class (W,N)."""
    same = truth[:, :, None] == truth[:, None]
    return float((attention * same).sum() / attention.sum())


@torch.no_grad()
def evaluate(
    evaluator: Evaluator,
    split: Split,
    pictographs: Path,
    pictures: int,
    *,
    ablations: bool = False,
) -> dict[str, Any]:
    """All hosts on the first pictures of a split, without and with feedback.

    Args:
        split, pictographs: what to compose, and from what.
        pictures: how many.
        ablations: with the paper's ablations, on the first 100 pictures.
    """
    text = evaluator.text(split.class_names)
    areas: dict[tuple[str, str, str], Areas] = defaultdict(Areas)
    looked: dict[str, list[dict[str, float | None]]] = defaultdict(list)

    progress = tqdm(_scenes(split, pictographs, pictures), total=pictures, desc=split.name)
    for number, (picture, mask) in enumerate(progress):
        crops = evaluator.crops(picture)
        vfm_features = evaluator.vfm(crops)
        truth = evaluator.sampled(mask)
        some = asked_classes(mask.numpy(), split, number)
        asked = dict(zip(PROTOCOLS, (some, np.arange(len(CLASSES))), strict=True))
        for name, host in evaluator.hosts.items():
            proxy = {"vfm_features": vfm_features} if host.needs_vfm else {}
            config = FSAConfig.preset(vfm=evaluator.vfm.name if host.needs_vfm else None)
            baseline = host.features(crops, text, **proxy)
            for protocol, chosen in asked.items():
                queries = text[chosen]
                features = {"host": baseline}
                if protocol == PROTOCOLS[0]:
                    seen = attentions(host, crops, queries, config=config, **proxy)
                    looked[name].append(_looked_at(seen, baseline, queries, evaluator, mask))
                    features["published"] = seen.features
                    if ablations and name in ABLATED_HOSTS and number < ABLATED_PICTURES:
                        features[AS_PUBLISHED] = seen.features
                        for what, changes in ABLATIONS.items():
                            if changes:
                                changed = config.replace(**changes)
                                features[what] = host.features(
                                    crops, queries, config=changed, **proxy
                                )
                else:
                    features["published"] = host.features(crops, queries, config=config, **proxy)
                for what, of_patches in features.items():
                    labels = chosen[evaluator.labels(of_patches, queries)]
                    areas[name, protocol, what].add(labels, truth)

    return {
        "split": split.name,
        "pictures": pictures,
        "scores": [
            {
                "host": name,
                "protocol": protocol,
                "what": what,
                **compared(areas[name, protocol, "host"], of_what),
            }
            for (name, protocol, what), of_what in areas.items()
            if what != "host"
        ],
        "patches": [
            {"host": name, **{key: _mean([e[key] for e in entries]) for key in entries[0]}}
            for name, entries in looked.items()
        ],
    }


def _scenes(split: Split, pictographs: Path, pictures: int) -> Iterator[tuple[Tensor, Tensor]]:
    for scenes in split.scenes(pictographs, pictures):
        yield from zip(scenes.pictures, scenes.masks.long(), strict=True)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _looked_at(
    seen: Attentions, baseline: Tensor, queries: Tensor, evaluator: Evaluator, mask: Tensor
) -> dict[str, float | None]:
    """What a picture's patches attend to, before and after feedback."""
    before, after = (
        (functional.normalize(features, dim=-1) @ queries.T).argmax(dim=-1)
        for features in (baseline, seen.features)
    )
    truth = evaluator.of_patches(mask)
    itself = torch.eye(seen.host.shape[-1], dtype=torch.bool)
    # MaskCLIP attends to nothing but the patch itself.
    attends = bool(seen.host.masked_fill(itself, 0).any())
    entries: dict[str, float | None] = {}
    for k in TOP_K:
        entries[f"top-{k} host"] = retention(seen.host, before, k) if attends else None
        entries[f"top-{k} fsa"] = retention(seen.adapted, after, k)
    entries["purity uniform"] = purity(torch.ones_like(seen.host), truth)
    entries["purity host"] = purity(seen.host, truth)
    entries["purity feedback"] = purity(seen.feedback, truth)
    entries["purity adapted"] = purity(seen.adapted, truth)
    entries["feedback itself"] = float(seen.feedback.diagonal(dim1=1, dim2=2).mean())
    entries["kept"] = float((seen.feedback > 0).float().mean())
    return entries


@torch.no_grad()
def top1(evaluator: Evaluator, split: Split, pictographs: Path) -> dict[str, Any]:
    """Accuracy among all object names on scenes of one object, by the model's own embedding."""
    text = evaluator.text(split.class_names)[: len(OBJECTS)]
    right = []
    for scenes in split.scenes(pictographs, SINGLE_PICTURES):
        best = (evaluator.image_features(scenes.pictures) @ text.T).argmax(dim=1)
        right.append(best == torch.tensor([objects[0] for objects in scenes.objects]))
    outcome = torch.cat(right).numpy()
    accuracy = 100 * (resamples(len(outcome)) @ outcome) / len(outcome)
    return {"split": split.name, "pictures": len(outcome), "top1": with_interval(accuracy)}


def run(pictographs: Path, file: Path, pictures: int = PICTURES) -> dict[str, Any]:
    """Evaluates everything and writes the results.

    Args:
        pictographs: what `python -m fsa.tiny.pictographs` wrote.
        file: JSON with the environment, the protocol and the scores.
        pictures: of each split.
    """
    start = time.perf_counter()
    evaluator = Evaluator()
    record: dict[str, Any] = {
        # Where the pictographs lie is this machine's own affair.
        "environment": environment(torch.device("cpu"))
        | {"command": f"python -m bench quality --pictographs DIR --pictures {pictures}"},
        "weights_sha256": tiny.weights_path().with_suffix(".sha256").read_text().split()[0],
        "protocol": {**asdict(evaluator.sizes), "names": NAMES, "resamples": _RESAMPLES},
        "top1": [top1(evaluator, split, pictographs) for split in SINGLES],
        "splits": [
            evaluate(evaluator, split, pictographs, pictures, ablations=split is TESTS[0])
            for split in TESTS
        ],
    }
    record["seconds"] = round(time.perf_counter() - start)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    return record


def main(arguments: Sequence[str]) -> int:
    """Evaluates the present weights."""
    parser = argparse.ArgumentParser(
        prog="python -m bench quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pictographs", type=Path, required=True, help="what fsa.tiny.pictographs wrote"
    )
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of each split")
    parser.add_argument("--out", type=Path, default=FILE, help="file of the results")
    options = parser.parse_args(arguments[1:])
    run(options.pictographs, options.out, options.pictures)
    return 0
