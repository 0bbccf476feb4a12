"""Vision models whose features guide ProxyCLIP: DINO's and others, CLIP's own, or a user's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fsa.errors import InputError, ModelUnavailableError
from fsa.models.checkpoints import check_weights, unreadable
from fsa.models.hub import hub_if_reachable, unavailable
from fsa.models.tower import PUBLISHED_OFFSET, Tower, resized_positions

LAYER = "layer"


@dataclass(frozen=True)
class _Known:
    """A model of timm's.

    Attributes:
        timm_name: with the tag of its weights.
        side: pictures are resized to side x side; None leaves them as they are.
        position_offset: with which positional embeddings are resized off the trained grid, see
            `fsa.models.tower.resized_positions`; None leaves that to timm, which smooths.
        fixed_size: whether timm makes it for one size of pictures unless it is asked not to.
    """

    timm_name: str
    side: int | None = None
    position_offset: float | None = None
    fixed_size: bool = True


# Positions are resized as ProxyCLIP's and FSA's code has it: DINO's by its own function, MAE's edge
# to edge, and DINOv2's with smoothing, which is what timm does.
_KNOWN = {
    "dino": _Known("vit_base_patch8_224.dino", position_offset=PUBLISHED_OFFSET),
    "dinov2": _Known("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov3": _Known("vit_base_patch16_dinov3.lvd1689m"),
    "sam": _Known("samvit_base_patch16.sa1b", side=1024),
    "mae": _Known("vit_base_patch16_224.mae", position_offset=0.0),
    "pe-spatial": _Known("vit_pe_spatial_base_patch16_512.fb"),
    "c-radio": _Known("naflexvit_base_patch16_radio_v3.c_radio", fixed_size=False),
}


def names() -> tuple[str, ...]:
    """The names that `load_vfm` takes, besides "layer:K"."""
    return (*_KNOWN, LAYER)


class VFM(ABC):
    """Features of a vision model, from pictures that are normalised for CLIP.

    Attributes:
        name: for records and presets.
        multiple: height and width of pictures must be multiples of it, in pixels.
        module: with the weights that it has besides CLIP's, or None.
    """

    name: str
    multiple: int = 1
    module: nn.Module | None = None

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B,3,H,W), normalised with CLIP's statistics -> features (B,F,gh,gw)."""

    def with_trunk(self, images: Tensor, tower: Tower) -> tuple[Tensor, Tensor | None]:
        """The features, and `tower.trunk(images)` where that is made on the way, else None."""
        return self(images), None


def load_vfm(
    vfm: str | Callable[[Tensor], Tensor],
    *,
    tower: Tower,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pretrained: bool | str | None = None,
    cache_dir: str | None = None,
) -> VFM:
    """A vision model for ProxyCLIP.

    Args:
        vfm: "dino", "dinov2", "dinov3", "sam", "mae", "pe-spatial" (Perception Encoder) or
            "c-radio" (C-RADIOv3), each ViT-B, through timm; "layer" or "layer:K", what enters block
            K of CLIP's own tower (default the middle one), which needs no second model; or any
            callable (B,3,H,W) -> (B,F,gh,gw) on pictures normalised for CLIP. Neither paper has
            evaluated DINOv3, PE-Spatial or C-RADIOv3.
        tower: CLIP's vision tower; its device and type are used.
        mean, std: CLIP's statistics, which pictures come normalised with.
        pretrained: for timm's models: None or True fetches its weights, a path reads them from a
            file (.safetensors or PyTorch, without executing code), False leaves them random.
        cache_dir: where downloaded weights are kept.

    Raises:
        InputError: an unknown name, one that the installed timm has no model for, or a file of
            another model.
        ModelUnavailableError: weights that are not there or cannot be fetched.
    """
    if isinstance(vfm, VFM):
        return vfm
    if not isinstance(vfm, str):
        if not callable(vfm):
            raise InputError(f"vfm must be a name or a callable, not {type(vfm).__name__}")
        return _CallableVFM(vfm)
    if vfm == LAYER or vfm.startswith(f"{LAYER}:"):
        return _LayerVFM(tower, _layer_number(vfm, tower))
    if vfm not in _KNOWN:
        raise InputError(
            f"vfm={vfm!r} is not known: it must be one of {', '.join(names())}, layer:K, or a "
            "callable"
        )
    known = _KNOWN[vfm]
    model = _create(vfm, known, pretrained, cache_dir)
    model = model.eval().requires_grad_(False).to(tower.device, tower.dtype)
    return _TimmVFM(vfm, model, known, mean, std)


