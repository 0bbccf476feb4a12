"""CLIP and SigLIP models of the transformers library behind the hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa.errors import InputError
from fsa.models.loading import LoadedModel, resolve_device, resolve_dtype
from fsa.models.tower import Tower, resized_positions, with_branch

_INSTALL = "pip install 'fsa-kernels[transformers]'"
# The letters by which presets know the sizes of CLIP's vision towers, by their width.
_SIZES = {768: "B", 1024: "L", 1280: "H"}


def from_transformers(
    model: Any,
    processor: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> LoadedModel:
    """A model of the transformers library, ready to run behind any host.

    Args:
        model: a `CLIPModel` or `SiglipModel`; put into evaluation mode, and otherwise used as it
            is: its modules are run, not copied.
        processor: the model's `CLIPProcessor` or `SiglipProcessor`: its tokenizer reads the
            texts, and its image processor says how pictures are normalised.
        device, dtype: where and in which type the model is to run; default as it comes. A model
            that is elsewhere is moved.

    Raises:
        InputError: another kind of model or processor, or transformers not installed.
    """
    try:
        from transformers import CLIPModel, SiglipModel
    except ImportError:
        raise InputError(
            f"model must be a name, not {type(model).__name__}. Models of the transformers library "
            f"are taken where it is installed, at version 5 or newer: {_INSTALL}"
        ) from None
    if isinstance(model, CLIPModel):
        tower: Tower = CLIPTower(model)
        name = _clip_name(model)
    elif isinstance(model, SiglipModel):
        tower = SiglipTower(model)
        name = type(model).__name__
    else:
        raise InputError(
            "model must be a name, or a CLIPModel or SiglipModel of transformers, not "
            f"{type(model).__name__}"
        )
    tokenizer = getattr(processor, "tokenizer", None)
    statistics = getattr(processor, "image_processor", None)
    if tokenizer is None or statistics is None:
        raise InputError(
            "processor must be the model's processor, such as CLIPProcessor, with a tokenizer and "
            f"an image_processor; it is {type(processor).__name__}"
        )
    if device is not None:
        model.to(resolve_device(device))
    if dtype is not None:
        model.to(resolve_dtype(dtype, model.logit_scale.device))
    return LoadedModel(
        model=TransformersModel(model.eval(), tower),
        tokenizer=_tokenizer(tokenizer, model.config.text_config.max_position_embeddings),
        name=name,
        pretrained=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        mean=tuple(statistics.image_mean),
        std=tuple(statistics.image_std),
        image_size=model.config.vision_config.image_size,
    )


class TransformersModel(nn.Module):
    """A model of transformers under the names that open_clip's have.

    Attributes:
        visual: its vision tower.
        logit_scale: as trained.
    """

    def __init__(self, model: nn.Module, tower: Tower) -> None:
        super().__init__()
        self.model = model
        self.visual = tower

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (T,E), not normalised, of tokens (T,L)."""
        return self.model.get_text_features(input_ids=tokens).pooler_output


class _TransformersTower(Tower):
    """What CLIP's and SigLIP's towers have in common; see `Tower`."""

    def __init__(self, vision_model: nn.Module, output_dim: int) -> None:
        nn.Module.__init__(self)
        config = vision_model.config
        self.visual = vision_model
        self.patch_size = (config.patch_size, config.patch_size)
        self.width = config.hidden_size
        self.heads = config.num_attention_heads
        self.layers = config.num_hidden_layers
        self.output_dim = output_dim

    @property
    def last(self) -> nn.Module:
        return self.visual.encoder.layers[-1]

    @property
    def _patch_weight(self) -> Tensor:
        return self.visual.embeddings.patch_embedding.weight

    def project(
        self, tokens: Tensor, names: str, grid: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        normed = self.last.layer_norm1(tokens)
        attention = self.last.self_attn
        projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        return {
            name: projections[name](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in names
        }

    def attention_branch(self, heads: Tensor) -> Tensor:
        return self.last.self_attn.out_proj(heads.transpose(1, 2).flatten(2))

    def residual_branches(self, tokens: Tensor, branch: Tensor) -> Tensor:
        tokens = with_branch(tokens, branch)
        return tokens + self.last.mlp(self.last.layer_norm2(tokens))

    def _run_blocks(self, tokens: Tensor, blocks: slice, grid: tuple[int, int]) -> Tensor:
        for layer in self.visual.encoder.layers[blocks]:
            tokens = layer(tokens, attention_mask=None)
        return tokens

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        side = self.visual.config.image_size // self.visual.config.patch_size
        return resized_positions(
            self.visual.embeddings.position_embedding.weight, (side, side), grid, self.prefix_tokens
        )

    def _patch_tokens(self, images: Tensor) -> Tensor:
        return self.visual.embeddings.patch_embedding(images).flatten(2).transpose(1, 2)


class CLIPTower(_TransformersTower):
    """The vision tower of a `CLIPModel`.

    Args:
        model: run by its own modules, neither copied nor changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.vision_model, model.config.projection_dim)
        self.projection = model.visual_projection

    def embed(self, tokens: Tensor) -> Tensor:
        return self.projection(self.visual.post_layernorm(tokens))

    def _tokens(self, images: Tensor) -> Tensor:
        grid = self.grid(*images.shape[-2:])
        first = self.visual.embeddings.class_embedding.expand(images.shape[0], 1, -1)
        tokens = torch.cat([first, self._patch_tokens(images)], dim=1)
        return self.visual.pre_layrnorm(tokens + self._positions(grid))


class SiglipTower(_TransformersTower):
    """The vision tower of a `SiglipModel`, which has no class token and pools by attention.

    The pooling head is applied to each patch as if it were the only one: its attention then has
    one key, and leaves of it the projected value. That takes patches to the space shared with text.

    Args:
        model: run by its own modules, neither copied nor changed.

    Raises:
        InputError: a model without the pooling head.
    """

    prefix_tokens = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.vision_model, model.config.vision_config.hidden_size)
        if getattr(model.vision_model, "head", None) is None:
            raise InputError(
                "the SiglipModel has no pooling head (vision_use_head=False), without which its "
                "patches do not reach the space shared with text"
            )

    def embed(self, tokens: Tensor) -> Tensor:
        head = self.visual.head
        attention = head.attention
        value_rows = slice(2 * self.width, None)
        value = functional.linear(
            self.visual.post_layernorm(tokens),
            attention.in_proj_weight[value_rows],
            attention.in_proj_bias[value_rows],
        )
        pooled = attention.out_proj(value)
        return pooled + head.mlp(head.layernorm(pooled))

    def _tokens(self, images: Tensor) -> Tensor:
        return self._patch_tokens(images) + self._positions(self.grid(*images.shape[-2:]))


def _tokenizer(tokenizer: Any, length: int) -> Callable[[list[str]], Tensor]:
    def tokenize(texts: list[str]) -> Tensor:
        # To the full length, as SigLIP was trained; CLIP looks at nothing beyond the text's end.
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    return tokenize


def _clip_name(model: nn.Module) -> str:
    """open_clip's name for a tower of a known size, so that presets hold; else the class's."""
    config = model.config.vision_config
    size = _SIZES.get(config.hidden_size)
    return f"ViT-{size}-{config.patch_size}" if size else type(model).__name__
