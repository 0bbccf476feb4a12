"""Counts what a segmentor's forward launches on a GPU, op by op, without a GPU.

    python -m bench launches [--hosts NAME,...] [--backbone NAME] [--side PIXELS] [--out FILE]

Models and tensors that exist in name only, on a device "cuda", go through the forward; every op on
the way is written down, and inside this library's own ops every kernel. An op of PyTorch's counts
as one launch unless it only looks at a tensor in another way or sets memory aside, although its
libraries may take two for one, such as a product that is split and summed: what counts in the end
is the captured graph of `python -m bench gpu`.

An op that would make the host wait for the device, or reads or writes memory of the host, ends the
count with its name: such a forward cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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

from bench.rows.hosts import BACKBONES
from bench.rows.pictures import clip_segmentor
from fsa import hosts
from fsa.models.guides import VFM, load_vfm
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


class _Launches(TorchDispatchMode):
    """Counts launches by the op that makes them; of this library's ops, by kernel.

    Attributes:
        counts: name -> launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._within = ""

    def add(self, name: str, values: Any = ()) -> None:
        """One launch of a kernel that is given some values."""
        _require_on_device(name, values)
        self.counts[self._within + name] += 1

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
            self.add(f"{func.namespace}::{_name(func)}", (args, kwargs, result))
        return result

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *bias: Any) -> Tensor:
        """One kernel on a GPU, which lays the heads of a patch side by side."""
        self.add("aten::scaled_dot_product_attention", (query, key, value, bias))
        B, H, N, _ = query.shape
        return query.new_empty((B, N, H, value.shape[-1])).transpose(1, 2)

    def _opened(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Runs the Python function behind one of this library's ops, and counts what it does."""
        definition = _maybe_get_opdef(func)
        if definition is None:
            raise LookupError(f"{func} has no Python function whose launches could be counted")
        before, self._within = self._within, f"{func.namespace}::{_name(func)}: "
        try:
            with self:
                return definition._init_fn(*args, **kwargs)
        finally:
            self._within = before


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
) -> Counter[str]:
    """What one forward of a segmentor launches: name -> how often.

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
    counted = _Launches()
    with _pretended_gpu():
        on_device(visual, dtype)
        if vfm is not None:
            _vfm_on_device(vfm, dtype)
        windows = torch.empty((1, 3, side, side), dtype=dtype, device=DEVICE)
        text = torch.empty((C, visual.output_dim), device=DEVICE)
        segmentor = clip_segmentor(host, visual, text, vfm, feedback)
        # As `Segmentor.segment` runs it; ops made of others come whole only in this mode.
        with triton_launches(counted.add, run=False), torch.inference_mode(), counted:
            segmentor.forward(windows, text)
    return counted.counts


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
    parser.add_argument("--backbone", default="ViT-B/16", help="default ViT-B/16")
    parser.add_argument("--side", type=int, default=336, help="of the window; default 336")
    parser.add_argument("--out", type=Path, help="writes the counts as JSON, for the tables")
    options = parser.parse_args(arguments[1:])
    counts = {}
    for host in options.hosts.split(","):
        visual, vfm = models(options.backbone, host)
        off, on = (launches(host, visual, vfm, mode, side=options.side) for mode in (False, True))
        counts[host] = (off, on)
    print(report(counts))
    if options.out is not None:
        record = {
            "command": " ".join(["python -m bench", *arguments]),
            "backbone": options.backbone,
            "side": options.side,
            "hosts": {
                host: {"off": dict(off), "on": dict(on)} for host, (off, on) in counts.items()
            },
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0
