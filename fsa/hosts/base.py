"""What all hosts share: the way from images to patch features, with and without feedback."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fsa import ops
from fsa.config import FSAConfig
from fsa.errors import InputError
from fsa.hosts.block import LastAttention, LastBlock
from fsa.models.timm_tower import tower_of
from fsa.ops.checks import autocast_off


def adapted_heads(
    attention: LastAttention,
    tail: Callable[[Tensor], Tensor],
    text_features: Tensor,
    config: FSAConfig,
    backend: str,
    *,
    observe: Callable[[Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """The feedback loop: what the heads gather under the adapted attention, (B,H,N,d).

    Args:
        attention: of the host's last block.
        tail: from what heads gather, (B,H,N,d), to features (B,N,E) in the space shared with text.
            With one row more, that of uniform attention, come its features after those of the
            patches: one, or where the tail adds each patch's own token, N.
        text_features: (C,E) of unit length.
        config: how feedback is computed.
        backend: of the ops.
        observe: called with the features of the patches (B,N,E), and those under uniform attention
            (B,1,E), (B,N,E) or None, of each iteration.
    """
    heads = attention.attended
    uniform = None
    if not config.isolation:
        first = tail(heads)
    else:
        if attention.step is None:
            assert attention.mean_value is not None
            both = torch.cat([heads, attention.mean_value], dim=2)
        else:
            both = attention.step.gathered
        both, N = tail(both), heads.shape[2]
        first, uniform = both[:, :N], both[:, N:]
    for number in range(config.iterations):
        features = first if number == 0 else tail(heads)
        if observe is not None:
            observe(features, uniform)
        heads = ops.feedback_step(
            attention.value,
            features,
            uniform,
            attention.apply,
            text_features=text_features,
            attended=attention.attended,
            step=attention.step,
            config=config,
            backend=backend,
        )
    return heads


class Host(nn.Module, ABC):
    """A training-free CLIP segmentor: a vision tower with another attention in its last block.

    Attributes:
        compared_as_they_are: whether the product of `features` and texts takes the place of their
            cosine; features are then not to be normalised.

    Args:
        visual: a plain open_clip `VisionTransformer`, or a `Tower`.
        residual: whether the last block keeps its residual connection and feed-forward network;
            None takes what the method published.
        backend: of the ops, "auto", "triton" or "torch".
    """

    published_residual: bool
    needs_vfm = False
    compared_as_they_are = False

    def __init__(
        self, visual: nn.Module, *, residual: bool | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        if backend not in ops.BACKENDS:
            raise InputError(f"backend={backend!r} is not known: it must be one of {ops.BACKENDS}")
        self.tower = tower_of(visual)
        self.residual = self.published_residual if residual is None else residual
        self.backend = backend

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        """The options of this host besides `backend`, with their published values."""
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name != "backend"
        }
        if "residual" in defaults:
            defaults["residual"] = cls.published_residual
        return defaults

    @property
    def options(self) -> dict[str, Any]:
        """The options of `default_options`, with the values that this host has."""
        return {name: getattr(self, name) for name in self.default_options()}

    def grid(self, height: int, width: int, vfm_features: Tensor | None = None) -> tuple[int, int]:
        """Rows and columns of the output for a picture of this size in pixels."""
        return self.tower.grid(height, width)

    @torch.no_grad()
    def features(
        self,
        images: Tensor,
        text_features: Tensor,
        *,
        vfm_features: Tensor | None = None,
        tokens: Tensor | None = None,
        config: FSAConfig | None = None,
    ) -> Tensor:
        """Patch features in the space shared with text.

        Args:
            images: (B,3,H,W), normalised with CLIP's mean and deviation, in the type and on the
                device of the tower; H and W multiples of the patch size.
            text_features: (C,E) of unit length; used by the feedback only.
            vfm_features: (B,F,gh,gw) of another vision model; for ProxyCLIP, and only there.
            tokens: (B,1+N,D), `tower.trunk(images)` where it was run already; None runs it.
            config: how feedback is computed; None runs the host without feedback.

        Returns:
            (B, gh * gw, E), not normalised, row by row of `grid`.

        Raises:
            InputError: wrong shapes, types or devices.
        """
        self._check(images, text_features, vfm_features, config)
        # Everything runs in the tower's own type, which torch.autocast would change on the way.
        with autocast_off(images):
            if tokens is None:
                tokens = self.tower.trunk(images)
            else:
                self.tower.check_tokens(tokens, images)
            block = LastBlock(self.tower, images, tokens, vfm_features)
            attention = self.attention(block, config)

            def tail(heads: Tensor) -> Tensor:
                return self.tail(tokens, heads)

            heads = attention.attended
            if config is not None:
                heads = adapted_heads(attention, tail, text_features, config, self.backend)
            return self.finish(block, tail(heads))

    # What `torch.nn.Module` calls.
    forward = features

    @abstractmethod
    def attention(self, block: LastBlock, config: FSAConfig | None) -> LastAttention:
        """The attention of the last block.

        Args:
            block: what enters it.
            config: of the feedback that will follow, for hosts that prepare it, or None.
        """

    def finish(self, block: LastBlock, features: Tensor) -> Tensor:
        """What a host makes of the features (B,N,E) after all feedback: here nothing."""
        return features

    def tail(self, tokens: Tensor, heads: Tensor) -> Tensor:
        """The rest of the last block: from A V (B,H,N,d) to features (B,N,E) in the space shared
        with text."""
        branch = self.tower.attention_branch(heads)
        if self.residual:
            branch = self.tower.residual_branches(tokens[:, self.tower.prefix_tokens :], branch)
        return self.tower.embed(branch)

    def _check(
        self,
        images: Tensor,
        text_features: Tensor,
        vfm_features: Tensor | None,
        config: FSAConfig | None,
    ) -> None:
        tower = self.tower
        # Sizes are asked of `shape`: len() would make constants of them in torch.export.
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
            raise InputError(f"images must be (B, 3, H, W); they have shape {tuple(images.shape)}")
        tower.grid(*images.shape[-2:])
        if images.dtype != tower.dtype or images.device != tower.device:
            raise InputError(
                f"images are {images.dtype} on {images.device}; the vision tower is "
                f"{tower.dtype} on {tower.device}"
            )
        if (
            text_features.ndim != 2
            or text_features.shape[1] != tower.output_dim
            or (text_features.shape[0] == 0)
        ):
            raise InputError(
                f"text_features must be (C, {tower.output_dim}) for this model; they have shape "
                f"{tuple(text_features.shape)}"
            )
        if config is not None and not isinstance(config, FSAConfig):
            raise InputError(f"config must be an FSAConfig or None, not {type(config).__name__}")
        if not self.needs_vfm and vfm_features is not None:
            raise InputError(
                f"vfm_features were given to {type(self).__name__}, which takes none; "
                "they are for the host 'proxyclip'"
            )
        if self.needs_vfm and vfm_features is None:
            raise InputError(
                f"{type(self).__name__} needs vfm_features (B, F, gh, gw) of another vision model"
            )
