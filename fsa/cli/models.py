"""`fsa models`: which of open_clip's pretrained models run."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table of the documentation, by family.")
    ] = False,
) -> None:
    """List which of open_clip's pretrained models run.

    Downloads nothing, and says why a model is refused.
    """
    from fsa.models.catalogue import catalogue, listing, summary
    from fsa.models.catalogue import markdown as table

    pairs = catalogue()
    if markdown:
        typer.echo(table(pairs))
    else:
        typer.echo(f"{listing(pairs)}\n\n{summary(pairs)}")
