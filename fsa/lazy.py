"""Submodules as attributes of their package, imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType


def submodules(package: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package that imports its submodules at first use.

    So `import fsa` is enough to write `fsa.models.transformers`, and imports nothing heavy.
    """

    def find(name: str) -> ModuleType:
        full = f"{package}.{name}"
        if not name.startswith("_"):
            try:
                return importlib.import_module(full)
            except ModuleNotFoundError as error:
                # Something else that is missing is not this attribute's fault.
                if error.name != full:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
