"""Counts what a segmentor's forward launches on a GPU, op by op, without a GPU.

    python -m bench launches [--hosts NAME,...] [--backbones NAME,...] [--side PIXELS]
                             [--out FILE]

Models and tensors that exist in name only, on a device "cuda", go through the forward; every op on
the way is written down, and inside this library's own ops every kernel. An op of PyTorch's counts
as one launch unless it only looks at a tensor in another way or sets memory aside, although its
libraries may take two for one, such as a product that is split and summed: what counts in the end
is the captured graph of `python -m bench gpu`.

With the launches is counted what they have to do, from shapes: bytes, each tensor that a launch is
given read or written once; products, the floating-point operations of matrix products in the
models' type; and other operations in float32, where they matter. `python -m bench tables` predicts
from it what FSA adds.

An op that would make the host wait for the device, or reads or writes memory of the host, ends the
count with its name: such a forward cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._library.custom_ops import _maybe_get_opdef
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.environment import origin, require_publishable
from bench.rows.hosts import BACKBONES
from bench.rows.pictures import clip_segmentor
from fsa import hosts
from fsa.models.guides import VFM, load_vfm
from fsa.models.timm_tower import tower_of
from fsa.models.tower import Tower

DEVICE = torch.device("cuda", 0)
# Of an H200.
_CAPABILITY = (9, 0)
_CLASSES = 171
_WAITS = (DataDependentOutputException, DynamicOutputShapeException)

# Besides ops that return a view: those that set memory aside, and one that hides that it is a view.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class Synchronises(Exception):
    """A forward does what makes the host wait for the device, or the device for the host."""


@dataclass(frozen=True)
class Work:
    """What one op has to do.

    Attributes:
        name: of the op.
        bytes: read and written.
        products: floating-point operations of matrix products in the models' type.
        operations: others, in float32.
    """

    name: str
    bytes: int = 0
    products: int = 0
    operations: int = 0

    def plus(self, bytes: int = 0, products: int = 0, operations: int = 0) -> Work:
        """With more to do."""
        return Work(
            self.name,
            self.bytes + bytes,
            self.products + products,
            self.operations + operations,
        )


class Launches(TorchDispatchMode):
    """Counts launches by the op that makes them; of this library's ops, by kernel.

    Attributes:
        counts: name -> launches.
        work: what ops had to do -> how often; of this library's ops, all their kernels together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.work: Counter[Work] = Counter()
        self._within = ""
        self._open: Work | None = None

    def add(self, name: str, values: Any = (), products: int = 0) -> None:
        """One launch of a kernel that is given some values, with the operations of its products."""
        _require_on_device(name, values)
        self.counts[self._within + name] += 1
        if self._open is None:
            self.work[Work(name, _bytes(values), products)] += 1
        else:
            self._open = self._open.plus(_bytes(values), products)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # Asks a tensor for its device.
            return func(*args, **kwargs)
        if func.namespace == "fsa":
            return self._opened(func, args, kwargs)
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            return self._attention(*args)
        if _is_made_of_others(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except _WAITS:
            raise Synchronises(f"{func}: its result depends on data on the device") from None
        if _is_view(func) or _name(func) in _FREE:
            _require_on_device(str(func), (args, kwargs, result))
        else:
            products = _products(func, args, kwargs, result)
            self.add(f"{func.namespace}::{_name(func)}", (args, kwargs, result), products)
        return result

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *bias: Any) -> Tensor:
        """One kernel on a GPU, which lays the heads of a patch side by side."""
        B, H, N, d = query.shape
        result = query.new_empty((B, N, H, value.shape[-1])).transpose(1, 2)
        products = 2 * B * H * N * key.shape[2] * (d + value.shape[-1])
        tensors = (query, key, value, bias, result)
        self.add("aten::scaled_dot_product_attention", tensors, products)
        return result

    def _opened(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Runs the Python function behind one of this library's ops, and counts what it does."""
        definition = _maybe_get_opdef(func)
        if definition is None:
            raise LookupError(f"{func} has no Python function whose launches could be counted")
        name = f"{func.namespace}::{_name(func)}"
        before = self._within, self._open
        self._within, self._open = f"{name}: ", Work(name).plus(**_our_work(name, args))
        try:
            with self:
                result = definition._init_fn(*args, **kwargs)
            self.work[self._open] += 1
            return result
        finally:
            self._within, self._open = before


def _bytes(values: Any) -> int:
    """Of all tensors among some values; one that repeats its entries counts what there is."""
    return sum(
        min(value.numel() * value.itemsize, value.untyped_storage().nbytes())
        for value in tree_leaves(values)
        if isinstance(value, Tensor)
    )


def _products(func: OpOverload, args: Any, kwargs: Any, result: Any) -> int:
    """Floating-point operations of the matrix products in one of PyTorch's ops."""
    if _name(func) == "_native_multi_head_attention":
        B, L, D = args[0].shape
        # Four projections, scores and their product with the values.
        return 8 * B * L * D * D + 4 * B * L * L * D
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=result) if count else 0


