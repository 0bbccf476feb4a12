"""The ops in plain PyTorch, by exact algebra: no N x N x C tensor, no product of N x N matrices.

The algebra, all of it exact (the tests hold it against `fsa.reference`):

- KL_ij = h_i - (P l^T)_ij with h_i = sum_c P_ic l_ic: one matrix product. Taking the same row from
  every l_j changes nothing, so l is centred, which takes the cancellation away.
- A prefix of the order of similarity is a threshold on S, so values are sorted but never indices,
  and nothing is scattered back.
- A_f A V = A_f (A V) and A A_f V = A (A_f V): products with values only.

Work goes in blocks of rows, sized for the CPU's cache or for a bounded share of GPU memory, so the
extra memory does not grow with N^2. Whatever the input's type, the arithmetic is in float32
(float64 for float64 inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from fsa.config import PROBABILITY_FLOOR
from fsa.ops.checks import autocast_off
from fsa.ops.processor import bfloat16_units, float32_by_onednn
from fsa_kernels import Adaptations, Options

# Entries of one block of similarity rows, on a CPU for each thread: 2^17 floats stay in a core's
# second-level cache through the dozen passes over them. On a GPU a block only has to fill the chip.
_BLOCK_ENTRIES_CPU = 1 << 17
_BLOCK_ENTRIES_GPU = 1 << 26

# Entries of the strip of A_f that `apply_feedback` multiplies at once.
_STRIP_ENTRIES = 1 << 23

# The mass of a class below which nobody predicts it, and its centre does not matter.
_LEAST_MASS = 1e-30

# The centre is a multiple of the inverse.
_CENTRE_STEPS = 256

# From here on the product outweighs the copies into oneDNN's tensors.
_ONEDNN_LEAST_PATCHES = 256


def feedback_attention(
    patches: Tensor,
    uniform: Tensor | None,
    text_features: Tensor | None = None,
    *,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    """A_f (B,N,N) in `dtype`; see `_Feedback` for the rest."""
    B, N, _ = patches.shape
    feedback = _Feedback(patches, uniform, text_features, options)
    out = torch.empty((B, N, N), dtype=dtype, device=patches.device)
    for images, rows in _blocks(B, N, out.device):
        out[images, rows] = feedback.rows(images, rows)
    return out


def apply_feedback(
    patches: Tensor,
    uniform: Tensor | None,
    text_features: Tensor | None,
    columns: Tensor,
    *,
    options: Options,
) -> Tensor:
    """A_f times columns (B,N,K), in their type, by strips of rows; no N x N matrix is kept."""
    B, N, _ = patches.shape
    feedback = _Feedback(patches, uniform, text_features, options)
    out = torch.empty_like(columns)
    strip_rows = max(1, _STRIP_ENTRIES // N)
    for image in range(B):
        images = slice(image, image + 1)
        for first in range(0, N, strip_rows):
            strip = slice(first, min(first + strip_rows, N))
            weights = columns.new_empty((1, strip.stop - first, N))
            for _, rows in _blocks(1, N, columns.device, strip):
                place = slice(rows.start - first, rows.stop - first)
                weights[:, place] = feedback.rows(images, rows)
            out[images, strip] = rows_times(weights, columns[images]).to(out.dtype)
    return out


class _Feedback:
    """A_f of some images, by blocks of rows.

    A patch whose logits are not finite gets a row of NaN and is never kept by another.

    Args:
        patches, uniform: logits, or with text features, features; as `fsa.feedback_attention`
            takes them.
        text_features: (C,E), or None.
        options: how A_f is made.
    """

    def __init__(
        self,
        patches: Tensor,
        uniform: Tensor | None,
        text_features: Tensor | None,
        options: Options,
    ) -> None:
        self.options = options
        if text_features is not None:
            patches = options.logit_scale * cosines(patches, text_features)
            if uniform is not None:
                uniform = options.uniform_logit_scale * cosines(uniform, text_features)
        logits = _widen(patches)
        if uniform is not None:
            logits = logits - _widen(uniform)
        probabilities = logits.softmax(dim=-1)
        # Asked of the logits: of -inf alone the softmax makes a finite 0.
        self.broken = ~logits.isfinite().all(dim=-1)
        # Rows that are not finite would poison the centre, and through it every other row.
        probabilities = probabilities.masked_fill(self.broken[..., None], 0)
        # Looking whether there are any spares the CPU three passes; on a GPU it would synchronise.
        self.some_broken = logits.device.type != "cpu" or bool(self.broken.any())
        self.similarity_rows = _similarity_rows(probabilities, options)

    def rows(self, images: slice, rows: slice) -> Tensor:
        """A block of rows of A_f, in float32 (float64 for float64 logits)."""
        S = self.similarity_rows(images, rows)
        broken = self.broken[images, None, :]
        if self.some_broken:
            S.masked_fill_(broken, -math.inf)
        scores = (S * self.options.beta).exp_().mul_(S) if self.options.scaling else S.clone()
        _drop(scores, S, self.options)
        if self.some_broken:
            scores.masked_fill_(broken, -math.inf)
        block = torch.softmax(scores, dim=-1)
        if self.some_broken:
            block.masked_fill_(self.broken[images, rows, None], math.nan)
        return block


def _similarity_rows(probabilities: Tensor, options: Options) -> Callable[[slice, slice], Tensor]:
    """How a block of rows of S is computed from P (B,N,C)."""
    if options.cosine:
        unit = functional.normalize(probabilities, dim=-1)

        def cosine(images: slice, rows: slice) -> Tensor:
            return torch.bmm(unit[images, rows], unit[images].transpose(1, 2)).clamp_(0, 1)

        return cosine

    log = (probabilities + PROBABILITY_FLOOR).log_()
    # The centre that makes the terms P_ic l_jc smallest, and with them what rounding leaves of KL:
    # the mean over patches, each class weighted by who predicts it. Where predictions are nearly
    # certain, the plain mean would take away numbers near 20 that differ in their last bits only.
    mass = probabilities.sum(dim=1, keepdim=True)
    centre = (probabilities * log).sum(dim=1, keepdim=True) / mass.clamp(min=_LEAST_MASS)
    # Of few bits, so that taking it away rounds nothing off and equal divergences stay equal.
    log -= (centre * _CENTRE_STEPS).round_() / _CENTRE_STEPS
    negative_entropy = (probabilities * log).sum(dim=-1, keepdim=True)

    product = _products_with(log)

    def kl(images: slice, rows: slice) -> Tensor:
        shared = product(probabilities, images, rows)
        divergence = torch.sub(negative_entropy[images, rows], shared, out=shared)
        return divergence.clamp_(min=0).add_(1).reciprocal_()

    return kl


def _products_with(log: Tensor) -> Callable[[Tensor, slice, slice], Tensor]:
    """How blocks of rows of P l^T are computed from P, for l (B,N,C)."""
    if not (_takes_onednn(log) and log.shape[1] >= _ONEDNN_LEAST_PATCHES):
        return lambda P, images, rows: torch.bmm(P[images, rows], log[images].transpose(1, 2))
    prepared = [image.to_mkldnn() for image in log]

    def product(P: Tensor, images: slice, rows: slice) -> Tensor:
        return _batched(
            [
                functional.linear(one.to_mkldnn(), other).to_dense()
                for one, other in zip(P[images, rows], prepared[images], strict=True)
            ]
        )

    return product


def _batched(products: list[Tensor]) -> Tensor:
    """Products of images as one tensor; a single one is not copied."""
    return products[0][None] if len(products) == 1 else torch.stack(products)


def _drop(scores: Tensor, S: Tensor, options: Options) -> None:
    """Lowers the scores (...,N) of all but the kept patches so far that their softmax is 0.

    Changes both arguments. Similarities of -inf count nothing.
    """
    N = S.shape[-1]
    if options.pruning is None:
        return
    if options.pruning == "threshold":
        dropped = (S < options.threshold) & ~_first_of(S == S.amax(dim=-1, keepdim=True))
        scores.masked_fill_(dropped, -math.inf)
        return
    ordered = _sort_descending(S)
    if options.pruning == "confidence":
        # Cumulated in float64, where such sums of float32 weights are exact: near-ties are
        # everywhere, and N float32 additions would decide them.
        mass = (ordered - 1).exp_().cumsum(dim=-1, dtype=torch.float64)
        count = torch.searchsorted(mass, options.confidence * mass[..., -1:], right=True)
        count.clamp_(min=1)
    else:
        count = torch.full_like(
            S[..., :1], max(1, math.floor(options.ratio * N)), dtype=torch.int64
        )
    lowest = ordered.gather(-1, count - 1)
    next_one = ordered.gather(-1, count.clamp(max=N - 1))
    # Looking first for ties spares the CPU four passes; on a GPU it would synchronise.
    if S.device.type != "cpu" or bool(((next_one == lowest) & (count < N)).any()):
        scores.masked_fill_(_surplus_ties(S, lowest, count), -math.inf)
    # On a CPU a comparison and a subtraction are vector instructions, and filling by a mask is not.
    scores.sub_(S.lt_(lowest), alpha=torch.finfo(scores.dtype).max)


def _surplus_ties(S: Tensor, lowest: Tensor, count: Tensor) -> Tensor:
    """Entries equal to the lowest kept value that come after the `count` kept ones, by index."""
    tied = S == lowest
    wanted = count - (S > lowest).sum(dim=-1, keepdim=True)
    return tied & (tied.cumsum(dim=-1) > wanted)


def _first_of(mask: Tensor) -> Tensor:
    return mask & (mask.cumsum(dim=-1) == 1)


def _sort_descending(S: Tensor) -> Tensor:
    """The values of each row from high to low."""
    if S.device.type == "cpu":
        # NumPy sorts values alone with vector instructions, some 15 times faster than
        # torch.sort, which also has to carry an index along with each value.
        ordered = S.neg()
        ordered.numpy().sort(axis=-1)
        return ordered.neg_()
    return S.sort(dim=-1, descending=True).values


def adapt(
    value: Tensor,
    feedback: Callable[[Tensor], Tensor],
    apply_attention: Callable[[Tensor], Tensor],
    attended: Tensor | None,
    adaptations: Adaptations,
) -> Tensor:
    """The adapted values (B,H,N,d); see `fsa.adapt`.

    Args:
        value: (B,H,N,d).
        feedback: (B,N,K) -> (B,N,K), applies A_f.
        apply_attention: (B,H,N,d) -> (B,H,N,d), applies A.
        attended: A V (B,H,N,d), or None to have it computed where it is needed.
        adaptations: the terms that are averaged.
    """
    # A_f is linear, so the terms in which it comes last share one product of twice the width.
    # "before" needs A_f V by itself; without it the two right-hand sides can be added first.
    right_sides = []
    if adaptations.after:
        right_sides.append(apply_attention(value) if attended is None else attended)
    if adaptations.before or adaptations.only:
        right_sides.append(value)
    if not adaptations.before and len(right_sides) == 2:
        right_sides = [right_sides[0] + right_sides[1]]

    _, H, _, d = value.shape
    sides = [side.transpose(1, 2) for side in right_sides]
    # One copy of both; of a single side there may be nothing to copy.
    columns = sides[0] if len(sides) == 1 else torch.stack(sides, dim=2)
    applied = feedback(columns.flatten(2)).unflatten(-1, (len(sides), H, d))
    terms = [term.transpose(1, 2) for term in applied.unbind(dim=2)]
    if not adaptations.before:
        total = terms[0]
    else:
        total = apply_attention(terms[-1])
        others = [terms[-1]] * adaptations.only + [terms[0]] * adaptations.after
        if others:
            # What the attention returned may be the caller's own; the sum is not.
            total = total + others[0]
        for other in others[1:]:
            total += other
    return (total.div_(sum(adaptations)) if sum(adaptations) > 1 else total).to(value.dtype)


def attention_applier(attention: Tensor) -> Callable[[Tensor], Tensor]:
    """Applies A, (B,N,N) shared by the heads or (B,H,N,N), to values (B,H,N,d)."""
    if attention.ndim == 4:

        def per_head(value: Tensor) -> Tensor:
            B, H, N, d = value.shape
            weights = attention.reshape(B * H, N, N)
            return rows_times(weights, value.reshape(B * H, N, d)).view(B, H, N, d)

        return per_head

    def shared(value: Tensor) -> Tensor:
        B, H, N, d = value.shape
        columns = value.transpose(1, 2).reshape(B, N, H * d)
        return rows_times(attention, columns).view(B, N, H, d).transpose(1, 2)

    return shared


def rows_times(weights: Tensor, columns: Tensor) -> Tensor:
    """weights (B,R,N) @ columns (B,N,D) -> (B,R,D), accumulated in float32 or better.

    A GPU's half-precision product accumulates in float32 by itself, and so does that of a CPU with
    units for bfloat16. Other half-precision operands are widened on the CPU, the columns whole and
    the weights a block of rows at a time; the result then stays in float32. Not where a compiler
    traces, which would make a graph of its own for every number of blocks.
    """
    with autocast_off(weights):
        return _rows_times(weights, columns)


def _rows_times(weights: Tensor, columns: Tensor) -> Tensor:
    B, R, _ = weights.shape
    if (
        torch.compiler.is_compiling()
        or weights.device.type != "cpu"
        or weights.dtype not in (torch.float16, torch.bfloat16)
        or (weights.dtype == columns.dtype == torch.bfloat16 and bfloat16_units())
    ):
        columns = columns.to(weights.dtype)
        if _takes_onednn(weights) and R >= _ONEDNN_LEAST_PATCHES:
            return _batched([_onednn_product(w, c) for w, c in zip(weights, columns, strict=True)])
        return torch.bmm(weights, columns)
    columns = columns.float()
    out = torch.empty((B, R, columns.shape[-1]), dtype=torch.float32)
    for images, rows in _blocks(B, R, weights.device):
        out[images, rows] = torch.bmm(weights[images, rows].float(), columns[images])
    return out


def _takes_onednn(weights: Tensor) -> bool:
    # First of all not where a compiler traces: it can ask for neither oneDNN nor N, which varies.
    return (
        not torch.compiler.is_compiling()
        and weights.device.type == "cpu"
        and weights.dtype == torch.float32
        and float32_by_onednn()
    )


def _onednn_product(weights: Tensor, columns: Tensor) -> Tensor:
    """weights (R,N) @ columns (N,D) in float32 by oneDNN."""
    product = functional.linear(weights.to_mkldnn(), columns.T.contiguous().to_mkldnn())
    return product.to_dense()


def proxy_prepare(features: Tensor, *, shift: float) -> tuple[Tensor, Tensor]:
    """What all applications of ProxyCLIP's attention share: unit features and the threshold."""
    unit = functional.normalize(_widen(features).contiguous(), dim=-1)
    # mean_ij(x_i . x_j) = |mean_i x_i|^2: the threshold needs no N x N matrix.
    return unit, shift * unit.mean(dim=1).square().sum(dim=-1)


