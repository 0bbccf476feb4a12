"""`fsa explore`: one HTML page to look into feedback."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fsa.cli import options
from fsa.cli.terminal import shown


def explore(
    picture: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    classes: options.Classes = "",
    classes_file: options.ClassesFile = None,
    patch: Annotated[
        str | None,
        typer.Option(
            help="ROW,COL of a patch: the page shows the window around it; default the middle one."
        ),
    ] = None,
    host: options.Host = options.DEFAULT_HOST,
    model: options.Model = "tiny",
    pretrained: options.Pretrained = None,
    vfm: options.Vfm = None,
    vfm_pretrained: options.VfmPretrained = None,
    beta: options.Beta = None,
    confidence: options.Confidence = None,
    window: options.Window = None,
    stride: options.Stride = None,
    short_side: options.ShortSide = None,
    device: options.Device = None,
    cache: options.Cache = True,
    out: Annotated[Path, typer.Option(help="The page that is written.")] = Path("fsa-explore.html"),
) -> None:
    """Write one HTML page to look into FSA's feedback, patch by patch.

    Open it in a browser; it needs no network. It shows the labels without and with FSA, and for
    every patch what it attends to, which patches feedback keeps, and how that changes with the
    settings.
    """
    from fsa.showcase.comparison import parse_patch

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
    segmentor = options.with_changes(segmentor, {"beta": beta, "confidence": confidence})
    sizes = {"window": window, "stride": stride, "short_side": short_side}
    segmentor.explore(picture, class_list, out, patch=place, **sizes)
    megabytes = out.stat().st_size / 1e6
    typer.echo(shown(f"wrote {out} ({megabytes:.1f} MB): open it in a browser"))
