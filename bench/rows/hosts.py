"""Rows of whole hosts. Weights are random: time does not depend on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

import fsa
from bench.rows.contenders import Build, Call, Row
from bench.rows.published_hosts import PublishedHost, explicit_attention
from fsa.config import FSAConfig
from fsa.models.guides import VFM, load_vfm
from fsa.models.tower import Tower

# OpenAI's weights of B and L were trained with QuickGELU, and so ran the published latencies.
BACKBONES = {
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-H/14": "ViT-H-14",
}
MODES = ("off", "on")


@dataclass(frozen=True)
class HostRow(Row):
    """The whole forward of a host, from pictures to patch features, without and with FSA.

    Args:
        host: "maskclip", "sclip", "clearclip" or "proxyclip".
        backbone: a key of `BACKBONES`, or a name of open_clip's.
        side: of the square picture, in pixels.
        C: queries.
        B: images.
    """

    kind: ClassVar[str] = "host"

    host: str
    backbone: str
    side: int = 336
    C: int = 171
    B: int = 1

    @property
    def name(self) -> str:
        batch = f" B={self.B}" if self.B > 1 else ""
        return f"{self.host} {self.backbone} {self.side}{batch}"

    def small(self) -> HostRow:
        return HostRow(self.host, self.backbone, side=112, C=3)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> HostInputs:
        visual = tower(self.backbone, device, dtype)
        preset = FSAConfig.preset(vfm="dino", model=BACKBONES.get(self.backbone))
        return HostInputs(
            visual=visual,
            vfm=dino(visual) if self.host == "proxyclip" else None,
            images=torch.randn(self.B, 3, self.side, self.side, device=device, dtype=dtype),
            text=text_features(self.C, visual, device),
            configs={"off": None, "on": preset},
        )

    def contenders(
        self, device: torch.device, dtype: torch.dtype, inputs: HostInputs | None = None
    ) -> dict[str, Build]:
        inputs = inputs or self.inputs(device, dtype)
        forwards = {"published": _published_host, "fsa": our_host}
        return {
            f"{name} {mode}": partial(forward, self.host, inputs, config)
            for mode, config in inputs.configs.items()
            for name, forward in forwards.items()
        }


@dataclass(frozen=True)
class HostInputs:
    """What every contender of a host row is given.

    Attributes:
        visual: open_clip's vision tower.
        vfm: the other model, for ProxyCLIP.
        images: (B,3,H,W).
        text: (C,E) of unit length.
        configs: without feedback, "off", and with it, "on".
    """

    visual: nn.Module
    vfm: VFM | None
    images: Tensor
    text: Tensor
    configs: dict[str, FSAConfig | None]

    def vfm_features(self) -> Tensor | None:
        """Of the other model, where there is one."""
        return None if self.vfm is None else self.vfm(self.images)


def our_host(name: str, inputs: HostInputs, config: FSAConfig | None) -> Call:
    """One forward of a host of this library; the other model's is part of it."""
    host = fsa.hosts.build(name, inputs.visual)

    def forward() -> Tensor:
        return host.features(
            inputs.images, inputs.text, vfm_features=inputs.vfm_features(), config=config
        )

    return forward


def _published_host(name: str, inputs: HostInputs, config: FSAConfig | None) -> Call:
    host = PublishedHost(name, inputs.visual)
    proxy = None if inputs.vfm is None else explicit_dino(inputs.visual)
    images, text = inputs.images, inputs.text.to(inputs.images.dtype)
    beta = config.beta if config else 0.0

    def forward() -> Tensor:
        features = proxy(images) if proxy else None
        return host(images, text, vfm_features=features, feedback=config is not None, beta=beta)

    return forward


def text_features(C: int, visual: nn.Module, device: torch.device) -> Tensor:
    """Random text features (C,E) of unit length."""
    return functional.normalize(torch.randn(C, visual.output_dim, device=device), dim=-1)


# One model at a time, so that the largest do not fill the memory; rows come ordered by backbone.
@lru_cache(maxsize=1)
def tower(backbone: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """An open_clip vision tower with random weights, made on the device, where it is fast."""
    with torch.device(device):
        model = open_clip.create_model(BACKBONES.get(backbone, backbone), device=device)
    return model.visual.eval().requires_grad_(False).to(device, dtype)


@lru_cache(maxsize=1)
def dino(visual: nn.Module) -> VFM:
    """DINO ViT-B/8 with random weights, of the tower's type and on its device."""
    vfm = load_vfm(
        "dino",
        tower=Tower(visual),
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        pretrained=False,
    )
    # Without this, random weights make all patches alike, so that none passes the affinity's
    # threshold and the published attention is NaN.
    nn.init.normal_(vfm.model.pos_embed)
    return vfm


@lru_cache(maxsize=1)
def explicit_dino(visual: nn.Module) -> VFM:
    """The same model with its attention written out."""
    written_out = copy.deepcopy(dino(visual))
    explicit_attention(written_out.model)
    return written_out
