"""Calls of `fsa_kernels` as hosts make them, at the sizes of the marks, and as nobody expects them.

What Triton compiles depends on shapes, strides, types and addresses, so these are laid out as a
host lays them out: features are the first rows of a block that holds the uniform row too, values
are heads cut out of one projection, ProxyCLIP's values are interpolated maps, patches innermost.
Tensors are empty: a call is made over a driver that does nothing.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fsa_kernels
from fsa_kernels import Adaptations, Options

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Of ViT-B/16 and of DINO ViT-B/8.
HEADS, HEAD_WIDTH, EMBEDDING, VFM_WIDTH = 12, 64, 512, 768
_PAPER = Options(beta=3.0, confidence=0.45, logit_scale=20.0, uniform_logit_scale=35.0)
_ALL = Adaptations()


@dataclass(frozen=True)
class KernelCall:
    """One call.

    Attributes:
        name: what is computed, and at which size.
        run: makes the tensors and calls.
    """

    name: str
    run: Callable[[], Any]


def _empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def from_logits(
    B: int,
    N: int,
    C: int,
    *,
    uniform: str | None = "one",
    dtype: torch.dtype = HALF,
    out: torch.dtype | None = None,
    layout: str = "plain",
    **options: Any,
) -> Callable[[], Any]:
    """A_f from logits (B,N,C).

    Args:
        B, N, C: images, patches, queries.
        uniform: "one" row an image, "each" patch its own, or None.
        dtype, out: of the logits and of A_f.
        layout: "plain", "transposed", "sliced" or "misaligned".
        **options: of `fsa_kernels.Options`.
    """

    def run() -> Any:
        logits = {
            "plain": lambda: _empty(B, N, C, dtype=dtype),
            "transposed": lambda: _empty(B, C, N, dtype=dtype).transpose(1, 2),
            "sliced": lambda: _empty(B, 2 * N, 3 * C + 1, dtype=dtype)[:, ::2, 1::3],
            "misaligned": lambda: _empty(B * N * C + 1, dtype=dtype)[1:].view(B, N, C),
        }[layout]()
        rows = {"one": 1, "each": N, None: 0}[uniform]
        of_uniform = _empty(B, rows, C, dtype=dtype) if rows else None
        return fsa_kernels.feedback_attention(
            logits, of_uniform, options=_PAPER._replace(**options), dtype=out or dtype
        )

    return run


def from_features(
    B: int,
    N: int,
    C: int,
    E: int = EMBEDDING,
    *,
    uniform: str | None = "one",
    dtype: torch.dtype = HALF,
    texts: torch.dtype = SINGLE,
    layout: str = "host",
    **options: Any,
) -> Callable[[], Any]:
    """A_f from features (B,N,E) and texts (C,E); arguments as in `from_logits`.

    Args:
        texts: their type.
        layout: "host", where the uniform rows lie behind those of the patches; "transposed", or
            "transposed texts".
    """

    def run() -> Any:
        rows = {"one": 1, "each": N, None: 0}[uniform]
        both = _empty(B, N + rows, E, dtype=dtype)
        features, of_uniform = both[:, :N], both[:, N:] if rows else None
        if layout == "transposed":
            features = _empty(B, E, N, dtype=dtype).transpose(1, 2)
        text = _empty(C, E, dtype=texts)
        if layout == "transposed texts":
            text = _empty(E, C, dtype=texts).T
        return fsa_kernels.feedback_attention(
            features, of_uniform, text, options=_PAPER._replace(**options), dtype=dtype
        )

    return run


def gathered(
    B: int,
    N: int,
    *,
    H: int = HEADS,
    d: int = HEAD_WIDTH,
    adaptations: Adaptations = _ALL,
    dtype: torch.dtype = HALF,
    layout: str = "host",
) -> Callable[[], Any]:
    """What a step takes of the values (B,H,1+N,d) of the class token and N patches.

    Args:
        B, N, H, d: images, patches, heads, their width.
        adaptations: the terms that are averaged.
        dtype: of the values.
        layout: "host", heads cut out of rows of width H d; or "plain".
    """

    def run() -> Any:
        if layout == "host":
            value = _empty(B, N + 1, H, d, dtype=dtype).transpose(1, 2)
            attended = _empty(B, N, H, d, dtype=dtype).transpose(1, 2)
        else:
            value, attended = (_empty(B, H, L, d, dtype=dtype) for L in (N + 1, N))
        return fsa_kernels.gather(value, attended, adaptations)

    return run


def proxied(
    B: int,
    N: int,
    *,
    F: int = VFM_WIDTH,
    D: int = HEADS * HEAD_WIDTH,
    stored: bool = True,
    adaptations: Adaptations = _ALL,
    dtype: torch.dtype = HALF,
    layout: str = "host",
) -> Callable[[], Any]:
    """ProxyCLIP's attention with a feedback step: prepare, gather, apply with and without a sum.

    Args:
        B, N, F, D: images, patches, width of the features and of the values.
        stored: whether the affinity is kept.
        adaptations: the terms that are averaged.
        dtype: of features and values.
        layout: "host", values with patches innermost, and the first half of columns as what is
            added; or "plain".
    """

    def run() -> None:
        features = _empty(B, N, F, dtype=dtype)
        value = _empty(B, N, D, dtype=dtype)
        if layout == "host":
            value = _empty(B, D, N, dtype=dtype).transpose(1, 2)
        if layout == "transposed features":
            features = _empty(B, F, N, dtype=dtype).transpose(1, 2)
        state = fsa_kernels.proxy_prepare(features, shift=1.2, gain=3.0, stored=stored)
        fsa_kernels.proxy_gather(state, value, adaptations, gain=3.0)
        fsa_kernels.proxy_apply(state, value, gain=3.0)
        product = _empty(B, N, 2 * D, dtype=dtype)
        fsa_kernels.proxy_apply(state, product[..., D:], gain=3.0, add=product[..., :D])

    return run


def of_marks() -> Iterator[KernelCall]:
    """The calls whose resources are reported."""
    for B, N, C in (
        (1, 196, 21),
        (1, 196, 171),
        (40, 784, 19),
        (1, 1764, 21),
        (1, 1764, 171),
        (1, 4096, 171),
    ):
        yield KernelCall(f"logits B={B} N={N} C={C}", from_logits(B, N, C))
    yield KernelCall(
        "logits B=1 N=1764 C=171, no uniform row", from_logits(1, 1764, 171, uniform=None)
    )
    yield KernelCall("logits B=1 N=1764 C=171, fast", from_logits(1, 1764, 171, precision="fast"))
    for B, N, C in ((1, 441, 171), (40, 784, 19), (1, 1764, 171)):
        yield KernelCall(f"features B={B} N={N} C={C}", from_features(B, N, C))
    yield KernelCall(
        "features B=1 N=441 C=171, a uniform row each", from_features(1, 441, 171, uniform="each")
    )
    for B, N in ((1, 441), (40, 196)):
        yield KernelCall(f"gather B={B} N={N}", gathered(B, N))
    for B, N in ((1, 1764), (40, 784)):
        yield KernelCall(f"ProxyCLIP B={B} N={N}", proxied(B, N))


def quick() -> Iterator[KernelCall]:
    """A few calls that reach every kernel and every way of binding: ones, odd strides, integers."""
    yield KernelCall("one of everything", from_logits(1, 1, 1))
    yield KernelCall("the marks' odd strides", from_logits(1, 196, 171))
    yield KernelCall(
        "transposed, integer options", from_logits(2, 50, 14, layout="transposed", beta=3)
    )
    yield KernelCall(
        "misaligned, no uniform row", from_logits(1, 33, 5, uniform=None, layout="misaligned")
    )
    yield KernelCall("a row that registers cannot hold", from_logits(1, 16385, 2))
    yield KernelCall("strides of zero", _strides_of_zero)
    yield KernelCall("features of a host, large tiles", from_features(1, 1764, 171))
    yield KernelCall("features, a uniform row each", from_features(1, 49, 21, uniform="each"))
    for terms in every_adaptations():
        yield KernelCall(f"heads, {terms}", gathered(1, 441, adaptations=terms))
    yield KernelCall("ProxyCLIP, large tiles", proxied(1, 1764))
    yield KernelCall("ProxyCLIP, streamed", proxied(1, 64, stored=False))
    yield KernelCall("rows in blocks", _applied)


def exhaustive() -> Iterator[KernelCall]:
    """Every type, pruning, layout and edge of a size."""
    types = (HALF, BRAIN, SINGLE)
    for dtype in types:
        yield KernelCall(f"logits {dtype}", from_logits(1, 196, 171, dtype=dtype))
    for N, C in itertools.product((1, 2, 16, 17), (1, 2, 16, 33)):
        yield KernelCall(f"logits N={N} C={C}", from_logits(1, N, C))
    for B, N, C in ((2, 3, 1), (16, 3, 1), (1, 1024, 847), (1, 512, 150)):
        yield KernelCall(f"logits B={B} N={N} C={C}", from_logits(B, N, C))
    for layout in ("transposed", "sliced", "misaligned"):
        yield KernelCall(f"logits {layout}", from_logits(2, 50, 14, layout=layout))
    for N, C in ((196, 171), (7, 1)):
        yield KernelCall(f"uniform each N={N} C={C}", from_logits(1, N, C, uniform="each"))
    for dtype, out in ((HALF, SINGLE), (SINGLE, BRAIN)):
        yield KernelCall(f"{dtype} to {out}", from_logits(1, 196, 171, dtype=dtype, out=out))
    forms = itertools.product(
        ("confidence", "ratio", "threshold", None), ("kl", "cosine"), (True, False)
    )
    for pruning, similarity, scaling in forms:
        chosen = {"pruning": pruning, "similarity": similarity, "scaling": scaling}
        yield KernelCall(f"{chosen}", from_logits(1, 40, 9, **chosen))
    for options in (
        {"beta": 3},
        {"beta": 1},
        {"beta": 1.0},
        {"beta": 0},
        {"beta": -1.0},
        {"confidence": 1},
        {"pruning": "threshold", "threshold": 1},
    ):
        yield KernelCall(f"{options}", from_logits(1, 40, 9, **options))
    for N in (196, 784, 1764):
        yield KernelCall(f"fast N={N}", from_logits(1, N, 171, precision="fast"))
    for N in (4096, 8192, 16384):
        yield KernelCall(f"row of {N}", from_logits(1, N, 2))
    for dtype in types:
        yield KernelCall(f"row of 16385 {dtype}", from_logits(1, 16385, 2, dtype=dtype))
    for pruning in ("ratio", "threshold", None):
        yield KernelCall(f"row of 16385 {pruning}", from_logits(1, 16385, 2, pruning=pruning))
    yield KernelCall("row of 16385 unscaled", from_logits(1, 16385, 2, scaling=False))

    for dtype, uniform in itertools.product(types, ("one", "each", None)):
        yield KernelCall(
            f"features {dtype} {uniform}", from_features(1, 196, 171, uniform=uniform, dtype=dtype)
        )
    # Each of these numbers of classes has tiles of its own, aligned or not.
    for C, dtype, uniform in itertools.product(
        (19, 32, 59, 64, 80, 128, 150, 256, 257, 512, 847), types, ("one", "each", None)
    ):
        yield KernelCall(
            f"logits C={C} {dtype} {uniform}", from_logits(1, 196, C, uniform=uniform, dtype=dtype)
        )
        yield KernelCall(
            f"features C={C} {dtype} {uniform}",
            from_features(1, 196, C, uniform=uniform, dtype=dtype),
        )
    for N, C, E in ((1, 1, 1), (1, 1, 512), (2, 1, 2), (17, 3, 1), (17, 1, 33)):
        yield KernelCall(f"features N={N} C={C} E={E}", from_features(1, N, C, E))
    for layout in ("transposed", "transposed texts"):
        yield KernelCall(f"features {layout}", from_features(1, 196, 171, layout=layout))
    for dtype, texts in ((HALF, HALF), (BRAIN, BRAIN), (SINGLE, HALF)):
        yield KernelCall(
            f"features {dtype}, texts {texts}", from_features(1, 50, 9, dtype=dtype, texts=texts)
        )
    for options in (
        {"similarity": "cosine"},
        {"logit_scale": 20, "uniform_logit_scale": 35},
        {"logit_scale": 1, "uniform_logit_scale": 1},
    ):
        yield KernelCall(f"features {options}", from_features(1, 50, 9, **options))

    for dtype in types:
        yield KernelCall(f"gather {dtype}", gathered(1, 441, dtype=dtype))
    for terms in every_adaptations():
        yield KernelCall(f"gather {terms}", gathered(1, 4, H=3, d=8, adaptations=terms))
    for B, N, H, d in ((1, 1, 1, 1), (2, 2, 1, 1), (1, 16, 1, 1), (1, 2, 2, 7)):
        for layout in ("host", "plain"):
            yield KernelCall(
                f"gather B={B} N={N} H={H} d={d} {layout}", gathered(B, N, H=H, d=d, layout=layout)
            )

    for dtype, stored in itertools.product(types, (True, False)):
        yield KernelCall(f"ProxyCLIP {dtype} {stored}", proxied(1, 784, dtype=dtype, stored=stored))
    for terms, dtype, stored in itertools.product(every_adaptations(), types, (True, False)):
        yield KernelCall(
            f"ProxyCLIP {terms} {dtype} {stored}",
            proxied(1, 784, dtype=dtype, stored=stored, adaptations=terms),
        )
    for B, N, F, D in (
        *((1, 1, 1, 1), (2, 2, 1, 1), (1, 1, 3, 5), (1, 17, 1, 1), (2, 17, 16, 16)),
        (1, 2000, 8, 99),
    ):
        for dtype, layout in itertools.product((HALF, SINGLE), ("host", "plain")):
            yield KernelCall(
                f"ProxyCLIP B={B} N={N} F={F} D={D} {dtype} {layout}",
                proxied(B, N, F=F, D=D, dtype=dtype, layout=layout),
            )
    yield KernelCall("ProxyCLIP features", proxied(1, 1764, layout="transposed features"))
    yield KernelCall("strides beyond 2^31", _strides_beyond_32_bits)
    yield from quick()
    yield from of_marks()


def every_adaptations() -> list[Adaptations]:
    """All sets of terms but the empty one."""
    return [Adaptations(*some) for some in itertools.product((True, False), repeat=3) if any(some)]


def _strides_of_zero() -> None:
    logits = torch.empty(1, dtype=HALF).expand(2, 40, 9)
    fsa_kernels.feedback_attention(logits, logits[:, :1], options=_PAPER, dtype=HALF)


def _strides_beyond_32_bits() -> None:
    # Address space only: nothing touches it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    nothing = mmap.mmap(-1, 2 * 7_600_000_000, flags=flags)
    logits = torch.frombuffer(nothing, dtype=HALF).as_strided((3, 4, 5), (2**31 + 16, 2**30, 1))
    fsa_kernels.feedback_attention(logits, None, options=_PAPER, dtype=HALF)


def _applied() -> None:
    # The product of each block of rows is PyTorch's, on the CPU: small.
    columns = torch.zeros((1, 40, 16), dtype=HALF)
    fsa_kernels.apply_feedback(_empty(1, 40, 9), None, None, columns, options=_PAPER)
