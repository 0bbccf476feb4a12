"""The vision towers that open_clip takes from timm: SigLIP, PE, EVA, ViTamin, MobileCLIP's ViTs."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    RotaryEmbeddingCat,
    apply_rot_embed_cat,
    build_rotary_pos_embed,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from fsa.errors import InputError
from fsa.models.tower import Tower, resized_positions, with_branch

_ATTENTION_INPUTS = "qkv"
_ROTATED = "qk"


def tower_of(visual: nn.Module) -> Tower:
    """The vision tower of an open_clip model, opened at its last block.

    Args:
        visual: the `visual` part of an open_clip model, its own `VisionTransformer` or a
            `TimmModel`; or a `Tower`, which is returned as it is.

    Raises:
        InputError: a tower that the hosts cannot run on, such as a ResNet.
    """
    if isinstance(visual, Tower):
        return visual
    return TimmTower(visual) if isinstance(visual, TimmModel) else Tower(visual)


class TimmTower(Tower):
    """open_clip's `TimmModel` over timm's `VisionTransformer` or `Eva`, opened at its last block.

    ViTamin and MobileCLIP's ViTs are timm's `VisionTransformer` behind convolutions. SigLIP and
    ViTamin have no class token.

    Rotary positions (Su et al., "RoFormer"; in EVA02 and PE) belong to the queries and keys of
    every block: those of a patch are rotated by its row and column, those of the class token and
    the registers are not. Hosts get them as the model defines them, so that q q^T and k k^T depend
    on how far two patches lie apart, as q k^T does, and v v^T does not. On another grid than the
    trained one the rows and columns are stretched to it, where the model says so; learned
    positions are resized as timm resizes them, bicubic with antialiasing.

    Where the model pools by attention (SigLIP's and PE's "MAP" head), `embed` applies the head to
    each patch as if it were the only one: its attention then has one key, and leaves of it the
    projected value. Otherwise `embed` applies the final norms and the projection to each patch;
    a model that pools by a mean (ViTamin) applies them to the mean of the patches.

    Args:
        visual: the `visual` part of an open_clip model; run by its own modules, neither copied nor
            changed.

    Raises:
        InputError: another kind of tower.
    """

    def __init__(self, visual: Any) -> None:
        nn.Module.__init__(self)
        _require_transformer(visual)
        self.visual = visual
        trunk = visual.trunk
        self.prefix_tokens = trunk.num_prefix_tokens
        self.has_class_token = trunk.cls_token is not None
        self.patch_size = tuple(trunk.patch_embed.feat_ratio(as_scalar=False))
        self.width = trunk.embed_dim
        self.heads = self.last.attn.num_heads
        self.layers = len(trunk.blocks)
        self.output_dim = _output_width(visual)
        self.rotary: RotaryEmbeddingCat | None = getattr(trunk, "rope", None)

    @property
    def last(self) -> Any:
        return self.visual.trunk.blocks[-1]

    @property
    def _patch_weight(self) -> Tensor:
        # Of a stem of convolutions the patches' own projection is none.
        return self.last.attn.proj.weight

    def project(
        self, tokens: Tensor, names: str, grid: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        last, attention = self.last, self.last.attn
        normed = tokens if isinstance(last, EvaBlockPostNorm) else last.norm1(tokens)
        if attention.qkv is None:
            projected = {name: getattr(attention, f"{name}_proj")(normed) for name in names}
            projected = {
                name: inputs.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for name, inputs in projected.items()
            }
        else:
            first = _ATTENTION_INPUTS.index(names[0])
            count = _ATTENTION_INPUTS.index(names[-1]) - first + 1
            rows = attention.qkv.weight.shape[0] // 3
            packed = slice(first * rows, (first + count) * rows)
            bias = _packed_bias(attention)
            inputs = functional.linear(
                normed, attention.qkv.weight[packed], None if bias is None else bias[packed]
            )
            heads = inputs.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4)
            projected = {name: heads[_ATTENTION_INPUTS.index(name) - first] for name in names}
        for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
            if name in projected:
                projected[name] = norm(projected[name])
        if self.rotary is not None and any(name in _ROTATED for name in names):
            if grid is None:
                raise InputError(
                    f"queries and keys of {type(self.visual.trunk).__name__} have rotary "
                    "positions: pass the grid of the patches"
                )
            sines = _rotary_positions(self.rotary, grid, tokens.device)
            for name in _ROTATED:
                if name in projected:
                    projected[name] = self._rotated(projected[name], sines)
        return projected

    def attention_branch(self, heads: Tensor) -> Tensor:
        last = self.last
        branch = last.attn.proj(last.attn.norm(heads.transpose(1, 2).flatten(2)))
        if isinstance(last, EvaBlockPostNorm):
            return last.norm1(branch)
        return _scaled(last, 1, branch)

    def residual_branches(self, tokens: Tensor, branch: Tensor) -> Tensor:
        last = self.last
        tokens = with_branch(tokens, branch)
        if isinstance(last, EvaBlockPostNorm):
            return tokens + last.norm2(last.mlp(tokens))
        return tokens + _scaled(last, 2, last.mlp(last.norm2(tokens)))

    def embed(self, tokens: Tensor) -> Tensor:
        trunk = self.visual.trunk
        pooled = trunk.norm(tokens)
        if trunk.attn_pool is not None:
            pooled = _pooled_by_itself(trunk.attn_pool, pooled)
        return self.visual.head(trunk.head(trunk.fc_norm(pooled)))

    def _run_blocks(self, tokens: Tensor, blocks: slice, grid: tuple[int, int]) -> Tensor:
        options = {}
        if self.rotary is not None:
            options["rope"] = _rotary_positions(self.rotary, grid, tokens.device)
        for block in list(self.visual.trunk.blocks)[blocks]:
            tokens = block(tokens, **options)
        return tokens

    def _tokens(self, images: Tensor) -> Tensor:
        trunk = self.visual.trunk
        grid = self.grid(*images.shape[-2:])
        patches = self._patches(images)
        positions = trunk.pos_embed
        if positions is not None:
            # Those of the class token and the registers stand first, where they have any.
            before = 0 if trunk.no_embed_class else self.prefix_tokens
            positions = resized_positions(
                positions[0], tuple(trunk.patch_embed.grid_size), grid, before, 0.0, antialias=True
            )
        prefix = [
            token.expand(patches.shape[0], -1, -1)
            for token in (trunk.cls_token, trunk.reg_token)
            if token is not None
        ]
        if positions is not None and trunk.no_embed_class:
            patches = patches + positions
        tokens = torch.cat([*prefix, patches], dim=1) if prefix else patches
        if positions is not None and not trunk.no_embed_class:
            tokens = tokens + positions
        return trunk.norm_pre(tokens)

    def _patches(self, images: Tensor) -> Tensor:
        """Embedded patches (B,N,D) of images (B,3,H,W) of any size that `grid` accepts."""
        embedding = self.visual.trunk.patch_embed
        features = images
        if hasattr(embedding, "backbone"):
            features = embedding.backbone(features)
        patches = embedding.proj(features).flatten(2).transpose(1, 2)
        norm = getattr(embedding, "norm", None)
        return patches if norm is None else norm(patches)

    def _rotated(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys (B,H,L,d) with those of the patches rotated."""
        prefix, patches = inputs[:, :, : self.prefix_tokens], inputs[:, :, self.prefix_tokens :]
        rotated = apply_rot_embed_cat(patches, positions).to(inputs.dtype)
        return torch.cat([prefix, rotated], dim=2)


