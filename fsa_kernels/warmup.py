"""Compiles the kernels ahead of the first call."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def warmup(
    device: torch.device | str = "cuda",
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.float32),
    patches: Sequence[int] = (196, 441, 784, 1024, 1764, 4096),
    classes: Sequence[int] = (21, 60, 171),
    proxy_widths: Sequence[tuple[int, int]] = ((768, 768),),
) -> None:
    """Compiles the kernels for these sizes, so that no later call waits for the compiler.

    Args:
        device: a CUDA device.
        dtypes: of logits, features and values.
        patches: N; every size in the same bucket is covered.
        classes: C, likewise.
        proxy_widths: pairs (F, D) of features and values.
    """
    # Not at the top of the file, which is imported where Triton is not installed.
    from fsa_kernels import proxy
    from fsa_kernels.feedback import feedback_attention

    options = {"beta": 3.0, "confidence": 0.45}
    for dtype in dtypes:
        for N in patches:
            for C in classes:
                logits = torch.zeros((1, N, C), dtype=dtype, device=device)
                feedback_attention(logits, logits[:, :1], dtype=dtype, **options)
                features = torch.ones((1, N, 64), dtype=dtype, device=device)
                texts = torch.ones((C, 64), device=device)
                for uniform in (features[:, :1], features):
                    feedback_attention(features, uniform, texts, dtype=dtype, **options)
            for F, D in proxy_widths:
                features = torch.ones((1, N, F), dtype=dtype, device=device)
                value = torch.ones((1, N, D), dtype=dtype, device=device)
                state = proxy.prepare(features, shift=1.2, gain=3.0, stored=True)
                proxy.apply(state, value, gain=3.0)
                terms = dict.fromkeys(("after", "before", "only"), True)
                _, columns = proxy.gather(state, value, gain=3.0, scale=1 / 3, **terms)
                proxy.apply(state, columns[..., D:], gain=3.0, add=columns[..., :D])
