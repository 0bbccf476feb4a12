"""The command `fsa`: segment pictures, compare them without and with feedback, evaluate, and more.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

import fsa
from fsa.cli import compare, data, demo, evaluate, explore, info, models, segment
from fsa.cli.terminal import one_line_messages

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("segment")(segment.segment)
app.command("demo")(demo.demo)
app.command("compare")(compare.compare)
app.command("explore")(explore.explore)
app.command("info")(info.info)
app.command("models")(models.models)
app.command("eval")(evaluate.evaluate)
app.add_typer(data.app, name="data")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fsa {fsa.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Open-vocabulary segmentation with CLIP and feedback self-adaptive attention (FSA)."""


def main() -> None:
    """Runs the command; an error of ours is one line on stderr and exit code 1."""
    # Threads of PyTorch that wait must not keep a core from those that read and write pictures.
    # It is read when PyTorch is imported, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with one_line_messages():
        app()
