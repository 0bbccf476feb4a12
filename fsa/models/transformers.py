"""Models of the transformers library behind the hosts: CLIP, its descendants, and SigLIP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa.errors import InputError
from fsa.models.loading import LoadedModel, resolve_device, resolve_dtype
from fsa.models.tower import PUBLISHED_OFFSET, Tower, resized_positions, with_branch

_INSTALL = "pip install 'fsa-kernels[transformers]'"
# The letters by which presets know the sizes of CLIP's vision towers, by their width.
_SIZES = {768: "B", 1024: "L", 1280: "H"}
# Classes whose vision towers are CLIP's, and among them those whose text is read in both
# directions, so that what is padded must be masked.
_CLIPS = ("CLIPModel", "MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel", "CLIPSegModel")
_MASKED = ("ChineseCLIPModel", "AltCLIPModel")
_SIGLIPS = ("SiglipModel", "Siglip2Model")
# RoBERTa numbers its positions from the second on.
_RESERVED_POSITIONS = 2


def from_transformers(
    model: Any,
    processor: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> LoadedModel:
    """A model of the transformers library, ready to run behind any host.

    Args:
        model: a `CLIPModel`, `MetaClip2Model`, `ChineseCLIPModel`, `AltCLIPModel` or
            `CLIPSegModel` (`model.clip` of a `CLIPSegForImageSegmentation`), or a `SiglipModel`
            (SigLIP2's checkpoints of a fixed resolution are of this class, too) or `Siglip2Model`;
            put into evaluation mode, and otherwise used as it is: its modules are run, not copied.
        processor: the model's processor, such as `CLIPProcessor`: its tokenizer reads the texts,
            and its image processor says how pictures are normalised.
        device, dtype: where and in which type the model is to run; default as it comes. A model
            that is elsewhere is moved.

    Raises:
        InputError: another kind of model or processor, or transformers not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"model must be a name, not {type(model).__name__}. Models of the transformers library "
            f"are taken where it is installed, at version 5 or newer: {_INSTALL}"
        ) from None

    def is_one_of(names: tuple[str, ...]) -> bool:
        # MetaClip2 came after version 5.0.
        classes = (getattr(transformers, name, None) for name in names)
        return isinstance(model, tuple(cls for cls in classes if cls is not None))

    if is_one_of(_CLIPS):
        tower: _TransformersTower = CLIPTower(model)
        name = _clip_name(model)
    elif is_one_of(_SIGLIPS):
        tower = SiglipTower(model) if is_one_of(_SIGLIPS[:1]) else Siglip2Tower(model)
        name = type(model).__name__
    else:
        raise InputError(
            f"model must be a name, or a {', '.join((*_CLIPS, *_SIGLIPS[:-1]))} or {_SIGLIPS[-1]} "
            f"of transformers, not {type(model).__name__}"
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
    masked = is_one_of(_MASKED)
    length = model.config.text_config.max_position_embeddings
    return LoadedModel(
        model=TransformersModel(
            model.eval(), tower, padding=tokenizer.pad_token_id if masked else None
        ),
        tokenizer=_tokenizer(tokenizer, length - _RESERVED_POSITIONS if masked else length, masked),
        name=name,
        pretrained=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        mean=tuple(statistics.image_mean),
        std=tuple(statistics.image_std),
        image_size=tower.trained_grid[0] * tower.patch_size[0],
    )


class TransformersModel(nn.Module):
    """A model of transformers under the names that open_clip's have.

    Attributes:
        visual: its vision tower.
        logit_scale: as trained.
        logit_bias: as trained, None where the model has none.

    Args:
        padding: the token that fills up shorter texts, where the text tower must not look at it.
    """

    def __init__(self, model: Any, tower: Tower, *, padding: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.visual = tower
        self.padding = padding

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return getattr(self.model, "logit_bias", None)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (T,E), not normalised, of tokens (T,L)."""
        mask = None if self.padding is None else (tokens != self.padding).long()
        return self.model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output


class _TransformersTower(Tower):
    """What CLIP's and SigLIP's towers have in common; see `Tower`."""

    position_offset = PUBLISHED_OFFSET

    def __init__(self, vision_model: Any, output_dim: int) -> None:
        nn.Module.__init__(self)
        config = vision_model.config
        self.visual = vision_model
        self.patch_size = (config.patch_size, config.patch_size)
        self.width = config.hidden_size
        self.heads = config.num_attention_heads
        self.layers = config.num_hidden_layers
        self.output_dim = output_dim
        patches = self.visual.embeddings.position_embedding.num_embeddings - self.prefix_tokens
        side = math.isqrt(patches)
        self.trained_grid = (side, side)

    @property
    def last(self) -> Any:
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
        return resized_positions(
            self.visual.embeddings.position_embedding.weight,
            self.trained_grid,
            grid,
            self.prefix_tokens,
            self.position_offset,
        )

    def _patch_tokens(self, images: Tensor) -> Tensor:
        return self.visual.embeddings.patch_embedding(images).flatten(2).transpose(1, 2)


class CLIPTower(_TransformersTower):
    """The vision tower of a `CLIPModel`, or of a model that took it over, such as `MetaClip2Model`.

    Args:
        model: run by its own modules, neither copied nor changed.
    """

    def __init__(self, model: Any) -> None:
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
    has_class_token = False
    # No host was published on SigLIP: as transformers itself resizes its positions.
    position_offset = 0.0

    def __init__(self, model: Any) -> None:
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


class Siglip2Tower(SiglipTower):
    """The vision tower of a `Siglip2Model`, on grids without padded patches.

    It takes patches as rows of pixels; here they are cut by a convolution of the same weights.
    Positions are resized as the model resizes them, bilinear with antialiasing.
    """

    def _patch_tokens(self, images: Tensor) -> Tensor:
        projection = self.visual.embeddings.patch_embedding
        # The pixels of a patch come row by row, each with its channels.
        weight = projection.weight.unflatten(1, (*self.patch_size, 3)).permute(0, 3, 1, 2)
        patches = functional.conv2d(images, weight, projection.bias, stride=self.patch_size)
        return patches.flatten(2).transpose(1, 2)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        return resized_positions(
            self.visual.embeddings.position_embedding.weight,
            self.trained_grid,
            grid,
            self.prefix_tokens,
            0.0,
            mode="bilinear",
            antialias=True,
        )


def _tokenizer(tokenizer: Any, length: int, masked: bool) -> Callable[[list[str]], Tensor]:
    def tokenize(texts: list[str]) -> Tensor:
        # To the full length, as SigLIP was trained; CLIP looks at nothing beyond the text's end,
        # and what is masked is not looked at either.
        return tokenizer(
            texts,
            padding="longest" if masked else "max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).input_ids

    return tokenize


def _clip_name(model: Any) -> str:
    """open_clip's name for a tower of a known size, so that presets hold; else the class's."""
    config = model.config.vision_config
    size = _SIZES.get(config.hidden_size)
    return f"ViT-{size}-{config.patch_size}" if size else type(model).__name__
