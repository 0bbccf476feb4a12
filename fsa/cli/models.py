"""`fsa models`: which of open_clip's pretrained models run."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table of the documentation, by family.")
    ] = False,
) -> None:
    """Every pretrained model of open_clip: whether it runs, and if not why. Downloads nothing."""
    from fsa.models.catalogue import catalogue, listing, summary
    from fsa.models.catalogue import markdown as table

    pairs = catalogue()
    if markdown:
        typer.echo(table(pairs))
    else:
        typer.echo(f"{listing(pairs)}\n\n{summary(pairs)}")
