"""Compiles the kernels ahead of the first call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from fsa_kernels.options import Adaptations, Options

# Triton compiles again where a stride becomes a multiple of 16, or stops being one. The widths of
# models are multiples of 16, so one such width stands for all.
_WIDTH = 64
_PAPER = Options(beta=3.0, confidence=0.45)


def warmup(
    device: torch.device | str = "cuda",
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.float32),
    patches: Sequence[int] = (196, 441, 784, 1024, 1764, 4096),
    classes: Sequence[int] = (21, 59, 80, 81, 160, 171, 847),
    proxy_widths: Sequence[tuple[int, int]] = ((768, 768),),
) -> None:
    """Compiles the kernels for these sizes, so that no later call waits for the compiler.

    Covers logits, features with texts in float32 and in their own type, with no uniform row, one
    for an image and one for each patch, for one image and for several; values of any number of
    heads; and the affinity of features that come as tokens or as maps. Not covered are other
    options than the default ones of `fsa.FSAConfig`, and slices with odd strides.

    Args:
        device: a CUDA device.
        dtypes: of logits, features and values.
        patches: N; every size in the same bucket is covered that is a multiple of 16 if this is.
        classes: C, likewise; 21 stands for counts up to 32, 59 for those up to 64, 81 for 128, 171
            for 256, 847 for more.
        proxy_widths: pairs (F, D) of features and values.
    """
    for dtype, N in product(dtypes, patches):
        for C, B in product(classes, (1, 2)):
            _predictions(torch.zeros((B, N, C), dtype=dtype, device=device))
        for C in classes:
            _features(torch.ones((1, N, _WIDTH), dtype=dtype, device=device), C)
        for (F, D), B in product(proxy_widths, (1, 2)):
            _affinities(
                torch.ones((B, N, F), dtype=dtype, device=device),
                torch.ones((B, N, D), dtype=dtype, device=device),
            )
    for dtype in dtypes:
        _values(torch.ones((1, 2, 17, _WIDTH), dtype=dtype, device=device))


# The kernels are not imported at the top of this file, which is imported where Triton is not
# installed.


def _predictions(logits: Tensor) -> None:
    from fsa_kernels.feedback import feedback_attention

    for uniform in (None, logits[:, :1].contiguous(), logits):
        feedback_attention(logits, uniform, options=_PAPER, dtype=logits.dtype)


def _features(features: Tensor, C: int) -> None:
    from fsa_kernels.feedback import feedback_attention

    for dtype in {torch.float32, features.dtype}:
        texts = torch.ones((C, features.shape[-1]), dtype=dtype, device=features.device)
        for uniform in (None, features[:, :1], features):
            feedback_attention(features, uniform, texts, options=_PAPER, dtype=features.dtype)


def _values(value: Tensor) -> None:
    from fsa_kernels import columns

    columns.gather(value, value[:, :, 1:], Adaptations())


def _affinities(features: Tensor, value: Tensor) -> None:
    from fsa_kernels import proxy

    D = value.shape[-1]
    for given in (features, _as_map(features)):
        state = proxy.prepare(given, shift=1.2, gain=3.0, stored=True)
    for given in (value, _as_map(value)):
        proxy.apply(state, given, gain=3.0)
        _, columns = proxy.gather(state, given, Adaptations(), gain=3.0)
        proxy.apply(state, columns[..., D:], gain=3.0, add=columns[..., :D])


def _as_map(tokens: Tensor) -> Tensor:
    """The same (B,N,F), laid out as a map (B,F,N)."""
    return tokens.mT.contiguous().mT
