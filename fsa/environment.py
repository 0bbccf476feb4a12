"""What this machine has, in words."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

import fsa
from fsa import tiny
from fsa.errors import InputError

_PACKAGES = ("triton", "open_clip_torch", "timm", "numpy", "pillow")


def report() -> str:
    """Versions, devices, and which backend runs where and why; one fact a line."""
    lines = [
        f"fsa-kernels  {fsa.__version__}",
        f"Python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch        {torch.__version__}, {torch.get_num_threads()} CPU threads",
        *(f"{name:<12} {_version(name)}" for name in _PACKAGES),
        "",
    ]
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        if device != "cpu":
            major, minor = torch.cuda.get_device_capability(device)
            name = torch.cuda.get_device_name(device)
            lines.append(f"{device:<12} {name}, compute capability {major}.{minor}")
        dtype = torch.float32 if device == "cpu" else torch.float16
        lines.append(f"{device:<12} auto runs {fsa.explain(device=device, dtype=dtype)}")
        try:
            fsa.explain(device=device, dtype=dtype, backend="triton")
        except InputError as error:
            lines.append(f"{'':<12} {error}")
    try:
        state = "as shipped" if tiny.checksum_holds() else "DAMAGED: reinstall fsa-kernels"
    except OSError:
        state = "MISSING: reinstall fsa-kernels"
    lines += [
        "",
        f"tiny         embedded model, {state}",
        f"downloads    {os.environ.get('HF_HOME', '~/.cache/huggingface')}",
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
