"""The command `fsa`: segment pictures, compare them without and with feedback, evaluate, and more.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import io
import sys

import typer

from fsa.cli import compare, data, demo, evaluate, explore, info, models, segment
from fsa.cli.terminal import shown
from fsa.errors import FSAError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Open-vocabulary segmentation with CLIP and feedback self-adaptive attention (FSA).",
)
app.command("segment")(segment.segment)
app.command("demo")(demo.demo)
app.command("compare")(compare.compare)
app.command("explore")(explore.explore)
app.command("info")(info.info)
app.command("models")(models.models)
app.command("eval")(evaluate.evaluate)
app.add_typer(data.app, name="data")


def main() -> None:
    """Runs the command; an error of ours is one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names that the terminal's or a file's encoding lacks are no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except FSAError as error:
        typer.echo(f"fsa: {shown(str(error))}", err=True)
        sys.exit(1)
