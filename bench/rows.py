"""The rows of the benchmark: what is computed, at which size, by which contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fsa
from bench import algebra, published

HEADS, HEAD_WIDTH = 12, 64

# Temporaries of N x N x C that the published formulation holds at once.
_PUBLISHED_TEMPORARIES = 3


@dataclass(frozen=True)
class Row:
    """A size of the op (logits -> A_f) or of the whole step (logits -> adapted values)."""

    kind: str
    B: int
    N: int
    C: int

    @property
    def name(self) -> str:
        return f"{self.kind} B={self.B} N={self.N} C={self.C}"


@dataclass(frozen=True)
class Inputs:
    """What every contender of a row is given."""

    patch_logits: Tensor
    uniform_logits: Tensor
    value: Tensor
    attention: Tensor
    attended: Tensor


OP_SIZES = tuple(
    Row("op", B, N, C)
    for B in (1, 8, 40)
    for C in (21, 150, 171, 847)
    for N in (196, 441, 784, 1024, 1764, 4096, 8192)
)
STEP_SIZES = tuple(
    Row("step", B, N, C) for B in (1, 8) for C in (21, 150, 171) for N in (196, 784, 1764)
)
# What two CPU cores do in minutes; the sizes that the project promises speedups at come first.
CPU_ROWS = (
    Row("step", 1, 1764, 21),
    Row("step", 1, 1764, 150),
    Row("step", 1, 784, 60),
    Row("step", 1, 196, 21),
    Row("op", 1, 1764, 150),
    Row("op", 1, 784, 60),
    Row("op", 1, 196, 21),
)


def make_inputs(row: Row, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Realistic inputs: logits that peak on the segments of a picture, with noise."""
    generator = torch.Generator().manual_seed(seed)
    segments = 12
    centres = torch.randn(segments, row.C, generator=generator) * 1.2
    # Segments are runs of patches, as in a picture read row by row.
    bounds = torch.rand(row.B, segments - 1, generator=generator).sort(dim=1).values * row.N
    membership = (torch.arange(row.N)[None, :, None] >= bounds[:, None]).sum(dim=-1)
    noise = torch.randn(row.B, row.N, row.C, generator=generator) * 0.35
    logits = centres[membership] + noise
    uniform = torch.randn(row.B, 1, row.C, generator=generator) * 0.4
    value = torch.randn(row.B, HEADS, row.N, HEAD_WIDTH, generator=generator)
    affinity = torch.randn(row.B, row.N, 32, generator=generator) + centres[membership][..., :1]
    inputs = [t.to(device, dtype) for t in (logits, uniform, value)]
    affinity = torch.nn.functional.normalize(affinity.to(device), dim=-1)
    attention = (10 * affinity @ affinity.transpose(1, 2)).softmax(dim=-1).to(dtype)
    attended = attention[:, None] @ inputs[2]
    return Inputs(*inputs, attention, attended)


def published_fits(row: Row, dtype: torch.dtype, bytes_free: int) -> bool:
    """Whether the published formulation's temporaries fit in memory."""
    tensor = row.B * row.N * row.N * row.C * dtype.itemsize
    per_head = 3 * row.B * HEADS * row.N * row.N * dtype.itemsize
    return max(_PUBLISHED_TEMPORARIES * tensor, per_head) < 0.8 * bytes_free


def contenders(
    row: Row, device: torch.device, dtype: torch.dtype, bytes_free: int, *, compiled: bool = True
) -> dict[str, Callable[[Inputs], Tensor]]:
    """name -> function of the row's inputs, for those that fit in memory."""
    functions: dict[str, Callable[[Inputs], Tensor]] = {}
    if published_fits(row, dtype, bytes_free):
        functions["published"] = partial(_published, row.kind)
    functions["algebra"] = partial(_algebra, row.kind)
    if compiled:
        functions["torch.compile"] = torch.compile(partial(_algebra, row.kind), dynamic=False)
    functions["fsa torch"] = partial(_ours, row.kind, "torch")
    if device.type == "cuda":
        functions["fsa triton"] = partial(_ours, row.kind, "triton")
    return functions


def _published(kind: str, inputs: Inputs) -> Tensor:
    feedback = published.feedback_attention(inputs.patch_logits, inputs.uniform_logits)
    if kind == "op":
        return feedback
    return published.adapt(inputs.value, feedback, inputs.attention)


def _algebra(kind: str, inputs: Inputs) -> Tensor:
    feedback = algebra.feedback_attention(inputs.patch_logits, inputs.uniform_logits)
    if kind == "op":
        return feedback
    return algebra.adapt(inputs.value, feedback, inputs.attention, inputs.attended)


def _ours(kind: str, backend: str, inputs: Inputs) -> Tensor:
    feedback = fsa.feedback_attention(inputs.patch_logits, inputs.uniform_logits, backend=backend)
    if kind == "op":
        return feedback
    return fsa.adapt(
        inputs.value, feedback, inputs.attention, attended=inputs.attended, backend=backend
    )