class _TimmVFM(VFM):
    """Last-layer patch features of one of timm's vision transformers, after its final norm."""

    def __init__(
        self,
        name: str,
        model: Any,
        known: _Known,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.name = name
        self.model = self.module = model
        self.side = known.side
        self._position_offset = known.position_offset
        # Models for pictures of any size, such as C-RADIO's, call it otherwise.
        embedding = model.patch_embed if hasattr(model, "patch_embed") else model.embeds
        self._patch = embedding.patch_size[0]
        self.multiple = 1 if known.side is not None else self._patch
        # From CLIP's statistics to the model's: x' = x * gain + offset.
        cfg = model.pretrained_cfg
        gain = torch.tensor(std) / torch.tensor(cfg["std"])
        offset = (torch.tensor(mean) - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
        weight = next(model.parameters())
        self._gain = gain[:, None, None].to(weight)
        self._offset = offset[:, None, None].to(weight)

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise InputError(
                f"images are {height} x {width} pixels; {self.name} needs multiples of "
                f"{self.multiple}"
            )
        images = images * self._gain + self._offset
        if self.side is not None:
            size = (self.side, self.side)
            images = functional.interpolate(images, size=size, mode="bilinear")
        grid = (images.shape[-2] // self._patch, images.shape[-1] // self._patch)
        if self._position_offset is None:
            features = self.model.forward_features(images)
        else:
            features = self._with_positions(images, grid, self._position_offset)
        if features.ndim == 4:  # SAM's, already a map.
            return features
        tokens = features[:, self.model.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _with_positions(self, images: Tensor, grid: tuple[int, int], offset: float) -> Tensor:
        """`forward_features` of a model with a class token, with positions resized here."""
        model = self.model
        positions = resized_positions(
            model.pos_embed[0], tuple(model.patch_embed.grid_size), grid, 1, offset
        )
        # (B,rows,columns,D), as timm's models of varying size have it.
        patches = model.patch_embed(images).flatten(1, 2)
        tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return model.norm(model.blocks(model.norm_pre(tokens + positions)))


class _LayerVFM(VFM):
    """What enters a middle block of CLIP's own tower."""

    def __init__(self, tower: Tower, layer: int) -> None:
        self.name = f"{LAYER}:{layer}"
        self._tower = tower
        self._layer = layer

    def __call__(self, images: Tensor) -> Tensor:
        return self._tower.layer_features(images, self._layer)

    def with_trunk(self, images: Tensor, tower: Tower) -> tuple[Tensor, Tensor | None]:
        # A vfm can be passed on to a segmentor of another model.
        if tower.visual is not self._tower.visual:
            return self(images), None
        return self._tower.layer_and_trunk(images, self._layer)


class _CallableVFM(VFM):
    """A user's function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self.module = function if isinstance(function, nn.Module) else None

    def __call__(self, images: Tensor) -> Tensor:
        features = self._function(images)
        if not isinstance(features, Tensor) or features.ndim != 4 or len(features) != len(images):
            came = (
                f"shape {tuple(features.shape)}"
                if isinstance(features, Tensor)
                else type(features).__name__
            )
            raise InputError(
                f"the vfm {self.name!r} must return features (B, F, gh, gw) with "
                f"B = {len(images)}; it returned {came}"
            )
        return features


def _layer_number(vfm: str, tower: Tower) -> int:
    if vfm == LAYER:
        return tower.layers // 2
    number = vfm.partition(":")[2]
    if not number.isdecimal() or int(number) >= tower.layers:
        raise InputError(
            f"vfm={vfm!r} is not accepted: the tower has blocks 0 to {tower.layers - 1}"
        )
    return int(number)


def _create(
    vfm: str, known: _Known, pretrained: bool | str | None, cache_dir: str | None
) -> nn.Module:
    if not timm.is_model(known.timm_name):
        raise InputError(
            f"vfm={vfm!r}: timm {timm.__version__} has no {known.timm_name}; a newer one does: "
            "pip install -U timm"
        )
    any_size = known.fixed_size and known.side is None
    options: dict[str, Any] = {"dynamic_img_size": True} if any_size else {}
    fetch = pretrained is None or pretrained is True
    try:
        with hub_if_reachable() if fetch else nullcontext():
            model = timm.create_model(
                known.timm_name, pretrained=fetch, num_classes=0, cache_dir=cache_dir, **options
            )
    # The hub's client and its HTTP library raise many kinds of errors here.
    except Exception:
        if not fetch:
            raise
        raise unavailable(
            f"{vfm} ({known.timm_name})",
            f"timm/{known.timm_name}",
            "pass the file: vfm_pretrained=PATH (on the command line --vfm-pretrained PATH)",
        ) from None
    if isinstance(pretrained, str):
        _load_file(model, Path(pretrained).expanduser(), known.timm_name)
    return model


def _load_file(model: Any, file: Path, timm_name: str) -> None:
    if not file.is_file():
        raise ModelUnavailableError(f"vfm_pretrained={str(file)!r}: no such file")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state.get("model", state))
        state = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    # Whatever a broken or hostile file makes the readers raise; nothing in it was executed.
    except (SafetensorError, Exception):
        raise unreadable(file) from None
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(state))
    misshapen = sorted(
        key for key in set(wanted) & set(state) if wanted[key].shape != state[key].shape
    )
    if missing or misshapen:
        raise InputError(
            f"{file}: this checkpoint does not fit {timm_name}: {len(missing)} tensors are missing "
            f"and {len(misshapen)} have another shape, such as {(missing + misshapen)[0]}"
        )
    # Checkpoints may hold more, such as a classifier or a decoder.
    model.load_state_dict({key: state[key] for key in wanted})
    check_weights(model, file)