def _rotary_positions(
    rotary: RotaryEmbeddingCat, grid: tuple[int, int], device: torch.device
) -> Tensor:
    """Sines and cosines (N, 2 d) in float32: the angles of the patches of a grid.

    The module of the model holds those of the trained grid alone.
    """
    both = build_rotary_pos_embed(
        list(grid),
        dim=rotary.dim,
        max_res=rotary.max_res,
        temperature=rotary.temperature,
        linear_bands=rotary.linear_bands,
        in_pixels=rotary.in_pixels,
        ref_feat_shape=rotary.ref_feat_shape,
        grid_offset=rotary.grid_offset,
        grid_indexing=rotary.grid_indexing,
        device=device,
    )
    return torch.cat(both, dim=-1)


def _packed_bias(attention: Any) -> Tensor | None:
    """The bias of the packed product; EVA keeps that of queries and values, that of keys is 0."""
    if getattr(attention, "q_bias", None) is not None:
        return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return attention.qkv.bias


def _scaled(block: Any, number: int, branch: Tensor) -> Tensor:
    """One of the two branches of a block after its layer scale, where there is one."""
    if isinstance(block, EvaBlock):
        scale = getattr(block, f"gamma_{number}")
        return branch if scale is None else scale * branch
    return getattr(block, f"ls{number}")(branch)


