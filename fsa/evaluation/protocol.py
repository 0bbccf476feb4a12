"""The published settings of each method on each benchmark, and what a result records of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fsa.config import PEARL_KEY_WEIGHT_OF_SCENES, SEGMENTATION_SCALE
from fsa.errors import InputError
from fsa.evaluation.layouts import FOLDER, LAYOUTS, names

LONG_SIDE = 2048
"""The published pipelines shrink pictures further so that their long side has at most this."""

_MAY_BE_NONE = ("pamr_steps", "propagation_grid")


@dataclass(frozen=True)
class Preset:
    """How pictures are cut and labelled; sizes in pixels.

    Attributes:
        name: of the family and the benchmark, such as "proxyclip/voc21".
        short_side: to which pictures are resized.
        window, stride: of the sliding window.
        whole: label a picture in one piece instead. Pixels to the right of the last whole patch
            and below it are left out, as NACLIP's code has it.
        prob_thd: pixels whose best class has a lower probability become background.
        area_thd: see `fsa.segment.labels.label_map`.
        logit_scale: of the cosines before the softmax over queries.
        pamr_steps: how often maps are refined by the picture's colours, at its own size; see
            `fsa.evaluation.refinement`. 0 for not at all.
        propagation_grid: rows and columns of cells on which maps are spread as PEARL does, at the
            picture's own size; see `fsa.evaluation.refinement`. 0 for not at all.
        class_list: of the package, see `fsa.evaluation.layouts.class_list`; empty for a folder.
        antialias: whether shrinking smooths; the published pipelines do not.
    """

    name: str
    short_side: int
    window: int
    stride: int
    whole: bool = False
    prob_thd: float = 0.0
    area_thd: float = 0.0
    logit_scale: float = SEGMENTATION_SCALE
    pamr_steps: int = 0
    propagation_grid: int = 0
    class_list: str = ""
    antialias: bool = False

    def __post_init__(self) -> None:
        for name in ("short_side", "window", "stride", "pamr_steps", "propagation_grid"):
            value, least = getattr(self, name), 0 if name in _MAY_BE_NONE else 1
            self._require(name, _is_integer(value) and value >= least, f"an integer >= {least}")
        self._require("stride", self.stride <= self.window, f"at most the window, {self.window}")
        for name in ("prob_thd", "area_thd"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
        value = self.logit_scale
        self._require("logit_scale", _is_number(value) and value > 0, "a number > 0")

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise InputError(
                f"{name}={getattr(self, name)!r} is not accepted: it must be {accepted}"
            )

    def override(self, **changes: Any) -> Preset:
        """A copy with those fields changed that are not None."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes:
            return self
        return replace(self, name=f"{self.name} changed", **changes)


FAMILIES: dict[str, str] = {
    "fsa": "FSA's values, in ProxyCLIP's code: 336 / 336 / 112, Cityscapes 448 / 224 / 80",
    "proxyclip": "ProxyCLIP's own: the same, but Cityscapes 448 / 224 / 112 and two thresholds",
    "sclip": "SCLIP's own: 336 / 224 / 112, Cityscapes 560; several names for some classes",
    "clearclip": "ClearCLIP's published code: 448 / 448 / 224, Cityscapes 448 / 224 / 224",
    "clearclip-224": "ClearCLIP in SCLIP's windows, 448 / 224 / 112; its code has them nowhere",
    "naclip": "NACLIP's own: as SCLIP's, but VOC in one piece, one scale, and 10 steps of PAMR",
    "pearl": "PEARL's own: NACLIP's sizes, and its propagation instead of PAMR; on ADE20K and "
    "Cityscapes the host pearl has key_weight=0.3",
    "tiny": "for the embedded model: 224 / 112 / 56, with FSA's thresholds",
}
"""Short side / window / stride of each family of presets."""

# FSA keeps each method's own data pipeline. MaskCLIP's numbers in the comparison tables
# come from SCLIP's, and the attention types were run in ProxyCLIP's code. SegEarth-OV's sizes and
# scale are ClearCLIP's.
_FAMILY_OF_HOST = {
    "clip": "sclip",
    "maskclip": "sclip",
    "sclip": "sclip",
    "naclip": "naclip",
    "segearth": "clearclip",
    "pearl": "pearl",
    "clearclip": "clearclip",
    "proxyclip": "fsa",
    "qk": "fsa",
    "qq": "fsa",
    "kk": "fsa",
    "vv": "fsa",
}

