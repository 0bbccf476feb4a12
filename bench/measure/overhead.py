"""What calls cost in Python before a GPU has anything to do.

    python -m bench overhead [--rounds R] [--out FILE]

times real calls over a driver that does nothing, so that nothing is waited for: the op, its checks,
Triton's binder and launcher, and PyTorch's own ops, all on the CPU. Needs no GPU, but a C compiler.

    whole        one call: the median, and the 20th and 80th percentile, in microseconds
    launches     Triton's part: the call less the same call with Triton's launches left out
    a launch     Triton's part, shared among its launches
    the rest     the op, its checks, PyTorch's own ops

A step is `fsa.ops.feedback_step` with what a host prepared: A_f from the first features and texts,
times the columns, and the host's attention once more. After the trunk is a host's whole forward but
for the blocks before its last.

Times are the processor's for one thread, without what it waits for others; other work on the
machine still makes them longer, by the caches that it takes. Sizes are tiny, since PyTorch's own
ops - products, concatenations - are computed on the CPU here, and their arithmetic must not count.
What only a GPU adds is left out: a product's launch by cuBLAS, the driver's share of a launch, and
asking which GPU is the current one. What only the CPU adds is taken out: looking whether an input
is finite, and widening the operands of a product.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bench.measure import driver

_CALLS = 20
# The promises, in microseconds.
MARKS = {
    "feedback_attention from logits": 45.0,
    "ClearCLIP step": 90.0,
    "ProxyCLIP step": 90.0,
}
# Patches, queries, widths: tiny, for what is computed must not count.
_N, _C, _E = 16, 5, 16
_HEADS, _WIDTH, _PATCH = 2, 8, 8


@dataclass(frozen=True)
class Cost:
    """Of one call, in microseconds.

    Attributes:
        call: what was called.
        p20, median, p80: of the whole call.
        launches: of Triton kernels.
        in_launches: of the median, Triton's part; None where its launches could not be left out.
        mark: what is promised, or None.
    """

    call: str
    p20: float
    median: float
    p80: float
    launches: int
    in_launches: float | None
    mark: float | None


def cost(name: str, call: Callable[[], Any], on: driver.DoNothingDriver, rounds: int) -> Cost:
    """Times a call, with Triton's launches and without, in turns.

    Args:
        name: of the call.
        call: warmed or not.
        on: the installed driver.
        rounds: of each, after a warm-up.
    """
    for _ in range(3 * _CALLS):
        call()
    launches = len(on.of_call(call))
    whole, rest = [], []
    for number in range(rounds + rounds // 4):
        on.forget()
        with_launches = _one(call)
        with _launches_left_out():
            on.forget()
            without = _one(call)
            left = on.count()
        # The first quarter only warms up.
        if number >= rounds // 4:
            whole.append(with_launches)
            rest.append(without)
    p20, median, p80 = (statistics.quantiles(whole, n=10)[i] for i in (1, 4, 7))
    triton = median - statistics.median(rest) if launches and left == 0 else None
    return Cost(name, p20, median, p80, launches, triton, MARKS.get(name))


def _one(call: Callable[[], Any]) -> float:
    """Microseconds of this thread's own time for one call, of some in a row."""
    start = time.thread_time()
    for _ in range(_CALLS):
        call()
    return 1e6 * (time.thread_time() - start) / _CALLS


@contextmanager
def _launches_left_out() -> Iterator[None]:
    """Kernels are called and do nothing, not even look at what they are given."""
    from fsa_kernels import runtime

    def nothing(*args: Any, **options: Any) -> None:
        return None

    with mock.patch.object(runtime, "launch", nothing):
        yield


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Tensors of the CPU are taken by the kernels and multiplied at once, as a GPU multiplies
    halves; they are not looked at for what is not finite."""
    import torch

    import fsa_kernels
    from fsa.ops import functional, library, torch_backend

    def interpreting() -> bool:
        return True

    def only_ask_where(name: str, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def only_ask_where_result(result: torch.Tensor, inputs: dict[str, Any]) -> bool:
        return result.device.type == "cpu"

    def one_product(weights: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, columns.to(weights.dtype))

    # Only the choice of the backend is told so: what launches must know that nothing interprets.
    with (
        mock.patch.object(fsa_kernels, "interpreting", interpreting),
        mock.patch.object(library, "check_finite", only_ask_where),
        mock.patch.object(library, "check_finite_product", only_ask_where_result),
        mock.patch.object(functional, "check_finite_product", only_ask_where_result),
        mock.patch.object(torch_backend, "_rows_times", one_product),
    ):
        yield


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed: name -> call, at tiny sizes."""
    import torch

    import fsa

    torch.manual_seed(0)
    logits = torch.randn(1, _N, _C).half()
    uniform = logits[:, :1]
    features = torch.randn(1, _N + 1, _E).half()
    of_patches, of_uniform = features[:, :_N], features[:, _N:]
    text = torch.nn.functional.normalize(torch.randn(_C, _E), dim=-1)
    config = fsa.FSAConfig()

    return {
        "feedback_attention from logits": lambda: fsa.feedback_attention(
            logits, uniform, backend="triton"
        ),
        "feedback_attention from features": lambda: fsa.feedback_attention(
            of_patches, of_uniform, text_features=text, backend="triton"
        ),
        **_host("clearclip", text, config),
        **_host("proxyclip", text, config),
    }


