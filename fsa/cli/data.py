"""`fsa data`: benchmarks on disk, what is missing, and conversion of masks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fsa.cli import options

app = typer.Typer(no_args_is_help=True, help="Check benchmarks on disk, and convert their masks.")


@app.command("list")
def list_datasets() -> None:
    """The benchmarks, their sources, and where files are looked for."""
    from fsa.evaluation import layouts

    for name, layout in layouts.LAYOUTS.items():
        typer.echo(f"{name}: {layout.title}, {layout.pictures} pictures")
        typer.echo(f"  pictures  {layout.images}/*{layout.image_suffix}")
        typer.echo(f"  masks     {layout.masks}/*{layout.mask_suffix}")
        if layout.splits:
            typer.echo(f"  split     {' or '.join(layout.splits)}")
        typer.echo(f"  from      {layout.source}")
    typer.echo(f"{layouts.FOLDER}: any folder")
    typer.echo("  pictures  images/*")
    typer.echo("  masks     masks/*, of the same names, with the number of a class per pixel")
    typer.echo("  classes   classes.txt, one class a line from number 0, synonyms after commas")


@app.command("check")
def check(
    name: Annotated[str, typer.Argument(help='A benchmark, or "folder".')],
    root: Annotated[Path, typer.Argument(help="Folder that holds it.")],
    ignore: options.Ignore = None,
) -> None:
    """Say what is missing before a dataset can be evaluated."""
    from fsa.evaluation import datasets

    problems = datasets.check(name, root, ignore=ignore or ())
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    opened = datasets.open_dataset(name, root, ignore=ignore or ())
    typer.echo(
        f"{name}: all there, {len(opened.samples)} pictures with masks, "
        f"{len(opened.classes)} classes, in {opened.root}"
    )


@app.command("convert")
def convert(
    name: Annotated[str, typer.Argument(help="coco_object, coco_stuff or cityscapes.")],
    root: Annotated[Path, typer.Argument(help="Folder that holds it.")],
    workers: Annotated[
        int | None, typer.Option(help="Processes; default as many as there are cores.")
    ] = None,
) -> None:
    """Convert a benchmark's validation masks to the numbers that its evaluation uses."""
    from tqdm import tqdm

    from fsa.evaluation import convert

    written = convert.convert(
        name,
        root,
        workers=workers,
        progress=lambda results, total: tqdm(results, total=total, unit="mask", file=sys.stderr),
    )
    typer.echo(f"{written} masks written")
