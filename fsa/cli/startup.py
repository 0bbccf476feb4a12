"""Importing what a command needs of the model libraries, and no more.

open_clip, timm and torchvision import TorchDynamo and transformers, which takes longer than the
rest of a command does, for decorators and models that the command has no use for. This is for the
command, whose process is its own: a library must not change what others import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo.utils"
_TRANSFORMERS = "transformers"


def import_model_libraries(model: str) -> None:
    """Imports torchvision, timm and open_clip, without what a model of that name does not need.

    What was imported before stays as it is, and what is left out can be imported afterwards.

    Args:
        model: "tiny" or a name of open_clip's.
    """
    import torch

    with _in_place(_DYNAMO, _Later(_DYNAMO)):
        importlib.import_module("torchvision")
    disable = torch.compiler.disable
    # As a decorator it imports TorchDynamo. It matters to those who compile, and no command does.
    torch.compiler.disable = _left_as_it_is  # type: ignore[assignment]
    try:
        importlib.import_module("timm")
    finally:
        torch.compiler.disable = disable
    # open_clip is made for its absence.
    with nullcontext() if _needs_transformers(model) else _in_place(_TRANSFORMERS, None):
        importlib.import_module("open_clip")


class _Later(ModuleType):
    """A module of functions that is imported when one of them is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: getattr(importlib.import_module(self.__name__), name)(
            *args, **options
        )


@contextmanager
def _in_place(name: str, module: ModuleType | None) -> Iterator[None]:
    """Another module, or None for one that is missing, where that one was not yet imported."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _left_as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    return _left_as_it_is if function is None else function


def _needs_transformers(model: str) -> bool:
    """Whether open_clip's description of a model speaks of a text tower or tokenizer of theirs."""
    if model == "tiny":
        return False
    spec = find_spec("open_clip")
    # Names that are not open_clip's are refused later, in words.
    if spec is None or spec.origin is None or Path(model).name != model:
        return True
    try:
        return "hf_" in (Path(spec.origin).parent / "model_configs" / f"{model}.json").read_text()
    except OSError:
        return True