def _host(name: str, text: Any, config: Any) -> dict[str, Callable[[], Any]]:
    """A host's calls, on a tower of one block, from the tokens of its trunk on.

    Args:
        name: of the host.
        text: features (C,E) of unit length.
        config: of the feedback.
    """
    import torch
    from open_clip.transformer import VisionTransformer

    from fsa import hosts, ops
    from fsa.hosts import LastBlock

    side = 4 * _PATCH
    visual = VisionTransformer(
        image_size=side,
        patch_size=_PATCH,
        width=_HEADS * _WIDTH,
        layers=1,
        heads=_HEADS,
        mlp_ratio=1.0,
        output_dim=_E,
    )
    host = hosts.build(name, visual.eval().requires_grad_(False).half(), backend="triton")
    images = torch.randn(1, 3, side, side).half()
    tokens = host.tower.trunk(images)
    vfm = torch.randn(1, 12, 4, 4).half() if host.needs_vfm else None
    attention = host.attention(LastBlock(host.tower, images, tokens, vfm), config)
    first = host.tail(tokens, attention.step.gathered)
    patches, uniform = first[:, :_N], first[:, _N:]

    def step() -> Any:
        return ops.feedback_step(
            attention.value,
            patches,
            uniform,
            attention.apply,
            text_features=text,
            attended=attention.attended,
            step=attention.step,
            config=config,
            backend="triton",
        )

    def forward(config: Any) -> Callable[[], Any]:
        return lambda: host.features(images, text, vfm_features=vfm, tokens=tokens, config=config)

    title = {"clearclip": "ClearCLIP", "proxyclip": "ProxyCLIP"}[name]
    return {
        f"{title} step": step,
        f"{title} after the trunk, baseline": forward(None),
        f"{title} after the trunk, with FSA": forward(config),
    }


def table(costs: Sequence[Cost]) -> str:
    """One line a call."""
    lines = [
        f"{'microseconds':<36} {'whole':>6} {'p20':>6} {'p80':>6} {'launches':>8} "
        f"{'in them':>7} {'a launch':>8} {'the rest':>8} {'mark':>5}"
    ]
    for one in costs:
        split = ("-", "-", "-")
        if one.in_launches is not None:
            parts = (
                one.in_launches,
                one.in_launches / one.launches,
                one.median - one.in_launches,
            )
            split = tuple(f"{part:.0f}" for part in parts)
        mark = "-" if one.mark is None else f"{one.mark:.0f}"
        lines.append(
            f"{one.call:<36} {one.median:>6.0f} {one.p20:>6.0f} {one.p80:>6.0f} "
            f"{one.launches:>8} {split[0]:>7} {split[1]:>8} {split[2]:>8} {mark:>5}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints what calls cost; 0 whether or not the marks are met."""
    parser = argparse.ArgumentParser(
        prog="python -m bench overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=60, help="of each call; default 60")
    parser.add_argument("--out", type=Path, help="writes the costs as JSON")
    options = parser.parse_args(arguments[1:])
    from bench.environment import environment, require_publishable

    try:
        on = driver.install(90)
    except driver.Unavailable as reason:
        raise SystemExit(f"overheads cannot be timed here: {reason}") from None
    import torch

    record: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "load": os.getloadavg()[0],
        "unit": "microseconds",
    }
    if options.out is not None:
        require_publishable(record, options.out)
    torch.set_num_threads(1)
    with torch.inference_mode(), _as_on_a_gpu():
        costs = [cost(name, call, on, options.rounds) for name, call in calls().items()]
    print(table(costs))
    cores = os.cpu_count()
    print(
        f"\n{record['environment']['processor']}, {cores} cores, load {record['load']:.1f} when "
        f"it began, torch {torch.__version__}, Triton {record['environment']['triton']}, Python "
        f"{record['environment']['python']}. Other work makes all of it longer."
    )
    if options.out is not None:
        record["costs"] = [asdict(one) for one in costs]
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0
