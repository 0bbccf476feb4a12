"""Whole forwards of the hosts as their authors published them, without and with FSA.

The attention of the last block is an explicit matrix of N x N for every head, ProxyCLIP's is
repeated for all heads, its mean is that of the whole batch, DINO's own attention is explicit too,
and FSA is the published formulation: `bench.published`. Our own code, after the form of the
authors'; it agrees with `fsa.hosts` to rounding for one image at a time.

What is not counted against them: all blocks but the last are open_clip's own, as in `fsa`; the
unused second pass through the last block in FSA's repository is left out; MaskCLIP without FSA
builds no matrix. FSA's authors published its code for ProxyCLIP only; with the other hosts the same
functions get the host's attention, and the class token, which feedback does not act on, stays
itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.rows import published
from fsa.models.tower import Tower

_LOGIT_SCALE, _UNIFORM_LOGIT_SCALE = 20, 35
_SEGMENTATION_SCALE = 40
_PADDED_TO = 56


class PublishedHost(nn.Module):
    """A host in its authors' form.

    Args:
        name: "maskclip", "sclip", "clearclip" or "proxyclip".
        visual: open_clip's vision tower.
    """

    def __init__(self, name: str, visual: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.tower = Tower(visual)
        self.residual = name in ("maskclip", "sclip")
        self.class_token = name in ("sclip", "clearclip")

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        text_features: Tensor,
        *,
        vfm_features: Tensor | None = None,
        feedback: bool = False,
        beta: float = 3.0,
    ) -> Tensor:
        """Patch features (B,N,E): the same as `fsa.hosts.Host.features`."""
        tokens = self.tower.trunk(images)
        if not self.class_token:
            tokens = tokens[:, 1:]
        inputs = self.tower.last.ln_1(tokens)
        if self.name == "proxyclip":
            grid = self.tower.grid(*images.shape[-2:])
            value, attention = self._proxy(inputs, grid, vfm_features)
        else:
            value, attention = self._self_attention(inputs, feedback)
        attended = value if attention is None else torch.bmm(attention, value)
        features = self._tail(tokens, attended)
        if not feedback:
            return features

        logits = self._logits(features, text_features, _LOGIT_SCALE)
        uniform = torch.ones_like(attention).softmax(dim=-1)
        uniform_features = self._tail(tokens, torch.bmm(uniform, value))
        uniform_logits = self._logits(uniform_features, text_features, _UNIFORM_LOGIT_SCALE)
        scaled = published.scaled_similarity(logits, uniform_logits, beta)
        if self.class_token:
            scaled = _with_class_token(scaled)
        return self._tail(tokens, published.adapt(value, scaled, attention))

    def _self_attention(self, inputs: Tensor, feedback: bool) -> tuple[Tensor, Tensor | None]:
        """V and A for every head of every image."""
        query, key, value = self._heads(inputs, 0), self._heads(inputs, 1), self._heads(inputs, 2)
        scale = query.shape[-1] ** -0.5
        if self.name == "maskclip":
            if not feedback:
                return value, None
            L = value.shape[1]
            identity = torch.eye(L, dtype=value.dtype, device=value.device)
            return value, identity.repeat(len(value), 1, 1)
        attention = (torch.bmm(query, query.transpose(1, 2)) * scale).softmax(dim=-1)
        if self.name == "sclip":
            attention += (torch.bmm(key, key.transpose(1, 2)) * scale).softmax(dim=-1)
        return value, attention

    def _proxy(
        self, inputs: Tensor, grid: tuple[int, int], vfm_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """V on the other model's grid and A, for every head."""
        value = self._heads(inputs, 2)
        rows, columns = vfm_features.shape[-2:]
        maps = value.transpose(1, 2).unflatten(-1, grid)
        maps = functional.interpolate(maps, size=(rows, columns), mode="bilinear")
        value = maps.flatten(2).transpose(1, 2).contiguous()
        unit = functional.normalize(vfm_features.flatten(2, 3), dim=1)
        affinity = torch.einsum("bfm,bfn->bmn", unit, unit)
        affinity = (affinity - torch.mean(affinity) * 1.2) * 3.0
        affinity[affinity < 0.0] = float("-inf")
        repeated = published.per_head(affinity.to(value.dtype), self.tower.heads)
        return value, repeated.softmax(dim=-1)

    def _heads(self, inputs: Tensor, part: int) -> Tensor:
        """Queries, keys or values (part 0, 1 or 2): (B,L,D) -> (B*H,L,d)."""
        attention, width = self.tower.last.attn, self.tower.width
        weight = attention.in_proj_weight.narrow(0, part * width, width)
        bias = attention.in_proj_bias.narrow(0, part * width, width)
        projected = functional.linear(inputs, weight, bias).unflatten(-1, (self.tower.heads, -1))
        return projected.transpose(1, 2).flatten(0, 1)

    def _tail(self, tokens: Tensor, heads: Tensor) -> Tensor:
        """From what the heads gathered, (B*H,L,d), to the features of the patches."""
        heads = heads.unflatten(0, (len(tokens), -1))
        branch = self.tower.attention_branch(heads)
        if self.residual:
            branch = self.tower.residual_branches(tokens, branch)
        features = self.tower.embed(branch)
        return features[:, 1:] if self.class_token else features

    @staticmethod
    def _logits(features: Tensor, text_features: Tensor, scale: float) -> Tensor:
        """Scaled cosines (B,N,C) in the type of the model."""
        unit = features / features.norm(dim=-1, keepdim=True)
        return unit @ text_features.to(unit.dtype).T * scale


