"""`fsa info`: what this machine has, in words."""

from __future__ import annotations

import os
import platform
import textwrap
from importlib import metadata

import typer

from fsa.errors import InputError

_PACKAGES = ("triton", "open_clip_torch", "timm", "numpy", "pillow")


def info() -> None:
    """Versions, devices, and which backend runs where and why."""
    typer.echo(report())


def report() -> str:
    """Versions, devices, and which backend runs where and why."""
    import torch

    import fsa
    from fsa import tiny
    from fsa.ops.processor import bfloat16_units

    lines = [
        _fact("fsa-kernels", fsa.__version__),
        _fact("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _fact("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
        *(_fact(name, _version(name)) for name in _PACKAGES),
        "",
    ]
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        if device != "cpu":
            major, minor = torch.cuda.get_device_capability(device)
            name = torch.cuda.get_device_name(device)
            lines.append(_fact(device, f"{name}, compute capability {major}.{minor}"))
        dtype = torch.float32 if device == "cpu" else torch.float16
        lines.append(_fact(device, f"auto runs {fsa.explain(device=device, dtype=dtype)}"))
        if device == "cpu":
            units = " and ".join(bfloat16_units())
            lines.append(
                _fact(
                    "",
                    f"units for bfloat16: {units}; --dtype auto takes bfloat16"
                    if units
                    else "no units for bfloat16 (AMX, AVX512-BF16); --dtype auto takes float32",
                )
            )
        try:
            fsa.explain(device=device, dtype=dtype, backend="triton")
        except InputError as error:
            lines.append(_fact("", str(error)))
    try:
        state = "as shipped" if tiny.checksum_holds() else "DAMAGED: reinstall fsa-kernels"
    except OSError:
        state = "MISSING: reinstall fsa-kernels"
    lines += [
        "",
        _fact("tiny", f"embedded model, {state}"),
        _fact("downloads", os.environ.get("HF_HOME", "~/.cache/huggingface")),
    ]
    return "\n".join(lines)


def _fact(name: str, value: str) -> str:
    """A name and its value beside it, in lines that fit into a terminal."""
    column = " " * 17
    return textwrap.fill(
        value,
        width=80,
        initial_indent=f"{name:<16} ",
        subsequent_indent=column,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
