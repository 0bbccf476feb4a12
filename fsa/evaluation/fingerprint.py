"""Hashes by which a run that goes on notices that its files or its models have changed since."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_LENGTH = 16
# Hashing more than this takes seconds, which a person should know of.
_LARGE_BYTES = 1 << 28

_hashed: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], ...], str]] = WeakKeyDictionary()


def of_names(names: Iterable[str]) -> str:
    """Of a list of names, in its order."""
    return _digest("\n".join(names).encode())


def of_files(paths: Iterable[Path]) -> str:
    """Of files by name, size and time of last modification, so that none has to be read again."""
    return _digest("\n".join(_stamp(path) for path in paths).encode())


def of_weights(module: nn.Module | None, *, quiet: bool = True) -> str | None:
    """Of the parameters and buffers of a model as they are in memory; None of no model.

    A model is hashed once for as long as nothing is written into its tensors.

    Args:
        module: the model.
        quiet: do not say on stderr that a large model is being hashed.
    """
    if module is None:
        return None
    tensors = sorted(module.state_dict(keep_vars=True).items())
    written = tuple((tensor.data_ptr(), _version(tensor)) for _, tensor in tensors)
    if module in _hashed and _hashed[module][0] == written:
        return _hashed[module][1]
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    if size > _LARGE_BYTES and not quiet:
        print(f"hashing {size / 1e9:.1f} GB of weights", file=sys.stderr)
    whole = hashlib.sha256()
    for name, tensor in tensors:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        stored = tensor.detach().contiguous().cpu()
        whole.update(stored.flatten().view(torch.uint8).numpy())
    digest = whole.hexdigest()[:_LENGTH]
    _hashed[module] = (written, digest)
    return digest


def newest(paths: Sequence[Path]) -> Path:
    """The file that was written last, to be named where one of several has changed."""
    return max(paths, key=lambda path: path.stat().st_mtime_ns if path.exists() else 0)


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return f"{path.name} missing"
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _version(tensor: Tensor) -> int:
    # Tensors that were made in inference mode do not count what is written into them.
    return -1 if tensor.is_inference() else tensor._version


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_LENGTH]
