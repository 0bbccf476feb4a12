"""What bfloat16 saves on this CPU, and what it changes.

    python -m bench dtypes [--only window,step,labels] [--rounds R] [--photographs DIR]

prints

    window    a window of 336 pixels through ViT-B/16 with random weights, in float32 and bfloat16
    step      a feedback step with 171 classes, beside the three products of N x N by N x 768 that
              every form of it needs, and without the units for bfloat16 or oneDNN's products
    labels    the share of pixels that have the label of float32: of the embedded model on the
              shipped scenes, and on a folder with images/ and classes.txt

Times are the processor's for one thread, the best of R, in milliseconds: without what it waits for
other work, which still makes them longer by the caches that it takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PARTS = ("window", "step", "labels")
PATCHES, CLASSES, WIDTH = (784, 1764), 171, 768
HOSTS = ("clearclip", "sclip", "proxyclip", "pearl")
_CPU = torch.device("cpu")
_TYPES = (torch.float32, torch.bfloat16)
# The embedded model; of it alone float16 is measured too, which is slow on most CPUs.
_LABEL_TYPES = (*_TYPES, torch.float16)


def best(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Processor milliseconds of each call, by turns, after one round to warm up."""
    times = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken = 1e3 * (time.process_time() - start)
            if number:
                times[name] = min(times[name], taken)
    return times


def window_calls(backbone: str = "ViT-B/16", side: int = 336) -> dict[str, Callable[[], Tensor]]:
    """Forwards of ClearCLIP without and with feedback, and of all blocks but the last."""
    from bench.rows.hosts import HostRow, our_host
    from fsa.models.timm_tower import tower_of

    calls: dict[str, Callable[[], Tensor]] = {}
    for dtype in _TYPES:
        inputs = HostRow("clearclip", backbone, side).inputs(_CPU, dtype)
        for mode, config in inputs.configs.items():
            calls[f"{_name(dtype)}, FSA {mode}"] = our_host("clearclip", inputs, config)
        trunk = tower_of(inputs.visual).trunk
        calls[f"{_name(dtype)}, all blocks but the last"] = partial(trunk, inputs.images)
    return calls


def step_calls(N: int) -> dict[str, Callable[[], Any]]:
    """Steps and their products for N patches."""
    from bench.rows.op import OpRow, make_inputs, ours

    calls: dict[str, Callable[[], Any]] = {}
    for dtype in _TYPES:
        step = ours("step", "torch", make_inputs(OpRow("step", 1, N, CLASSES), _CPU, dtype))
        matrix = torch.rand(N, N).softmax(dim=-1).to(dtype)
        columns = torch.randn(N, WIDTH).to(dtype)
        calls[f"{_name(dtype)} step"] = step
        calls[f"{_name(dtype)} step without"] = partial(_without, step)
        calls[f"{_name(dtype)} products"] = partial(_products, matrix, columns)
    return calls


def _products(matrix: Tensor, columns: Tensor) -> None:
    from fsa.ops import torch_backend

    for width in (2, 1):
        torch_backend.rows_times(matrix[None], columns.repeat(1, width)[None])


def _without(call: Callable[[], Any]) -> None:
    """A call with neither units for bfloat16 nor oneDNN's float32 products."""
    from fsa.ops import torch_backend

    with (
        mock.patch.object(torch_backend, "bfloat16_units", return_value=()),
        mock.patch.object(torch_backend, "float32_by_onednn", return_value=False),
    ):
        call()


def scenes() -> Iterator[tuple[Any, Sequence[Any]]]:
    """The pictures that are shipped, with the classes that they were composed of."""
    from bench.quality import guards
    from fsa import tiny

    for scene in tiny.demo_scenes():
        yield scene.picture, scene.classes
    for picture, _, classes in guards.scenes():
        yield picture, classes


def photographs(folder: Path) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The pictures of a folder as `fsa eval folder` takes it, with their classes."""
    from fsa.classes import read_class_file

    classes = read_class_file(folder / "classes.txt")
    for picture in sorted((folder / "images").iterdir()):
        yield picture, classes


def agreement(host: str, pictures: Iterable[tuple[Any, Sequence[Any]]]) -> dict[str, Any]:
    """Shares of pixels labelled as in float32: of all, and the lowest of a picture."""
    import fsa

    segmentors = {
        dtype: fsa.load_segmentor(host, dtype=dtype, device="cpu", cache_text=False)
        for dtype in _LABEL_TYPES
    }
    equal = dict.fromkeys(_LABEL_TYPES[1:], 0)
    lowest = dict.fromkeys(_LABEL_TYPES[1:], 1.0)
    pixels = 0
    for picture, classes in pictures:
        labels = {dtype: s.segment(picture, classes).labels for dtype, s in segmentors.items()}
        expected = labels[torch.float32]
        pixels += expected.size
        for dtype in equal:
            same = labels[dtype] == expected
            equal[dtype] += int(same.sum())
            lowest[dtype] = min(lowest[dtype], float(same.mean()))
    return {_name(dtype): (equal[dtype] / pixels, lowest[dtype]) for dtype in equal}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str]) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench dtypes", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--rounds", type=int, default=9, help="of which the best one counts")
    parser.add_argument("--photographs", type=Path, help="a folder of images/ and classes.txt")
    options = parser.parse_args(arguments[1:])
    parts = options.only.split(",")

    from bench.environment import environment
    from fsa.ops import processor

    about = environment(_CPU)
    units = ", ".join(processor.bfloat16_units()) or "none"
    print(f"{about['processor']}, units for bfloat16: {units}, torch {torch.__version__}")
    print(f"commit {about['commit']}, {about['command']}")
    with torch.inference_mode(), _one_thread():
        timed = {"window": window_calls()} if "window" in parts else {}
        if "step" in parts:
            timed |= {f"step N={N} C={CLASSES}": step_calls(N) for N in PATCHES}
        for name, calls in timed.items():
            print(f"\n{name}, ms")
            for call, taken in best(calls, options.rounds).items():
                print(f"  {call:<38}{taken:8.1f}", flush=True)
    if "labels" in parts:
        print("\nlabels as in float32, of all pixels and of the picture with the fewest")
        sets = {"scenes": list(scenes())}
        if options.photographs is not None:
            sets["photographs"] = list(photographs(options.photographs))
        for host in HOSTS:
            for kind, pictures in sets.items():
                for dtype, (share, lowest) in agreement(host, pictures).items():
                    row = f"{host}, {len(pictures)} {kind}, {dtype}"
                    print(f"  {row:<38}{share:9.2%}{lowest:9.2%}", flush=True)
    return 0
