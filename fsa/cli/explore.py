"""`fsa explore`: one HTML page to look into feedback."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fsa.cli import options
from fsa.cli.groups import with_groups
from fsa.cli.terminal import shown


@with_groups
def explore(
    *,
    picture: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    classes: options.ClassOptions,
    patch: Annotated[
        str | None,
        typer.Option(
            help="ROW,COL of a patch: the page shows the window around it; default the middle one."
        ),
    ] = None,
    model: options.ModelOptions,
    changes: options.FeedbackOptions,
    sizes: options.SizeOptions,
    compute: options.DeviceOptions,
    out: Annotated[Path, typer.Option(help="The page that is written.")] = Path("fsa-explore.html"),
) -> None:
    """Write one HTML page to look into FSA's feedback, patch by patch.

    Open it in a browser; it needs no network. It shows the labels without and with FSA, and for
    every patch what it attends to, which patches feedback keeps, and how that changes with the
    settings.
    """
    from fsa.showcase.comparison import parse_patch

    class_list = classes.read()
    place = parse_patch(patch) if patch is not None else None
    segmentor = options.load_segmentor(model, compute, asdict(changes))
    segmentor.explore(picture, class_list, out, patch=place, **asdict(sizes))
    megabytes = out.stat().st_size / 1e6
    typer.echo(shown(f"wrote {out} ({megabytes:.1f} MB): open it in a browser"))