def _pooled_by_itself(pool: Any, tokens: Tensor) -> Tensor:
    """What a pooling head makes of each of the tokens (B,N,D) as if it were the only one."""
    # The keys' half of the packed product has no influence on a softmax over one key.
    values = slice(pool.kv.weight.shape[0] // 2, None)
    bias = None if pool.kv.bias is None else pool.kv.bias[values]
    pooled = pool.proj(functional.linear(tokens, pool.kv.weight[values], bias))
    return pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled))


def _output_width(visual: Any) -> int:
    """The width of the space shared with text."""
    trunk = visual.trunk
    modules = [*trunk.head.modules(), *visual.head.modules()]
    widths = [module.out_features for module in modules if isinstance(module, nn.Linear)]
    return widths[-1] if widths else trunk.num_features


def _require_transformer(visual: Any) -> None:
    trunk = visual.trunk
    if not isinstance(trunk, (VisionTransformer, Eva)):
        raise InputError(
            f"timm's {type(trunk).__name__} is not a plain vision transformer: it has no blocks of "
            "attention between patches whose last one a host could change. Take a ViT instead, "
            "such as ViT-B-16-SigLIP2 or ViT-B-16"
        )
    _require_parts(trunk)
    if hasattr(visual.head, "pool"):
        raise InputError(
            "the vision tower pools a map of features by attention, which leaves no patch features "
            "in the space shared with text. Take a model without it instead, such as "
            "ViT-B-16-SigLIP2"
        )


def _require_parts(trunk: Any) -> None:
    """Raises InputError for parts of timm's transformers that no model of open_clip has."""
    block, rotary, pool = trunk.blocks[-1], getattr(trunk, "rope", None), trunk.attn_pool
    attention = block.attn
    found = None
    if type(block) not in (Block, EvaBlock, EvaBlockPostNorm):
        found = f"blocks of the kind {type(block).__name__}"
    elif type(attention) not in (Attention, AttentionRope, EvaAttention):
        found = f"attention of the kind {type(attention).__name__}"
    elif getattr(attention, "gate", None) is not None:
        found = "gated attention"
    elif getattr(attention, "num_kv_groups", 1) != 1:
        found = "keys and values shared by several heads"
    elif rotary is not None and (
        type(rotary) is not RotaryEmbeddingCat or getattr(attention, "rotate_half", False)
    ):
        found = f"rotary positions of the kind {type(rotary).__name__}"
    elif pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        found = f"pooling of the kind {type(pool).__name__}"
    if found is not None:
        raise InputError(
            f"the vision tower has {found}, which no pretrained model of open_clip has and which "
            "is not supported. Take a ViT of open_clip's instead, such as ViT-B-16-SigLIP2"
        )
