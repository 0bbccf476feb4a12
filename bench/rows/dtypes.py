"""Rows of what bfloat16 saves on a CPU, and of what half precision changes in the labels.

Their types are those of their contenders, whatever the type of the run.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

import fsa
from bench.rows.contenders import Build, Call, Row
from bench.rows.hosts import HostRow, our_host
from bench.rows.op import OpRow, make_inputs, ours
from fsa.models.timm_tower import tower_of
from fsa.ops import torch_backend

TYPES = (torch.float32, torch.bfloat16)
# Of labels float16 is judged too, which is slow on most CPUs.
HALVES = (torch.bfloat16, torch.float16)
MODES = ("off", "on")
STEPS = ("fsa step", "fsa step without", "products")

_WIDTH = 768
_CLASSES = 171


class DtypeRow(Row, ABC):
    """A comparison of types on the CPU.

    Attributes:
        part: "window", "step" or "labels".
    """

    kind: ClassVar[str] = "dtypes"
    graphs: ClassVar[bool] = False
    part: ClassVar[str]


@dataclass(frozen=True)
class WindowRow(DtypeRow):
    """A window through ClearCLIP without and with feedback, and through all blocks but the last.

    Args:
        backbone: as `HostRow` takes it.
        side: in pixels.
    """

    part: ClassVar[str] = "window"

    backbone: str
    side: int = 336

    @property
    def name(self) -> str:
        return f"window clearclip {self.backbone} {self.side}"

    def small(self) -> WindowRow:
        return WindowRow(self.backbone, 112)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
        return {
            f"{name}, {short_name(own)}": partial(build, self, device, own)
            for own in TYPES
            for name, build in (
                *((f"fsa {mode}", partial(_window, mode=mode)) for mode in MODES),
                ("trunk", _trunk),
            )
        }


@dataclass(frozen=True)
class TypedStepRow(DtypeRow):
    """A feedback step beside the three products of N x N by N x 768 that every form of it needs.

    "without" is the step with neither units for bfloat16 nor oneDNN's float32 products.

    Args:
        N: patches.
        C: queries.
    """

    part: ClassVar[str] = "step"

    N: int
    C: int = _CLASSES

    @property
    def name(self) -> str:
        return f"step by types N={self.N} C={self.C}"

    def small(self) -> TypedStepRow:
        return TypedStepRow(64, self.C)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
        return {
            f"{name}, {short_name(own)}": partial(build, self, device, own)
            for own in TYPES
            for name, build in zip(STEPS, (_step, _step_without, _products), strict=True)
        }


@dataclass(frozen=True)
class LabelsRow(DtypeRow):
    """Whether the embedded model labels pictures in half precision as it does in float32.

    What a call returns is the share of pixels of the same label, of all pictures and of the one
    where it is lowest.

    Args:
        host: a name.
        folder: of `images/` and `classes.txt`, as `fsa eval folder` takes it; None for the pictures
            that are shipped, with the classes that they were composed of.
    """

    part: ClassVar[str] = "labels"

    host: str
    folder: Path | None = None

    @property
    def name(self) -> str:
        return f"labels {self.host} {'scenes' if self.folder is None else self.folder.name}"

    def small(self) -> LabelsRow:
        return self

    def contenders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
        return {short_name(half): partial(_agreement, self, half) for half in HALVES}


def short_name(dtype: torch.dtype) -> str:
    """As results have it."""
    return str(dtype).removeprefix("torch.")


def _window(row: WindowRow, device: torch.device, dtype: torch.dtype, mode: str) -> Call:
    inputs = HostRow("clearclip", row.backbone, row.side).inputs(device, dtype)
    return our_host("clearclip", inputs, inputs.configs[mode])


def _trunk(row: WindowRow, device: torch.device, dtype: torch.dtype) -> Call:
    inputs = HostRow("clearclip", row.backbone, row.side).inputs(device, dtype)
    return partial(tower_of(inputs.visual).trunk, inputs.images)


def _step(row: TypedStepRow, device: torch.device, dtype: torch.dtype) -> Call:
    return ours("step", "torch", make_inputs(OpRow("step", 1, row.N, row.C), device, dtype))


def _step_without(row: TypedStepRow, device: torch.device, dtype: torch.dtype) -> Call:
    step = _step(row, device, dtype)

    def without() -> Tensor:
        with (
            mock.patch.object(torch_backend, "bfloat16_units", return_value=()),
            mock.patch.object(torch_backend, "float32_by_onednn", return_value=False),
        ):
            return step()

    return without


def _products(row: TypedStepRow, device: torch.device, dtype: torch.dtype) -> Call:
    matrix = torch.rand(1, row.N, row.N, device=device).softmax(dim=-1).to(dtype)
    wide, narrow = (
        torch.randn(1, row.N, sides * _WIDTH, device=device).to(dtype) for sides in (2, 1)
    )

    def products() -> Tensor:
        torch_backend.rows_times(matrix, wide)
        return torch_backend.rows_times(matrix, narrow)

    return products


def _agreement(row: LabelsRow, half: torch.dtype) -> Call:
    def agreement() -> Tensor:
        labels = _labels(row, half)
        same = [now == exact for now, exact in zip(labels, _exact_labels(row), strict=True)]
        equal = torch.cat([of_one.flatten() for of_one in same])
        shares = [of_one.double().mean() for of_one in same]
        return torch.stack([equal.double().mean(), min(shares)])

    return agreement


@lru_cache(maxsize=1)
def _exact_labels(row: LabelsRow) -> list[Tensor]:
    return _labels(row, torch.float32)


def _labels(row: LabelsRow, dtype: torch.dtype) -> list[Tensor]:
    segmentor = fsa.load_segmentor(row.host, dtype=dtype, device="cpu", cache_text=False)
    return [
        torch.from_numpy(segmentor.segment(picture, classes).labels)
        for picture, classes in pictures(row.folder)
    ]


def pictures(folder: Path | None) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Pictures with their classes, of a folder or those that are shipped."""
    if folder is None:
        from bench.quality import guards
        from fsa import tiny

        for scene in tiny.demo_scenes():
            yield scene.picture, scene.classes
        for picture, _, classes in guards.scenes():
            yield picture, classes
        return
    from fsa.classes import read_class_file

    classes = read_class_file(folder / "classes.txt")
    for picture in sorted((folder / "images").iterdir()):
        yield picture, classes
