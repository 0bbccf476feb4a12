"""What the CPU at hand multiplies matrices with.

Everything here is looked up, never timed, so that runs on one machine take the same products and
give the same bits.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

_CPU_LIST = Path("/proc/cpuinfo")
_INTEL = "GenuineIntel"

# What PyTorch asks of each unit. The names are private, so any of them may be missing.
_BFLOAT16_UNITS = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}


@cache
def bfloat16_units() -> tuple[str, ...]:
    """The units for products of bfloat16 matrices that PyTorch finds and can use, best first.

    Of "AMX" and "AVX512-BF16"; none on another architecture, where PyTorch was built without
    oneDNN, and where it does not say.
    """
    if not torch.backends.mkldnn.is_available():
        return ()
    found = []
    for unit, question in _BFLOAT16_UNITS.items():
        answer = getattr(torch.cpu, question, None)
        if answer is not None and answer():
            found.append(unit)
    return tuple(found)


@cache
def float32_by_onednn() -> bool:
    """Whether oneDNN is the faster library for large float32 products, rather than PyTorch's BLAS.

    PyTorch's default BLAS is Intel's MKL. On Intel's processors it was reported to be the faster
    one, by nearly two times; on others it leaves the widest vectors unused, which oneDNN takes.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return not (torch.backends.mkl.is_available() and _vendor() == _INTEL)


def _vendor() -> str:
    """The processor's maker as it names itself, such as "AuthenticAMD"; "" where nothing tells."""
    try:
        lines = _CPU_LIST.read_text().splitlines()
    except OSError:
        # Windows puts the maker's name at the end of the processor's.
        return platform.processor().rpartition(", ")[2]
    stated = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(stated, "")
