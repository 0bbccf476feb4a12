"""`fsa compare`: one picture without and with feedback, and what a patch attends to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fsa.cli import options
from fsa.cli.groups import with_groups
from fsa.cli.terminal import shown


@with_groups
def compare(
    *,
    picture: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    classes: options.ClassOptions,
    patch: Annotated[
        str | None,
        typer.Option(help="ROW,COL of the patch to look at; default the middle one."),
    ] = None,
    model: options.ModelOptions,
    sizes: options.SizeOptions,
    compute: options.DeviceOptions,
    out: Annotated[Path, typer.Option(help="The picture that is written.")] = Path(
        "fsa-compare.png"
    ),
) -> None:
    """Show how FSA changes a picture's labels and a patch's attention.

    One PNG: the labels without and with FSA, and below them what the patch attends to before, which
    patches feedback keeps for it, and what it attends to after.
    """
    from fsa.showcase.comparison import parse_patch, run

    class_list = classes.read()
    place = parse_patch(patch) if patch is not None else None
    segmentor = options.load_segmentor(model, compute)
    typer.echo(shown(run(segmentor, picture, class_list, out, patch=place, **asdict(sizes))))