_HOST_OPTIONS = {
    ("pearl", "ade20k", "pearl"): {"key_weight": PEARL_KEY_WEIGHT_OF_SCENES},
    ("pearl", "cityscapes", "pearl"): {"key_weight": PEARL_KEY_WEIGHT_OF_SCENES},
}

_LARGE_VOCABULARIES = ("ade847", "context459")
_WITH_BACKGROUND = ("voc21", "context60", "coco_object")


def family_of(host: str, model: str, feedback: bool = True) -> str:
    """The family of presets that a host is published with; the embedded model has its own.

    Args:
        host: name of a host.
        model: as `fsa.load_segmentor` takes it.
        feedback: whether the run is with FSA. FSA's paper takes ProxyCLIP's numbers from the
            paper of ProxyCLIP, whose thresholds and stride are others than FSA's.

    Raises:
        InputError: a host that is not known.
    """
    if host not in _FAMILY_OF_HOST:
        raise InputError(f"host {host!r} is not known: {', '.join(_FAMILY_OF_HOST)}")
    if model == "tiny":
        return "tiny"
    return "proxyclip" if host == "proxyclip" and not feedback else _FAMILY_OF_HOST[host]


def host_options(family: str, dataset: str, host: str) -> dict[str, Any]:
    """The options of a host that a family of presets changes on a benchmark, for `fsa.hosts.build`.

    PEARL's key weight is the only one: the published configurations of the other hosts have the
    same constants on every benchmark here.

    Args:
        family: one of `FAMILIES`.
        dataset: one of `fsa.evaluation.layouts.names()`.
        host: name of a host.
    """
    return dict(_HOST_OPTIONS.get((family, dataset, host), {}))


def preset(family: str, dataset: str) -> Preset:
    """The settings of a family on a benchmark.

    Args:
        family: one of `FAMILIES`.
        dataset: one of `fsa.evaluation.layouts.names()`.

    Raises:
        InputError: an unknown name.
    """
    if family not in FAMILIES:
        raise InputError(f"preset={family!r} is not known: {', '.join(FAMILIES)}")
    if dataset not in names():
        raise InputError(f"dataset {dataset!r} is not known: {', '.join(names())}")
    settings = _SETTINGS[family](dataset)
    settings.setdefault("class_list", "" if dataset == FOLDER else dataset)
    return Preset(name=f"{family}/{dataset}", **settings)


def _fsa(dataset: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"short_side": 336, "window": 336, "stride": 112}
    if dataset == "cityscapes":
        settings.update(short_side=448, window=224, stride=80)
    elif dataset == "ade20k" or dataset in _LARGE_VOCABULARIES:
        settings.update(short_side=448)
    settings["prob_thd"] = {"voc21": 0.2, "context60": 0.14, "coco_object": 0.3}.get(dataset, 0.0)
    return settings


def _proxyclip(dataset: str) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "context60": {"prob_thd": 0.15},
        "coco_object": {"prob_thd": 0.25},
        "cityscapes": {"stride": 112},
    }
    return {**_fsa(dataset), **own.get(dataset, {})}


def _sclip(dataset: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"short_side": 336, "window": 224, "stride": 112}
    if dataset == "cityscapes":
        settings.update(short_side=560)
    elif dataset == "coco_stuff" or dataset in _LARGE_VOCABULARIES:
        settings.update(short_side=448)
    if dataset in _WITH_BACKGROUND:
        settings.update(prob_thd=0.1, logit_scale=50.0)
    if dataset == "voc21":
        settings.update(logit_scale=65.0, area_thd=0.1)
    if dataset in ("voc21", "voc20", "coco_object"):
        settings["class_list"] = f"{dataset}-sclip"
    return settings


def _naclip(dataset: str) -> dict[str, Any]:
    settings = _sclip(dataset)
    settings.update(logit_scale=SEGMENTATION_SCALE, area_thd=0.0, pamr_steps=10)
    settings["whole"] = dataset in ("voc21", "voc20")
    if dataset == "coco_stuff":
        settings["short_side"] = 336
    return settings


def _pearl(dataset: str) -> dict[str, Any]:
    grid = 224 if dataset == "cityscapes" else 80
    return {**_naclip(dataset), "pamr_steps": 0, "propagation_grid": grid}


def _clearclip(dataset: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "short_side": 448,
        "window": 224 if dataset == "cityscapes" else 448,
        "stride": 224,
        "logit_scale": 50.0,
    }
    settings["prob_thd"] = {"voc21": 0.5, "context60": 0.15, "coco_object": 0.4}.get(dataset, 0.0)
    if dataset in ("voc21", "coco_object"):
        settings["class_list"] = f"{dataset}-clearclip"
    return settings


