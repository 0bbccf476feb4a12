"""Which backend runs an op, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fsa_kernels
from fsa.errors import InputError
from fsa.ops.checks import KERNEL_DTYPES

BACKENDS = ("auto", "triton", "torch")
_OLDEST_TENSOR_CORES = (8, 0)


@dataclass(frozen=True)
class Explanation:
    """Which backend runs, and why; prints as one sentence."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def explain(
    tensor: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Explanation:
    """Says which backend would run for a tensor, or for a device and a dtype, and why.

    Args:
        tensor: any input of the ops; gives device and type.
        device: where there is no tensor; default: the GPU if there is one, else the CPU.
        dtype: where there is no tensor; default float32.
        backend: as the ops take it.

    Raises:
        InputError: a backend that cannot run there; the message says why.
    """
    if tensor is not None:
        device, dtype = tensor.device, tensor.dtype
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose(torch.device(device), dtype or torch.float32, backend)


def choose(device: torch.device, dtype: torch.dtype, backend: str) -> Explanation:
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r} is not known: it must be one of {BACKENDS}")
    obstacle = _obstacle_to_triton(device, dtype)
    if backend == "triton" and obstacle is not None:
        raise InputError(f"backend='triton' cannot run here: {obstacle}")
    if backend == "torch":
        return Explanation("torch", "asked for by name")
    if backend == "triton":
        return Explanation("triton", "asked for by name")
    if device.type == "cpu":
        # Also where Triton's interpreter is on: it exists to test, and is slow.
        return Explanation("torch", "the tensors are on the CPU")
    if obstacle is not None:
        return Explanation("torch", obstacle)
    return Explanation("triton", f"fused kernels on {device} for {dtype}")


def _obstacle_to_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run, in words, or None where they can."""
    if not fsa_kernels.available():
        return "triton is not installed"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {dtype}"
    if device.type == "cpu":
        if fsa_kernels.interpreting():
            return None
        return (
            "the tensors are on the CPU; move them to a CUDA device, or set TRITON_INTERPRET=1 "
            "before the first import to run the kernels in Triton's interpreter"
        )
    if device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are written for and tested on NVIDIA GPUs, and this is a ROCm build"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_TENSOR_CORES:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; "
            "the kernels need 8.0 or newer"
        )
    return None
