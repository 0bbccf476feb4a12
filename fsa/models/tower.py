"""An open_clip vision tower, run by its own modules up to the last block and taken over there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa.errors import InputError

PUBLISHED_OFFSET = 0.1
"""See `resized_positions`. Once added against a rounding error in the size of the result."""

_ATTENTION_INPUTS = "qkv"


class Tower(nn.Module):
    """A plain open_clip `VisionTransformer`, opened at its last block.

    "Plain" means: patch tokens and one class token, residual blocks with PyTorch's multi-head
    attention, no attentional pooling.

    Attributes:
        prefix_tokens: how many tokens come before the patches': the class token.
        has_class_token: whether the first of all tokens is a class token.

    Args:
        visual: the `visual` part of an open_clip model; used as it is, neither copied nor changed.

    Raises:
        InputError: another kind of tower.
    """

    prefix_tokens: int = 1
    has_class_token: bool = True
    # Modules of other libraries, whose parts no type checker knows.
    visual: Any

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        _require_plain(visual)
        self.visual = visual
        self.patch_size: tuple[int, int] = tuple(self.visual.conv1.kernel_size)
        self.width: int = self.visual.conv1.out_channels
        self.heads: int = self.last.attn.num_heads
        self.layers: int = len(self.visual.transformer.resblocks)
        self.output_dim: int = self.visual.proj.shape[1]

    @property
    def last(self) -> Any:
        """The last residual block, which the hosts change."""
        return self.visual.transformer.resblocks[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The type that images must have."""
        return self._patch_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where images must be."""
        return self._patch_weight.device

    @property
    def _patch_weight(self) -> Tensor:
        return self.visual.conv1.weight

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of this size in pixels.

        Raises:
            InputError: a size that is not a positive multiple of the patch size.
        """
        patch_height, patch_width = self.patch_size
        if (
            height < patch_height
            or width < patch_width
            or height % patch_height
            or (width % patch_width)
        ):
            raise InputError(
                f"images are {height} x {width} pixels; height and width must be positive "
                f"multiples of the patch size {patch_height} x {patch_width}"
            )
        return height // patch_height, width // patch_width

    def trunk(self, images: Tensor) -> Tensor:
        """All blocks but the last: images (B,3,H,W) -> tokens (B,1+N,D), the class token first.

        Raises:
            InputError: a size that is not a positive multiple of the patch size.
        """
        grid = self.grid(*images.shape[-2:])
        return self._run_blocks(self._tokens(images), slice(self.layers - 1), grid)

    def layer_features(self, images: Tensor, layer: int) -> Tensor:
        """The patch tokens that enter block `layer`: images (B,3,H,W) -> (B,D,gh,gw).

        Raises:
            InputError: a layer the tower does not have, or as `trunk`.
        """
        self._require_layer(layer)
        grid = self.grid(*images.shape[-2:])
        entering = self._run_blocks(self._tokens(images), slice(layer), grid)
        return self._patch_map(entering, grid)

    def layer_and_trunk(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """`layer_features` and `trunk` of the same images, with every block run once.

        Raises:
            InputError: as `layer_features`.
        """
        self._require_layer(layer)
        grid = self.grid(*images.shape[-2:])
        entering = self._run_blocks(self._tokens(images), slice(layer), grid)
        tokens = self._run_blocks(entering, slice(layer, self.layers - 1), grid)
        return self._patch_map(entering, grid), tokens

    def check_tokens(self, tokens: Tensor, images: Tensor) -> None:
        """Raises InputError for tokens that are not shaped as `trunk` makes them of the images."""
        rows, columns = self.grid(*images.shape[-2:])
        expected = (images.shape[0], self.prefix_tokens + rows * columns, self.width)
        if tuple(tokens.shape) != expected:
            raise InputError(
                f"tokens must have shape {expected}, as the tower's trunk makes them of these "
                f"images; they have {tuple(tokens.shape)}"
            )

    def project(
        self, tokens: Tensor, names: str, grid: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Queries, keys and values of the last block.

        Args:
            tokens: (B,L,D), as they enter the block.
            names: which of "q", "k", "v", in this order.
            grid: rows and columns of the patches among the tokens; for queries and keys of towers
                with rotary positions, which are part of them.

        Returns:
            name -> (B,H,L,d).
        """
        last = self.last
        attention = last.attn
        # One product from the first to the last of the names: a slice of the packed weights.
        first = _ATTENTION_INPUTS.index(names[0])
        count = _ATTENTION_INPUTS.index(names[-1]) - first + 1
        packed = slice(first * self.width, (first + count) * self.width)
        bias = attention.in_proj_bias
        projected = functional.linear(
            last.ln_1(tokens),
            attention.in_proj_weight[packed],
            None if bias is None else bias[packed],
        )
        heads = projected.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return {name: heads[_ATTENTION_INPUTS.index(name) - first] for name in names}

    def attention_branch(self, heads: Tensor) -> Tensor:
        """Applies the output projection to A V (B,H,N,d): (B,N,D)."""
        last = self.last
        return last.ls_1(last.attn.out_proj(heads.transpose(1, 2).flatten(2)))

    def residual_branches(self, tokens: Tensor, branch: Tensor) -> Tensor:
        """The rest of the last block as trained: residual, then the feed-forward network.

        Args:
            tokens: (B,N,D), as they enter the block.
            branch: (B,N,D), of `attention_branch`; or (B,N+1,D), see `with_branch`.

        Returns:
            (B,N,D), or (B,2N,D).
        """
        tokens = with_branch(tokens, branch)
        last = self.last
        return tokens + last.ls_2(last.mlp(last.ln_2(tokens)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Projects tokens (B,N,D) into the space shared with text: (B,N,E), not normalised."""
        return self.visual.ln_post(tokens) @ self.visual.proj

    def _require_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layers:
            raise InputError(
                f"layer={layer} is not accepted: the tower has blocks 0 to {self.layers - 1}"
            )

    def _patch_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches of tokens (B,1+N,D) on their grid: (B,D,gh,gw)."""
        patches = tokens[:, self.prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, grid)

    def _run_blocks(self, tokens: Tensor, blocks: slice, grid: tuple[int, int]) -> Tensor:
        """Some of the blocks, as they follow one another, on tokens (B,1+N,D) of a grid."""
        transformer = self.visual.transformer
        batch_first = getattr(transformer, "batch_first", False)
        if not batch_first:
            tokens = tokens.transpose(0, 1)
        for block in transformer.resblocks[blocks]:
            tokens = block(tokens)
        return tokens if batch_first else tokens.transpose(0, 1)

    def _tokens(self, images: Tensor) -> Tensor:
        """Patch and class embeddings with positions: (B,3,H,W) -> (B,1+N,D)."""
        grid = self.grid(*images.shape[-2:])
        patches = self.visual.conv1(images).flatten(2).transpose(1, 2)
        first = self.visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches], dim=1)
        return self.visual.ln_pre(tokens + self._positions(grid).to(tokens.dtype))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Positional embeddings (1+N,D) for the grid."""
        trained_grid = tuple(self.visual.grid_size)
        return resized_positions(
            self.visual.positional_embedding, trained_grid, grid, self.prefix_tokens
        )


def with_branch(tokens: Tensor, branch: Tensor) -> Tensor:
    """Tokens (B,N,D) plus what attention made of them (B,N,D).

    With a row more, (B,N+1,D), the last one is what uniform attention makes of every token: after
    the N sums come those of all tokens with it, (B,2N,D), so that one pass through the rest of the
    block does for both.
    """
    N = tokens.shape[1]
    if branch.shape[1] == N:
        return tokens + branch
    return torch.cat([tokens + branch[:, :N], tokens + branch[:, N:]], dim=1)


def resized_positions(
    positions: Tensor,
    trained_grid: tuple[int, int],
    grid: tuple[int, int],
    prefix_tokens: int,
    offset: float = PUBLISHED_OFFSET,
    *,
    mode: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Positional embeddings of another grid than the trained one; those before it stay.

    Args:
        positions: (prefix_tokens + trained patches, D).
        trained_grid, grid: rows and columns.
        prefix_tokens: how many rows of `positions` belong to no patch.
        offset: added to the rows and columns of `grid` where the distance from one patch to the
            next on the trained grid is computed: trained / (grid + offset). 0 lays one grid edge
            to edge over the other. The default is that of the published code of every host here
            and of DINO, which otherwise disagrees on about one label in a thousand.
        mode: of the resizing, "bicubic" or "bilinear".
        antialias: whether shrinking smooths; the papers' code does not, timm's models do.
    """
    # A compiler would make a graph of its own for the trained grid; there resizing is the identity.
    compiling = torch.compiler.is_compiling()
    if not compiling and grid == trained_grid:
        return positions
    of_patches = positions[prefix_tokens:]
    if compiling and offset:
        # `interpolate` would make a constant of the scale, and so a graph for every grid.
        of_patches = _traced_resize(of_patches, trained_grid, grid, offset)
    else:
        of_patches = _resize(of_patches, trained_grid, grid, offset, mode, antialias)
    return torch.cat([positions[:prefix_tokens], of_patches.to(positions.dtype)])


def _resize(
    positions: Tensor,
    trained_grid: tuple[int, int],
    grid: tuple[int, int],
    offset: float,
    mode: str,
    antialias: bool,
) -> Tensor:
    """(trained patches, D) -> (patches, D) in float32."""
    maps = positions.unflatten(0, trained_grid).permute(2, 0, 1)[None]
    factors = tuple((new + offset) / old for new, old in zip(grid, trained_grid, strict=True))
    # In float32: half-precision bicubic resizing is not there on every device.
    resized = functional.interpolate(
        maps.float(),
        size=None if offset else grid,
        scale_factor=factors if offset else None,
        mode=mode,
        antialias=antialias,
    )
    return resized[0].flatten(1).T


def _traced_resize(
    positions: Tensor, trained_grid: tuple[int, int], grid: tuple[int, int], offset: float
) -> Tensor:
    """What `_resize` computes, from products of matrices whose sizes may vary."""
    rows, columns = (torch.scalar_tensor(side, device=positions.device) for side in grid)
    trained = (rows == trained_grid[0]) & (columns == trained_grid[1])
    # Distances in units of the offset, in which all are whole numbers and exact. On the trained
    # grid there is no offset: each patch keeps its own place, and its embedding exactly.
    unit, added = 1 / offset, torch.where(trained, 0.0, 1.0)
    of_rows, of_columns = (
        _bicubic_weights(length, old, old * unit / (side * unit + added))
        for length, old, side in zip(grid, trained_grid, (rows, columns), strict=True)
    )
    maps = positions.float().unflatten(0, trained_grid)
    maps = torch.einsum("rh,hwd->rwd", of_rows, maps)
    return torch.einsum("cw,rwd->rcd", of_columns, maps).flatten(0, 1)


def _bicubic_weights(length: int, trained_length: int, distance: Tensor) -> Tensor:
    """(length,trained_length): how much of each trained place a new one takes, as PyTorch has it.

    Args:
        distance: from one new place to the next, in trained ones.
    """
    device = distance.device
    place = (torch.arange(length, device=device) + 0.5) * distance - 0.5
    nearest = place.floor()
    steps = torch.arange(-1, 3, device=device)
    away = ((place - nearest)[:, None] - steps).abs()
    # Keys' cubic convolution, whose free parameter PyTorch sets to -0.75.
    near = (1.25 * away - 2.25) * away * away + 1
    far = -0.75 * (((away - 5) * away + 8) * away - 4)
    weights = torch.where(away <= 1, near, far)
    taken = (nearest[:, None] + steps).long().clamp(0, trained_length - 1)
    return torch.zeros(length, trained_length, device=device).scatter_add(1, taken, weights)


def _require_plain(visual: Any) -> None:
    parts = (
        "conv1",
        "class_embedding",
        "positional_embedding",
        "grid_size",
        "ln_pre",
        "transformer",
        "ln_post",
        "proj",
    )
    missing = [part for part in parts if getattr(visual, part, None) is None]
    if missing:
        raise InputError(
            f"{type(visual).__name__} is not a plain open_clip VisionTransformer: it has no "
            f"{', '.join(missing)}. Take a ViT instead, such as ViT-B-16"
        )
    if getattr(visual, "attn_pool", None) is not None:
        raise InputError(
            "the vision tower pools by CoCa's attention, with many queries and a projection after "
            "it, which leaves no patch features in the space shared with text. Take a model "
            "without attentional pooling instead, such as ViT-L-14"
        )
    attention = getattr(visual.transformer.resblocks[-1], "attn", None)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        raise InputError(
            "the last block of the vision tower does not hold PyTorch's multi-head attention with "
            f"packed weights but {type(attention).__name__}; such custom blocks are not supported"
        )
