"""Checkpoint files: opening them safely, what their keys tell, and what their weights must be."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from fsa.errors import InputError

OPENAI_EXTRAS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""What a state_dict from OpenAI's TorchScript archives holds besides the weights."""


def refuse_torchscript(file: Path) -> None:
    """Raises InputError for a TorchScript archive, which holds code."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        if any(entry.endswith("/constants.pkl") for entry in archive.namelist()):
            raise InputError(
                f"{file}: this is a TorchScript archive, which holds code; it is not opened. Save "
                "its state_dict() with torch.save or as .safetensors, and pass that"
            )


def unreadable(file: Path) -> InputError:
    """The one wording for a file that no reader takes."""
    return InputError(
        f"{file}: this is not a checkpoint that can be read safely: it must be .safetensors, or a "
        "PyTorch file that holds nothing but tensors (a state_dict)"
    )


def check_weights(model: nn.Module, file: Path | str) -> None:
    """Looks for NaN and inf in a model's weights, after they were loaded or changed their type.

    Args:
        model: the model.
        file: where the weights come from, for the message.

    Raises:
        InputError: a weight that is not finite; the message names the file and the tensor.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        # NaN and inf stay in a sum, which takes a fraction of the time; a sum that is not finite
        # may be of numbers that are.
        if bool(tensor.sum().isfinite()):
            continue
        if not bool(tensor.isfinite().all()):
            what = "NaN" if bool(tensor.isnan().any()) else "inf"
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{file}: the tensor {name} holds {what} in {kind}; what it would compute means "
                "nothing. The file is damaged, or its numbers are too large for the type"
            )


def is_openai(file: Path) -> bool:
    """Whether a file holds the state_dict of OpenAI's own code, whose models all use QuickGELU.

    It is known by what OpenAI's TorchScript archives add to the weights, or by the order of the
    modules in a block, which is that of OpenAI's code and of no other. A file that was sorted or
    written by other code does not tell.
    """
    keys = [key.removeprefix("module.") for key in _keys(file)]
    if OPENAI_EXTRAS <= set(keys):
        return True
    if file.suffix == ".safetensors":  # Sorted.
        return False
    block = "visual.transformer.resblocks.0."
    order = [key.removeprefix(block).split(".")[0] for key in keys if key.startswith(block)]
    return list(dict.fromkeys(order)) == ["attn", "ln_1", "mlp", "ln_2"]


def _keys(file: Path) -> list[str]:
    """The names of a checkpoint's tensors in the order of the file; none where it is unreadable."""
    # Whatever a broken or hostile file makes the readers raise; loading it says so in words.
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return list(tensors.keys())
        try:
            # The tensors stay on the disk.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # A file in the format before PyTorch 1.6.
            content = torch.load(file, map_location="cpu", weights_only=True)
        return [str(key) for key in content.get("state_dict", content)]
    except Exception:
        return []