# Float32 operations an entry of A_f: the reciprocal, two exponentials, their sums, and some nine
# passes of the search.
OPERATIONS_AN_ENTRY = 50


def _our_work(name: str, args: Any) -> dict[str, int]:
    """Products and other operations of one of this library's ops, from its definition."""
    if name in ("fsa::feedback_attention", "fsa::apply_feedback"):
        patches, uniform, text = args[:3]
        B, N, width = patches.shape
        C = width if text is None else len(text)
        # Three products of halves.
        products = 3 * 2 * B * N * N * C
        if text is not None:
            # Two of halves, and once more where each patch has a uniform row of its own.
            each = uniform is not None and uniform.shape[1] == N and N > 1
            products += 2 * 2 * B * N * width * C * (2 if each else 1)
        return {"products": products, "operations": OPERATIONS_AN_ENTRY * B * N * N}
    if name == "fsa::proxy_prepare":
        B, N, F = args[0].shape
        return {"products": 2 * B * N * N * F}
    if name in ("fsa::proxy_apply", "fsa::proxy_gather"):
        B, N, D = args[2].shape
        return {"products": 2 * B * N * N * D}
    if name == "fsa::gather":
        return {}
    raise LookupError(f"nothing is known of what {name} has to do")


def _name(func: OpOverload) -> str:
    return func._schema.name.partition("::")[2]


