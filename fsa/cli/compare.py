"""`fsa compare`: one picture without and with feedback, and what a patch attends to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fsa.cli import options
from fsa.cli.terminal import shown


def compare(
    picture: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    classes: options.Classes = "",
    classes_file: options.ClassesFile = None,
    patch: Annotated[
        str | None,
        typer.Option(help="ROW,COL of the patch to look at; default the middle one."),
    ] = None,
    host: options.Host = options.DEFAULT_HOST,
    model: options.Model = "tiny",
    pretrained: options.Pretrained = None,
    vfm: options.Vfm = None,
    vfm_pretrained: options.VfmPretrained = None,
    window: options.Window = None,
    stride: options.Stride = None,
    short_side: options.ShortSide = None,
    device: options.Device = None,
    cache: options.Cache = True,
    out: Annotated[Path, typer.Option(help="The picture that is written.")] = Path(
        "fsa-compare.png"
    ),
) -> None:
    """Show how FSA changes a picture's labels and a patch's attention.

    One PNG: the labels without and with FSA, and below them what the patch attends to before, which
    patches feedback keeps for it, and what it attends to after.
    """
    from fsa.showcase.comparison import parse_patch, run

    class_list = options.classes_given(classes, classes_file)
    place = parse_patch(patch) if patch is not None else None

    from fsa.segment.segmentor import load_segmentor

    segmentor = load_segmentor(
        host.value,
        model,
        pretrained,
        vfm,
        device=device,
        vfm_pretrained=vfm_pretrained,
        cache_text=cache,
    )
    sizes = {"window": window, "stride": stride, "short_side": short_side}
    typer.echo(shown(run(segmentor, picture, class_list, out, patch=place, **sizes)))
