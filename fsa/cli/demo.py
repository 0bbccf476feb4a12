"""`fsa demo`: the shipped pictures through four hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="The picture that is written.")] = Path("fsa-demo.png"),
) -> None:
    """Segment shipped pictures with four hosts, without and with FSA.

    One PNG shows them side by side, with the truth.
    """
    from fsa.showcase.demonstration import run

    run(out)
