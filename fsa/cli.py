"""The command `fsa`: segment pictures, compare them without and with feedback, evaluate, and more.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import io
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fsa import cli_options, eval_cli
from fsa.errors import FSAError, InputError

if TYPE_CHECKING:
    from tqdm import tqdm

    from fsa.result import Segmentation
    from fsa.segmentor import Segmentor

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Open-vocabulary segmentation with CLIP and feedback self-adaptive attention (FSA).",
)

_CLASSES_SHOWN = 4


def main() -> None:
    """Runs the command; an error of ours is one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names that the terminal's or a file's encoding lacks are no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except FSAError as error:
        typer.echo(f"fsa: {_shown(str(error))}", err=True)
        sys.exit(1)


@app.command()
def segment(
    pictures: Annotated[
        list[Path], typer.Argument(help="Pictures, or directories of them.", show_default=False)
    ],
    classes: cli_options.Classes = "",
    classes_file: cli_options.ClassesFile = None,
    host: cli_options.Host = cli_options.DEFAULT_HOST,
    model: cli_options.Model = "tiny",
    pretrained: cli_options.Pretrained = None,
    vfm: cli_options.Vfm = None,
    vfm_pretrained: cli_options.VfmPretrained = None,
    feedback: cli_options.Feedback = True,
    beta: cli_options.Beta = None,
    confidence: cli_options.Confidence = None,
    window: cli_options.Window = None,
    stride: cli_options.Stride = None,
    short_side: cli_options.ShortSide = None,
    prob_thd: Annotated[
        float, typer.Option(help="Pixels whose class is less probable become background.")
    ] = 0.0,
    background: Annotated[
        str | None, typer.Option(help="The class that they become; added if it is not there.")
    ] = None,
    window_batch: Annotated[int, typer.Option(help="Windows computed at once.")] = 8,
    device: cli_options.Device = None,
    dtype: cli_options.Dtype = None,
    backend: cli_options.Backend = cli_options.BackendName.auto,
    cache_dir: Annotated[
        str | None, typer.Option(help="Where downloaded weights are kept.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("fsa-out"),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
) -> None:
    """Label every pixel of pictures with the classes you name.

    For each picture: NAME-labels.png with a palette, NAME-overlay.png with a legend, and NAME.json
    with areas and settings. A picture that fails does not stop the others.
    """
    # What can be wrong is found before the models are loaded.
    from fsa.images import list_pictures
    from fsa.result import make_directory

    class_list = _classes(classes, classes_file)
    files = list_pictures(pictures)
    make_directory(out)

    from fsa.segmentor import load_segmentor

    segmentor = load_segmentor(
        host.value,
        model,
        pretrained,
        vfm,
        feedback=feedback,
        device=device,
        dtype=dtype,
        backend=backend.value,
        cache_dir=cache_dir,
        vfm_pretrained=vfm_pretrained,
    )
    segmentor = cli_options.with_changes(segmentor, {"beta": beta, "confidence": confidence})
    options = {
        "window": window,
        "stride": stride,
        "short_side": short_side,
        "prob_thd": prob_thd,
        "background": background,
        "window_batch": window_batch,
    }
    # What no picture is accepted with is said once, not for every picture.
    segmentor.check(class_list, **options)
    failures = _segment_all(segmentor, files, class_list, out, quiet, options)
    if failures:
        typer.echo(f"{len(failures)} of {len(files)} pictures failed:", err=True)
        for message in failures:
            typer.echo(f"  {_shown(message)}", err=True)
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The picture that is written.")] = Path("fsa-demo.png"),
) -> None:
    """Segment shipped pictures with four hosts, without and with FSA.

    One PNG shows them side by side, with the truth.
    """
    from fsa.demo import run

    run(out)


@app.command()
def compare(
    picture: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    classes: cli_options.Classes = "",
    classes_file: cli_options.ClassesFile = None,
    patch: Annotated[
        str | None,
        typer.Option(help="ROW,COL of the patch to look at; default the middle one."),
    ] = None,
    host: cli_options.Host = cli_options.DEFAULT_HOST,
    model: cli_options.Model = "tiny",
    pretrained: cli_options.Pretrained = None,
    vfm: cli_options.Vfm = None,
    vfm_pretrained: cli_options.VfmPretrained = None,
    window: cli_options.Window = None,
    stride: cli_options.Stride = None,
    short_side: cli_options.ShortSide = None,
    device: cli_options.Device = None,
    out: Annotated[Path, typer.Option(help="The picture that is written.")] = Path(
        "fsa-compare.png"
    ),
) -> None:
    """Show what FSA changes in a picture, and for one of its patches.

    One PNG: the labels without and with FSA, and below them what the patch attends to before, which
    patches feedback keeps for it, and what it attends to after.
    """
    from fsa.compare import parse_patch, run

    class_list = _classes(classes, classes_file)
    place = parse_patch(patch) if patch is not None else None

    from fsa.segmentor import load_segmentor

    segmentor = load_segmentor(
        host.value, model, pretrained, vfm, device=device, vfm_pretrained=vfm_pretrained
    )
    sizes = {"window": window, "stride": stride, "short_side": short_side}
    typer.echo(_shown(run(segmentor, picture, class_list, out, patch=place, **sizes)))


@app.command()
def info() -> None:
    """Versions, devices, and which backend runs where and why."""
    from fsa.environment import report

    typer.echo(report())


eval_cli.register(app)


def _classes(text: str, file: Path | None) -> list[list[str]]:
    if bool(text.strip()) == (file is not None):
        raise InputError('pass the classes as --classes "cat; dog, puppy", or as --classes-file')
    from fsa.text import parse_class_text, read_class_file

    return parse_class_text(text) if file is None else read_class_file(file)


def _segment_all(
    segmentor: Segmentor,
    files: list[Path],
    classes: list[list[str]],
    out: Path,
    quiet: bool,
    options: dict[str, object],
) -> list[str]:
    """Segments and saves each picture; returns what went wrong, a line each."""
    from tqdm import tqdm

    from fsa.result import safe_stem

    failures: list[str] = []
    taken: set[str] = set()
    with tqdm(total=len(files), unit="picture", disable=quiet or None, file=sys.stderr) as bar:
        for file in files:
            # Pictures of the same name in different directories do not overwrite each other, nor
            # do those whose names differ in case on file systems that do not tell it.
            stem = plain = safe_stem(file.stem)
            number = 2
            while stem.casefold() in taken:
                stem = f"{plain}-{number}"
                number += 1
            taken.add(stem.casefold())
            try:
                result = segmentor.segment(
                    file, classes, progress=_window_progress(bar, file), **options
                )
                written = result.save(out, stem)
            except FSAError as error:
                failures.append(str(error))
            else:
                if not quiet:
                    bar.write(_summary(file, result, written["overlay"]), file=sys.stdout)
            bar.update()
    return failures


def _window_progress(bar: tqdm, file: Path):
    name = _shown(file.name)
    return lambda done, total: bar.set_postfix_str(f"{name}: window {done}/{total}")


def _shown(text: str) -> str:
    """A text for the terminal: a file's name may hold characters that would control it."""
    return "".join(
        ascii(c)[1:-1] if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text
    )


def _summary(file: Path, result: Segmentation, overlay: Path) -> str:
    from fsa.viz import percent, shortened

    present = [(name, share) for name, share in result.areas().items() if share > 0]
    shown = ", ".join(
        f"{shortened(name)} {percent(share)}" for name, share in present[:_CLASSES_SHOWN]
    )
    more = f", {len(present) - _CLASSES_SHOWN} more" if len(present) > _CLASSES_SHOWN else ""
    return _shown(f"{file.name}: {shown}{more} -> {overlay}")
