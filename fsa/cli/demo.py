"""`fsa demo`: the shipped pictures through six hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fsa.cli.terminal import shown


def demo(
    out: Annotated[Path, typer.Option(help="The picture that is written.")] = Path("fsa-demo.png"),
) -> None:
    """Segment shipped pictures with six hosts, without and with FSA.

    One PNG shows them side by side, with the truth. Another, NAME-attention.png, shows what a patch
    attends to before and after feedback.
    """
    from fsa.showcase.demonstration import run

    typer.echo(shown(run(out)))
