"""The parts of a segmentor: a host on a loaded model, the model that guides it, the feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fsa import hosts
from fsa.config import FSAConfig
from fsa.errors import InputError
from fsa.models.guides import VFM, load_vfm
from fsa.models.loading import LoadedModel, load_model
from fsa.models.transformers import from_transformers


def host_name(host: str | hosts.AttentionFunction) -> str:
    """The name, or that of a function of the user's."""
    return host if isinstance(host, str) else getattr(host, "__name__", type(host).__name__)


def check_vfm(
    host: str | hosts.AttentionFunction,
    vfm: str | Callable[[Tensor], Tensor] | None,
    vfm_pretrained: bool | str | None,
) -> None:
    """Raises InputError for an unknown host, or one that takes no vfm where one was given."""
    if hosts.host_class(host).needs_vfm:
        return
    for argument, value in (("vfm", vfm), ("vfm_pretrained", vfm_pretrained)):
        if value is not None:
            raise InputError(
                f"{argument} was given, but host {host_name(host)!r} takes no vfm; it is for "
                "'proxyclip'"
            )


def loaded_model(
    model: str | nn.Module,
    pretrained: str | None,
    processor: Any,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    cache_dir: str | None,
) -> LoadedModel:
    """A model by name, or one of transformers with its processor.

    Raises:
        InputError, ModelUnavailableError: as `load_model` and `from_transformers`.
    """
    if isinstance(model, str):
        if processor is not None:
            raise InputError(
                f"processor was given, but model={model!r} takes none; it is for models of "
                "transformers"
            )
        return load_model(model, pretrained, device=device, dtype=dtype, cache_dir=cache_dir)
    if pretrained is not None:
        raise InputError(
            f"pretrained={pretrained!r} was given with a model that has its weights; leave it out, "
            "or pass a name as the model"
        )
    return from_transformers(model, processor, device=device, dtype=dtype)


def host_with_vfm(
    host: str | hosts.AttentionFunction,
    loaded: LoadedModel,
    vfm: str | Callable[[Tensor], Tensor],
    vfm_pretrained: bool | str | None,
    *,
    options: Mapping[str, Any] | None,
    backend: str,
    cache_dir: str | None,
) -> tuple[hosts.Host, VFM | None]:
    """A host on a model's vision tower, and the model that guides it where it takes one.

    Raises:
        InputError, ModelUnavailableError: as `fsa.hosts.build` and `load_vfm`.
    """
    built = hosts.build(host, loaded.model.visual, **{**(options or {}), "backend": backend})
    if not built.needs_vfm:
        return built, None
    guide = load_vfm(
        vfm,
        tower=built.tower,
        mean=loaded.mean,
        std=loaded.std,
        pretrained=vfm_pretrained,
        cache_dir=cache_dir,
    )
    return built, guide


def resolve_feedback(
    feedback: bool | FSAConfig, vfm: VFM | None, loaded: LoadedModel
) -> FSAConfig | None:
    """The configuration meant: the published one of a model and a vfm for True.

    Raises:
        InputError: neither a bool nor a configuration.
    """
    if isinstance(feedback, FSAConfig):
        return feedback
    if not isinstance(feedback, bool):
        raise InputError(
            f"feedback must be True, False or an FSAConfig, not {type(feedback).__name__}"
        )
    if not feedback:
        return None
    return FSAConfig.preset(
        vfm=vfm.name if vfm else None, model=loaded.name, temperature=loaded.temperature
    )