def proxy_apply(
    state: tuple[Tensor, Tensor], value: Tensor, *, gain: float, add: Tensor | None = None
) -> Tensor:
    """ProxyCLIP's attention applied to value (B,N,D), plus a tensor; see `fsa.ProxyAttention`."""
    unit, level = state
    level = level[:, None, None]
    B, N, _ = value.shape
    columns = _widen(value)
    out = torch.empty_like(value)
    for images, rows in _blocks(B, N, value.device):
        affinity = torch.bmm(unit[images, rows], unit[images].transpose(1, 2))
        affinity.sub_(level[images])
        below = affinity < 0
        # A patch with nothing above the threshold attends to itself.
        alone = below.all(dim=-1, keepdim=True)
        itself = torch.arange(N, device=value.device)
        itself = itself[rows, None] == itself
        below &= ~(alone & itself)
        affinity.mul_(gain).masked_fill_(below, -math.inf)
        attended = torch.bmm(affinity.softmax(dim=-1), columns[images])
        if add is not None:
            attended += add[images, rows]
        out[images, rows] = attended.to(value.dtype)
    return out


def proxy_gather(
    state: tuple[Tensor, Tensor], value: Tensor, adaptations: Adaptations, *, gain: float
) -> tuple[Tensor, Tensor]:
    """See `fsa_kernels.proxy.gather`."""
    attended = proxy_apply(state, value, gain=gain)
    return gather(value[:, None], attended[:, None], adaptations)


