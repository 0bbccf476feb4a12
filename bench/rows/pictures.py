"""Rows of whole pictures, by sliding windows. Weights are random: time does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

import fsa
from bench.rows.contenders import Build, Call, Row
from bench.rows.hosts import BACKBONES, MODES, dino, explicit_dino, text_features, tower
from bench.rows.published_hosts import PublishedHost, segment
from fsa.models.guides import VFM
from fsa.models.loading import LoadedModel
from fsa.models.text import Progress, TextQueries
from fsa.segment.segmentor import Segmentor


@dataclass(frozen=True)
class PictureRow(Row):
    """A whole picture by sliding windows, from a decoded picture to labels in main memory.

    Args:
        host, backbone: as in `HostRow`.
        height, width: of the picture, in pixels; it is not resized.
        window, stride: in pixels.
        C: queries, one a class.
    """

    kind: ClassVar[str] = "picture"
    graphs: ClassVar[bool] = False

    host: str
    backbone: str
    height: int
    width: int
    window: int
    stride: int
    C: int

    @property
    def name(self) -> str:
        return (
            f"{self.height}x{self.width} ({self.window}/{self.stride}) {self.host} {self.backbone}"
        )

    def small(self) -> PictureRow:
        return PictureRow(self.host, self.backbone, 112, 112, 112, 112, 3)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
        visual = tower(self.backbone, device, dtype)
        noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        picture = Image.fromarray(noise).resize((self.width, self.height))
        text = text_features(self.C, visual, device)
        segmentors = {"published": _published_segmentor, "fsa": our_segmentor}
        return {
            f"{name} {mode}": partial(build, self, visual, picture, text, mode == "on")
            for mode in MODES
            for name, build in segmentors.items()
        }


def our_segmentor(
    row: PictureRow, visual: nn.Module, picture: Image.Image, text: Tensor, feedback: bool
) -> Call:
    """One picture through this library's segmentor."""
    vfm = dino(visual) if row.host == "proxyclip" else None
    name = BACKBONES.get(row.backbone, row.backbone)
    segmentor = clip_segmentor(row.host, visual, text, vfm, feedback, name)
    classes = [str(number) for number in range(row.C)]
    sizes: dict[str, Any] = {
        "window": row.window,
        "stride": row.stride,
        "short_side": min(row.height, row.width),
    }

    def run() -> Tensor:
        return torch.from_numpy(segmentor.segment(picture, classes, **sizes).labels)

    return run


def clip_segmentor(
    host: str | fsa.hosts.AttentionFunction,
    visual: nn.Module,
    text: Tensor,
    vfm: VFM | None,
    feedback: bool,
    name: str = "random",
) -> Segmentor:
    """A segmentor on a vision tower, for text features (C,E) that are there already.

    Args:
        host, feedback: as `fsa.load_segmentor` takes them.
        visual: the vision tower of a model of open_clip's.
        text: of unit length, one query a class.
        vfm: for "proxyclip".
        name: of the model, by which the preset is chosen.
    """
    built = fsa.hosts.build(host, visual)
    model = nn.Module()
    model.visual = visual
    scale = torch.zeros((), dtype=built.tower.dtype, device=built.tower.device)
    model.logit_scale = nn.Parameter(scale, requires_grad=False)
    loaded = LoadedModel(
        model=model,
        tokenizer=None,
        name=name,
        pretrained="random",
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        image_size=_side(visual),
    )
    return Segmentor(str(host), built, loaded, _KnownQueries(text), vfm, feedback)


def _published_segmentor(
    row: PictureRow, visual: nn.Module, picture: Image.Image, text: Tensor, feedback: bool
) -> Call:
    weight = visual.conv1.weight
    host = PublishedHost(row.host, visual)
    proxy = explicit_dino(visual) if row.host == "proxyclip" else None
    queries = text.to(weight.dtype)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=weight.device)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=weight.device)[:, None, None]

    def forward(window: Tensor) -> Tensor:
        images = window.to(weight.dtype)
        features = proxy(images) if proxy else None
        return host(images, queries, vfm_features=features, feedback=feedback)

    def grid(height: int, width: int) -> tuple[int, int]:
        side = (proxy.multiple,) * 2 if proxy else host.tower.patch_size
        return height // side[0], width // side[1]

    def run() -> Tensor:
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(row.height, row.width, 3).permute(2, 0, 1).to(weight.device)
        image = ((pixels.float() / 255 - mean) / std)[None]
        labels = segment(forward, grid, image, queries, window=row.window, stride=row.stride)
        return labels.cpu()

    return run


def _side(visual: nn.Module) -> int:
    """Of the pictures that a vision tower was made for, in pixels."""
    size = visual.image_size
    return size if isinstance(size, int) else size[0]


class _KnownQueries:
    """Text features that need no text encoder; takes the place of `fsa.models.text.TextEncoder`."""

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def encode(self, classes: list[str], progress: Progress | None = None) -> TextQueries:
        index = torch.arange(len(classes), device=self._features.device)
        return TextQueries(self._features, index, tuple(classes))
