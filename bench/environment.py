"""What a result says of where it comes from: machine, versions, commit, date and command.

A result is for publication only if it names a commit whose code is exactly what ran.
`bench/results` is no part of the code: a second command may follow a first that wrote there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fsa
from bench import RESULTS, ROOT
from fsa import tiny

_PACKAGES = ("triton", "open_clip_torch", "timm", "numpy")
UNKNOWN = "unknown"
_CHECKSUM_LENGTH = 12
_DIRTY = "-dirty"


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit, date and command of a run on a device."""
    on_gpu = device.type == "cuda"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _gpu_driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        **origin(sys.argv[1:]),
    }


def origin(arguments: Sequence[str]) -> dict[str, Any]:
    """Versions, commit, date and command of a result that depends on no machine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in _PACKAGES},
        "fsa": fsa.__version__,
        "tiny": tiny_weights(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Of a folder its name: where it lies is of no interest elsewhere.
        "command": " ".join(["python -m bench", *(_folder_name(word) for word in arguments)]),
    }


def tiny_weights() -> str:
    """The beginning of the checksum of the embedded model's weights."""
    return hashlib.sha256(tiny.weights_path().read_bytes()).hexdigest()[:_CHECKSUM_LENGTH]


def commit() -> str:
    """The commit of the code, with "-dirty" where the code is another; "unknown" without git."""
    head = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    if not head or changes is None:
        return UNKNOWN
    return head + (_DIRTY if changes else "")


def unpublishable(record: dict[str, Any]) -> str | None:
    """Why a result is not for publication, in words, or None.

    Args:
        record: with its "environment", or that itself.
    """
    if record.get("rehearsal"):
        return "it is a rehearsal: nothing was measured"
    named = record.get("environment", record).get("commit", UNKNOWN)
    if named == UNKNOWN:
        return "it names no commit"
    if named.endswith(_DIRTY):
        return f"the code was not that of a commit: {named.removesuffix(_DIRTY)} with changes"
    return None


def require_publishable(record: dict[str, Any], place: Path) -> None:
    """Ends the program before a result that is not for publication is written among those that are.

    Args:
        record: as `unpublishable` takes it.
        place: the file or folder to be written.
    """
    reason = unpublishable(record)
    if reason and place.resolve().is_relative_to(RESULTS.resolve()):
        raise SystemExit(
            f"not written into {RESULTS.relative_to(ROOT)}: {reason}. Commit first, or name "
            "another place with --out"
        )


def _folder_name(word: str) -> str:
    folder = Path(word)
    return folder.name if folder.is_absolute() and folder.is_dir() else word


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu_driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return next(iter(result.stdout.split()), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or UNKNOWN
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else UNKNOWN