def _is_made_of_others(func: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_view(func: OpOverload) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _require_on_device(name: str, values: Any) -> None:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.device.type == "cpu":
            raise Synchronises(f"{name}: a tensor of shape {tuple(value.shape)} is on the CPU")


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """Tensors made inside exist in name only, on a GPU that the kernels run on."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        pretended = {
            "get_device_capability": _CAPABILITY,
            "current_device": DEVICE.index,
            "device": nullcontext(),
        }
        for name, value in pretended.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        yield


@contextmanager
def triton_launches(record: Callable[[str, Sequence[Any]], None], run: bool) -> Iterator[None]:
    """Tells of every launch of a Triton kernel.

    Args:
        record: called with the name of the kernel and the values it is given.
        run: whether the kernel runs too.
    """
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    with ExitStack() as stack:
        for kind in (triton.JITFunction, InterpretedFunction):

            def told(kernel: Any, *args: Any, _run: Any = kind.run, **kwargs: Any) -> Any:
                record(kernel.fn.__name__, args)
                return _run(kernel, *args, **kwargs) if run else None

            stack.enter_context(mock.patch.object(kind, "run", told))
        yield


def on_device(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, changed: its weights exist in name only, on the pretended GPU."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: _stand_in(t, dtype) for name, t in held.items() if t is not None})
    return module.eval()


def _stand_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    stand_in = torch.empty(tensor.shape, dtype=dtype, device=DEVICE)
    is_weight = isinstance(tensor, nn.Parameter)
    return nn.Parameter(stand_in, requires_grad=False) if is_weight else stand_in


def launches(
    host: str | hosts.AttentionFunction,
    visual: nn.Module,
    vfm: VFM | None,
    feedback: bool,
    *,
    side: int,
    C: int = _CLASSES,
    dtype: torch.dtype = torch.float16,
) -> Launches:
    """What one forward of a segmentor launches, and what that has to do.

    Args:
        host: as `fsa.load_segmentor` takes it.
        visual: open_clip's vision tower, on any device; its weights are replaced.
        vfm: for "proxyclip", likewise.
        feedback: with FSA.
        side: of the window, in pixels.
        C: queries.
        dtype: of the models.

    Raises:
        Synchronises: the forward could not be captured.
    """
    counted = Launches()
    with _pretended_gpu():
        on_device(visual, dtype)
        if vfm is not None:
            _vfm_on_device(vfm, dtype)
        windows = torch.empty((1, 3, side, side), dtype=dtype, device=DEVICE)
        text = torch.empty((C, tower_of(visual).output_dim), device=DEVICE)
        segmentor = clip_segmentor(host, visual, text, vfm, feedback)
        # As `Segmentor.segment` runs it; ops made of others come whole only in this mode.
        with triton_launches(counted.add, run=False), torch.inference_mode(), counted:
            segmentor.forward(windows, text)
    return counted


def _vfm_on_device(vfm: VFM, dtype: torch.dtype) -> None:
    for name, held in vars(vfm).items():
        if isinstance(held, nn.Module):
            on_device(held, dtype)
        elif isinstance(held, Tensor):
            setattr(vfm, name, _stand_in(held, dtype))


def models(backbone: str, host: str) -> tuple[nn.Module, VFM | None]:
    """A vision tower without weights and, for ProxyCLIP, DINO ViT-B/8 likewise."""
    name = BACKBONES.get(backbone, backbone)
    with torch.device("meta"):
        visual = open_clip.create_model(name, device="meta").visual
        if not hosts.host_class(host).needs_vfm:
            return visual, None
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        return visual, load_vfm("dino", tower=Tower(visual), mean=mean, std=std, pretrained=False)


def added(off: Counter[str], on: Counter[str]) -> dict[str, int]:
    """What feedback adds, and takes away, by name."""
    difference = {name: on[name] - off[name] for name in sorted(on | off)}
    return {name: count for name, count in difference.items() if count}


def report(counts: dict[str, tuple[Counter[str], Counter[str]]]) -> str:
    """The table host x (off, on, added) and what is added, op by op."""
    lines = [f"{'host':12} {'off':>5} {'on':>5} {'added':>5}"]
    for host, (off, on) in counts.items():
        before, after = off.total(), on.total()
        lines.append(f"{host:12} {before:5} {after:5} {after - before:5}")
    for host, pair in counts.items():
        lines.append(f"\n{host}: feedback adds")
        lines += [f"{count:+5} {name}" for name, count in added(*pair).items()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints what the hosts launch, without and with feedback."""
    parser = argparse.ArgumentParser(
        prog="python -m bench launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = ",".join(hosts.names())
    parser.add_argument("--hosts", default=every, help="default: all")
    parser.add_argument(
        "--backbones", default=",".join(BACKBONES), help=f"default {','.join(BACKBONES)}"
    )
    parser.add_argument("--side", type=int, default=336, help="of the window; default 336")
    parser.add_argument("--out", type=Path, help="writes the counts as JSON, for the tables")
    options = parser.parse_args(arguments[1:])
    record: dict[str, Any] = {
        "environment": origin(arguments),
        "side": options.side,
        "classes": _CLASSES,
        "backbones": {},
    }
    if options.out is not None:
        require_publishable(record, options.out)
    for backbone in options.backbones.split(","):
        counts, found = {}, record["backbones"].setdefault(backbone, {})
        for host in options.hosts.split(","):
            visual, vfm = models(backbone, host)
            off, on = (
                launches(host, visual, vfm, mode, side=options.side) for mode in (False, True)
            )
            counts[host] = (off.counts, on.counts)
            found[host] = {
                mode: {"launches": dict(all_of.counts), "work": _work(all_of)}
                for mode, all_of in (("off", off), ("on", on))
            }
        print(f"{backbone}\n\n{report(counts)}\n", flush=True)
    if options.out is not None:
        text = json.dumps(record, indent=1)
        # The numbers of one op on one line.
        text = re.sub(r"\[\s+(\"[^\"]+\"(?:,\s+\d+)+)\s+\]", _on_one_line, text)
        options.out.write_text(text + "\n")
    return 0


def _work(all_of: Launches) -> list[list[Any]]:
    """As data: name, how often, bytes, products, operations."""
    return [
        [one.name, count, one.bytes, one.products, one.operations]
        for one, count in all_of.work.items()
    ]


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", match[1]) + "]"
