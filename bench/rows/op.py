"""Rows of the op (logits -> A_f) and of the whole step (logits -> adapted values)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fsa
from bench.rows import algebra, published
from bench.rows.contenders import Build, Call, Row, require_memory

HEADS, HEAD_WIDTH = 12, 64

# What the formulations certainly hold at once: tensors of N x N x C and matrices of N x N.
_PUBLISHED_TENSORS = 2
_ALGEBRA_MATRICES = 6


@dataclass(frozen=True)
class Inputs:
    """What every contender of a row is given; the last three in steps only."""

    patch_logits: Tensor
    uniform_logits: Tensor
    value: Tensor | None = None
    attention: Tensor | None = None
    attended: Tensor | None = None

    def images(self, index: list[int]) -> Inputs:
        """Some of the images, in float64."""
        chosen = {key: t[index].double() for key, t in vars(self).items() if t is not None}
        return Inputs(**chosen)


@dataclass(frozen=True)
class OpRow(Row):
    """A size of the op or of the step.

    Args:
        kind: "op" or "step".
        B, N, C: images, patches, queries.
        compiled: with `torch.compile` as a contender, and for the op on a GPU with FlashInfer's
            search in the place of a sort; compiling takes seconds a row.
        ways: of steps, also with A_f kept and with A_f streamed, between which `feedback_step`
            itself chooses by size.
    """

    kind: str
    B: int
    N: int
    C: int
    compiled: bool = False
    ways: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} B={self.B} N={self.N} C={self.C}"

    def small(self) -> OpRow:
        return OpRow(self.kind, 1, 64, self.C, self.compiled, self.ways)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        return make_inputs(self, device, dtype)

    def contenders(
        self, device: torch.device, dtype: torch.dtype, inputs: Inputs | None = None
    ) -> dict[str, Build]:
        inputs = inputs or self.inputs(device, dtype)
        builds: dict[str, Build] = {
            "published": partial(_published, self, inputs),
            "algebra": partial(_algebra, self, inputs),
        }
        if self.compiled:
            builds["torch.compile"] = partial(_compiled, self, inputs)
        if self.compiled and self.kind == "op" and device.type == "cuda":
            builds["flashinfer"] = partial(_flashinfer, self, inputs)
        builds["fsa torch"] = partial(ours, self.kind, "torch", inputs)
        if device.type == "cuda":
            builds["fsa triton"] = partial(ours, self.kind, "triton", inputs)
        if self.ways:
            backend = "triton" if device.type == "cuda" else "torch"
            for name, stream in (("fsa stored", False), ("fsa streamed", True)):
                builds[name] = partial(ours, self.kind, backend, inputs, stream)
        return builds


def make_inputs(row: OpRow, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Realistic inputs: logits that peak on the segments of a picture, with noise."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    segments = 12
    centres = normal(segments, row.C) * 1.2
    # Segments are runs of patches, as in a picture read row by row.
    bounds = torch.rand(row.B, segments - 1, generator=generator, device=device) * row.N
    patches = torch.arange(row.N, device=device)
    membership = (patches[None, :, None] >= bounds[:, None]).sum(dim=-1)
    logits = (centres[membership] + normal(row.B, row.N, row.C) * 0.35).to(dtype)
    uniform = (normal(row.B, 1, row.C) * 0.4).to(dtype)
    if row.kind == "op":
        return Inputs(logits, uniform)
    value = normal(row.B, HEADS, row.N, HEAD_WIDTH).to(dtype)
    affinity = normal(row.B, row.N, 32) + centres[membership][..., :1]
    affinity = torch.nn.functional.normalize(affinity, dim=-1)
    attention = (10 * affinity @ affinity.transpose(1, 2)).softmax(dim=-1).to(dtype)
    columns = value.transpose(1, 2).flatten(2)
    attended = torch.bmm(attention, columns).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)
    return Inputs(logits, uniform, value, attention, attended)


def _published(row: OpRow, inputs: Inputs) -> Call:
    itemsize = inputs.patch_logits.dtype.itemsize
    tensors = _PUBLISHED_TENSORS * row.B * row.N**2 * row.C * itemsize
    matrices = 4 * row.B * HEADS * row.N**2 * itemsize if row.kind == "step" else 0
    require_memory(max(tensors, matrices), inputs.patch_logits.device)
    if row.kind == "op":
        return lambda: published.feedback_attention(inputs.patch_logits, inputs.uniform_logits)
    # The authors' hosts hold both per head already.
    value = inputs.value.flatten(0, 1)
    attention = published.per_head(inputs.attention, HEADS)

    def step() -> Tensor:
        scaled = published.scaled_similarity(inputs.patch_logits, inputs.uniform_logits)
        return published.adapt(value, scaled, attention).view(inputs.value.shape)

    return step


def _algebra(row: OpRow, inputs: Inputs) -> Call:
    require_memory(_ALGEBRA_MATRICES * row.B * row.N**2 * 4, inputs.patch_logits.device)
    return partial(_algebra_step, *vars(inputs).values())


def _algebra_step(
    patch_logits: Tensor,
    uniform_logits: Tensor,
    value: Tensor | None,
    attention: Tensor | None,
    attended: Tensor | None,
) -> Tensor:
    feedback = algebra.feedback_attention(patch_logits, uniform_logits)
    return feedback if value is None else algebra.adapt(value, feedback, attention, attended)


def _compiled(row: OpRow, inputs: Inputs) -> Call:
    require_memory(_ALGEBRA_MATRICES * row.B * row.N**2 * 4, inputs.patch_logits.device)
    # After 8 recompilations of a function torch.compile would run it eagerly.
    torch._dynamo.reset()
    compiled = torch.compile(_algebra_step, dynamic=False, fullgraph=True)
    return partial(compiled, *vars(inputs).values())


def _flashinfer(row: OpRow, inputs: Inputs) -> Call:
    require_memory(_ALGEBRA_MATRICES * row.B * row.N**2 * 4, inputs.patch_logits.device)
    return partial(
        algebra.feedback_attention,
        inputs.patch_logits,
        inputs.uniform_logits,
        kept_patches=algebra.kept_by_flashinfer(),
    )


def ours(kind: str, backend: str, inputs: Inputs, stream: bool | None = None) -> Call:
    """One call of this library."""
    if kind == "op":
        return partial(
            fsa.feedback_attention, inputs.patch_logits, inputs.uniform_logits, backend=backend
        )

    return partial(
        fsa.feedback_step,
        inputs.value,
        inputs.patch_logits,
        inputs.uniform_logits,
        inputs.attention,
        attended=inputs.attended,
        backend=backend,
        stream=stream,
    )