def _clearclip_224(dataset: str) -> dict[str, Any]:
    return {**_clearclip(dataset), "window": 224, "stride": 112}


def _tiny(dataset: str) -> dict[str, Any]:
    return {**_fsa(dataset), "short_side": 224, "window": 112, "stride": 56}


_SETTINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "fsa": _fsa,
    "proxyclip": _proxyclip,
    "sclip": _sclip,
    "clearclip": _clearclip,
    "clearclip-224": _clearclip_224,
    "naclip": _naclip,
    "pearl": _pearl,
    "tiny": _tiny,
}


@dataclass(frozen=True)
class Protocol:
    """Everything a result depends on. Two runs with the same protocol count the same pixels.

    Attributes:
        dataset: name of the layout.
        pictures, names: how many pictures, and a hash of their names in order.
        preset: see `Preset`.
        classes: the text queries of each class.
        reduce_zero_label, ignore, background: see `fsa.evaluation.layouts.Layout`.
        host, model, pretrained, vfm, vfm_pretrained: as `fsa.load_segmentor` takes them.
        host_options: of the host, those that were not given included.
        weights, vfm_weights: hashes of the two models' weights.
        feedback: the configuration of FSA, or None for the host alone.
        backend, device, dtype: what computed; another may round differently.
        window_batch, chunk: windows per forward pass and pictures per unit of work: they decide
            which windows are multiplied together, and so the last bits.
        fsa, torch: versions.
    """

    dataset: str
    pictures: int
    names: str
    preset: Preset
    classes: tuple[tuple[str, ...], ...]
    reduce_zero_label: bool
    ignore: tuple[int, ...]
    background: int | None
    host: str
    host_options: dict[str, Any]
    model: str
    pretrained: str | None
    weights: str | None
    vfm: str | None
    vfm_pretrained: str | None
    vfm_weights: str | None
    feedback: dict[str, Any] | None
    backend: str
    device: str
    dtype: str
    window_batch: int
    chunk: int
    fsa: str
    torch: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return json.loads(json.dumps(asdict(self)))

    def describe(self) -> str:
        """The protocol as lines for a reader; class names are only counted."""
        values = self.to_dict()
        settings = values.pop("preset")
        classes = values.pop("classes")
        feedback = values.pop("feedback")
        options = values.pop("host_options")
        lines = [f"preset       {settings.pop('name')}"]
        lines += [f"  {name:<14}{value}" for name, value in settings.items()]
        queries = sum(map(len, classes))
        lines.append(f"classes      {len(classes)}, by {queries} names")
        lines += [f"{name:<20}{value}" for name, value in values.items() if value is not None]
        lines.append("host options")
        lines += [f"  {name:<20}{value}" for name, value in options.items()]
        lines.append("feedback     " + ("off" if feedback is None else "FSA"))
        lines += [f"  {name:<20}{value}" for name, value in (feedback or {}).items()]
        return "\n".join(lines)


# What is too long to be shown, or says nothing to a reader.
_WITHOUT_VALUES = {
    "classes": "other names",
    "names": "other pictures",
    "weights": "the model's are others now",
    "vfm_weights": "the vfm's are others now",
}


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two protocols, as dictionaries, differ: "preset.stride: 112, now 56"."""
    found: list[str] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            if name in _WITHOUT_VALUES:
                found.append(f"{prefix}{name}: {_WITHOUT_VALUES[name]}")
            else:
                found.append(f"{prefix}{name}: {old!r}, now {new!r}")
    return found


def table() -> str:
    """Every preset as one line, for `fsa eval --list`."""
    lines = [
        f"{'preset':<26}{'short':>6}{'window':>7}{'stride':>7}{'prob_thd':>9}{'area_thd':>9}"
        f"{'scale':>6}{'pamr':>5}{'grid':>5}"
    ]
    for family in FAMILIES:
        for dataset in (*LAYOUTS, FOLDER):
            p = preset(family, dataset)
            window, stride = ("whole", "-") if p.whole else (p.window, p.stride)
            lines.append(
                f"{p.name:<26}{p.short_side:>6}{window:>7}{stride:>7}{p.prob_thd:>9g}"
                f"{p.area_thd:>9g}{p.logit_scale:>6g}{p.pamr_steps:>5}{p.propagation_grid:>5}"
            )
    return "\n".join(lines)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
