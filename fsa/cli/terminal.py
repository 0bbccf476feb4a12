"""What the commands write to a terminal, and what they say where it cannot be written."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from fsa.errors import FSAError, FSAWarning


def shown(text: str) -> str:
    """A text for the terminal: a file's name may hold characters that would control it."""
    return "".join(
        ascii(c)[1:-1] if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text
    )


@contextmanager
def one_line_messages() -> Iterator[None]:
    """Around a command: its errors and warnings are one line each on stderr, without a traceback.

    Raises:
        SystemExit: with code 1, after an error of ours or of the system's.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names that the terminal's or a file's encoding lacks are no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.simplefilter("always", FSAWarning)
        warnings.showwarning = _showing(warnings.showwarning)
        try:
            try:
                yield
            finally:
                # A full disk shows only here, where there still is somebody to say so.
                sys.stdout.flush()
        except FSAError as error:
            message = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"{error.filename or 'the output'}: {reason}"
            _give_up_on_output()
        else:
            return
    typer.echo(f"fsa: {shown(message)}", err=True)
    sys.exit(1)


def _showing(otherwise: Any) -> Any:
    def show(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, FSAWarning):
            typer.echo(f"fsa: warning: {shown(str(message))}", err=True)
        else:
            otherwise(message, category, *place, **options)

    return show


def _give_up_on_output() -> None:
    """What is left to be written goes nowhere, or Python would complain once more at its end."""
    # Outputs that are no files, as tests have them.
    with suppress(OSError, AttributeError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
