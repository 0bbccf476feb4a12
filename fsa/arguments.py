"""Numbers as users pass them: Python's, numpy's, and nothing else."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

from fsa.errors import InputError


def as_float(value: Any) -> float | None:
    """A finite real number as a float, and None for anything else; a bool is no number."""
    # Python's own types first: the compilers that trace this know nothing of abstract ones.
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        return None
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return None
    number = float(value)
    # Written as a comparison, which every torch.compile traces; NaN fails it.
    return number if abs(number) < math.inf else None


def as_integer(value: Any) -> int | None:
    """An integer as an int, and None for anything else; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        return None
    return int(value)


def number_within(name: str, value: Any, least: float, most: float) -> float:
    """The value as a float from `least` to `most`.

    Raises:
        InputError: anything else; the message names the argument.
    """
    number = as_float(value)
    if number is None or not least <= number <= most:
        raise InputError(f"{name}={value!r} must be a number from {least:g} to {most:g}")
    return number


def finite_number(
    name: str, value: Any, *, positive: bool = False, least: float = -math.inf
) -> float:
    """The value as a finite float, above 0 where it must be positive and at least `least`.

    Raises:
        InputError: anything else; the message names the argument.
    """
    number = as_float(value)
    if number is None or number < least or (positive and number <= 0):
        bound = " > 0" if positive else f" >= {least:g}" if math.isfinite(least) else ""
        raise InputError(f"{name}={value!r} is not accepted: it must be a finite number{bound}")
    return number


def integer_within(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int from `least` to `most`, or of any size above where `most` is None.

    Raises:
        InputError: anything else; the message names the argument.
    """
    number = as_integer(value)
    if number is None or number < least or (most is not None and number > most):
        accepted = f">= {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name}={value!r} must be an integer {accepted}")
    return number