def gather(value: Tensor, attended: Tensor, adaptations: Adaptations) -> tuple[Tensor, Tensor]:
    """See `fsa_kernels.columns.gather`."""
    value, attended = (heads.transpose(1, 2).flatten(2) for heads in (value, attended))
    gathered = torch.cat([attended, value.mean(dim=1, keepdim=True)], dim=1)
    patches = value[:, -attended.shape[1] :]
    parts = [attended] * adaptations.after + [patches] * (adaptations.first() > 1)
    sides = [reduce(torch.add, parts)] + [patches] * adaptations.second()
    columns = torch.cat([adaptations.scale() * side for side in sides], dim=-1)
    return gathered, columns


def cosines(features: Tensor, text_features: Tensor) -> Tensor:
    """Cosines (B,N,C) of features (B,N,E), of any length, and texts (C,E) of unit length.

    In float32 whatever the features' type: the differences that feedback lives on are of the size
    of half precision's rounding at 20 times a cosine.
    """
    unit = functional.normalize(_widen(features), dim=-1)
    return unit @ text_features.to(unit.dtype).T


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _blocks(
    B: int, N: int, device: torch.device, strip: slice | None = None
) -> Iterator[tuple[slice, slice]]:
    """Slices (images, rows) that cover (B, N): several small images at once, or rows of one.

    Args:
        strip: the rows that are to be covered; None all.
    """
    on_cpu = device.type == "cpu"
    entries = _BLOCK_ENTRIES_CPU * torch.get_num_threads() if on_cpu else _BLOCK_ENTRIES_GPU
    images = max(1, entries // (N * N))
    rows = min(N, max(1, entries // N))
    start, stop = (strip.start, strip.stop) if strip else (0, N)
    for first_image in range(0, B, images):
        for first_row in range(start, stop, rows):
            last_row = min(first_row + rows, stop)
            yield slice(first_image, first_image + images), slice(first_row, last_row)