def _with_class_token(scaled: Tensor) -> Tensor:
    """(B,N,N) -> (B,1+N,1+N): the class token, first, attends to itself and no patch to it."""
    padded = functional.pad(scaled, (1, 0, 1, 0), value=float("-inf"))
    padded[:, 0, 0] = 0.0
    return padded


def explicit_attention(vfm: nn.Module) -> nn.Module:
    """Makes a timm vision transformer build its attention matrices, as DINO's own code does."""
    for block in vfm.blocks:
        block.attn.fused_attn = False
    return vfm


@torch.no_grad()
def segment(
    forward: Callable[[Tensor], Tensor],
    grid: Callable[[int, int], tuple[int, int]],
    picture: Tensor,
    text_features: Tensor,
    *,
    window: int,
    stride: int,
) -> Tensor:
    """Labels (H,W) of a picture by the published loop, window after window.

    Args:
        forward: windows (1,3,h,w) in float32 -> features (1,N,E).
        grid: (height, width) of a window -> rows and columns of its features.
        picture: (1,3,H,W), normalised, float32.
        text_features: (C,E) in the model's type.
        window, stride: in pixels.
    """
    height, width = picture.shape[-2:]
    sums = picture.new_zeros((1, len(text_features), height, width))
    counts = picture.new_zeros((1, 1, height, width))
    for i in range(max(height - window + stride - 1, 0) // stride + 1):
        for j in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom = min(i * stride + window, height)
            right = min(j * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            crop = picture[:, :, top:bottom, left:right]
            padding = _padding(*crop.shape[-2:])
            padded = functional.pad(crop, padding) if any(padding) else crop
            features = forward(padded)
            unit = features / features.norm(dim=-1, keepdim=True)
            logits = (unit @ text_features.T).permute(0, 2, 1)
            logits = logits.unflatten(-1, grid(*padded.shape[-2:]))
            logits = functional.interpolate(logits, size=padded.shape[-2:], mode="bilinear")
            if picture.is_cuda:
                torch.cuda.empty_cache()
            first_row, first_column = padding[2], padding[0]
            logits = logits[
                :,
                :,
                first_row : first_row + crop.shape[-2],
                first_column : first_column + crop.shape[-1],
            ]
            sums += functional.pad(logits, (left, width - right, top, height - bottom))
            counts[:, :, top:bottom, left:right] += 1
    merged = functional.interpolate(sums / counts, size=(height, width), mode="bilinear")
    return (merged[0] * _SEGMENTATION_SCALE).softmax(dim=0).argmax(dim=0)


def _padding(height: int, width: int) -> tuple[int, int, int, int]:
    """Left, right, top and bottom, up to multiples of 56 pixels."""
    columns, rows = -width % _PADDED_TO, -height % _PADDED_TO
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
