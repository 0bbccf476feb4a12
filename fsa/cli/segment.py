"""`fsa segment`: label pictures with classes, and write what was found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsa.cli import options
from fsa.cli.terminal import shown
from fsa.errors import FSAError

if TYPE_CHECKING:
    from tqdm import tqdm

    from fsa.segment.result import Segmentation
    from fsa.segment.segmentor import Segmentor

_CLASSES_SHOWN = 4


def segment(
    pictures: Annotated[
        list[str], typer.Argument(help="Pictures, or directories of them.", show_default=False)
    ],
    classes: options.Classes = "",
    classes_file: options.ClassesFile = None,
    host: options.Host = options.DEFAULT_HOST,
    model: options.Model = "tiny",
    pretrained: options.Pretrained = None,
    vfm: options.Vfm = None,
    vfm_pretrained: options.VfmPretrained = None,
    feedback: options.Feedback = True,
    beta: options.Beta = None,
    confidence: options.Confidence = None,
    window: options.Window = None,
    stride: options.Stride = None,
    short_side: options.ShortSide = None,
    prob_thd: Annotated[
        float,
        typer.Option(help="Pixels whose best class is less probable than this become background."),
    ] = 0.0,
    background: Annotated[
        str | None,
        typer.Option(help="The class that such pixels become; added if you did not name it."),
    ] = None,
    window_batch: Annotated[int, typer.Option(help="How many windows are computed at once.")] = 8,
    device: options.Device = None,
    dtype: options.Dtype = None,
    backend: options.Backend = options.BackendName.auto,
    cache: options.Cache = True,
    cache_dir: Annotated[
        str | None, typer.Option(help="Where downloaded weights are kept.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("fsa-out"),
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Look into the folders of directories as well.")
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Leave out pictures that were segmented into --out with the same settings.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
) -> None:
    """Label every pixel of pictures with the classes you name.

    For each picture: NAME-labels.png with a palette, NAME-overlay.png with a legend, and NAME.json
    with areas and settings. The result of another picture of the same name is kept: the new one is
    called NAME-2. A picture that fails does not stop the others.
    """
    # What can be wrong is found before the models are loaded.
    from fsa.files import make_directory
    from fsa.pictures.reading import list_pictures

    class_list = options.classes_given(classes, classes_file)
    files = list_pictures(pictures, recursive=recursive)
    make_directory(out)

    from fsa.segment.segmentor import load_segmentor

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
        cache_text=cache,
    )
    if not quiet:
        options.announce_dtype(dtype, segmentor)
    segmentor = options.with_changes(segmentor, {"beta": beta, "confidence": confidence})
    settings: dict[str, Any] = {
        "window": window,
        "stride": stride,
        "short_side": short_side,
        "prob_thd": prob_thd,
        "background": background,
        "window_batch": window_batch,
    }
    # What no picture is accepted with is said once, not for every picture.
    segmentor.settings(class_list, **settings)
    found = len(files)
    if skip_existing:
        files = _without_results(segmentor, files, class_list, out, settings)
        if not quiet and len(files) < found:
            typer.echo(f"{found - len(files)} of {found} pictures have their results already")
    failures = _segment_all(segmentor, files, class_list, out, quiet, settings)
    if failures:
        typer.echo(f"{len(failures)} of {len(files)} pictures failed:", err=True)
        for message in failures:
            typer.echo(f"  {shown(message)}", err=True)
        raise typer.Exit(1)


def _segment_all(
    segmentor: Segmentor,
    files: list[Path],
    classes: list[list[str]],
    out: Path,
    quiet: bool,
    settings: dict[str, Any],
) -> list[str]:
    """Segments and saves each picture; returns what went wrong, a line each."""
    from tqdm import tqdm

    from fsa.files import free_stem, safe_stem

    failures: list[str] = []
    taken: set[str] = set()
    with tqdm(total=len(files), unit="picture", disable=quiet or None, file=sys.stderr) as bar:
        for file in files:
            # Pictures of the same name do not overwrite each other, of this run or an earlier one.
            stem = free_stem(out, safe_stem(file.stem), os.path.abspath(file), taken)
            taken.add(stem.casefold())
            try:
                result = segmentor.segment(
                    file,
                    classes,
                    progress=_progress(bar, file, "window"),
                    text_progress=_progress(bar, file, "texts"),
                    **settings,
                )
                written = result.save(out, stem)
            except FSAError as error:
                failures.append(str(error))
            else:
                if not quiet:
                    bar.write(_summary(file, result, written["overlay"]), file=sys.stdout)
            bar.update()
    return failures


def _without_results(
    segmentor: Segmentor,
    files: list[Path],
    classes: list[list[str]],
    out: Path,
    settings: dict[str, Any],
) -> list[Path]:
    """The pictures that were not segmented into `out` with these settings before."""
    from fsa.files import RESULT_ENDINGS, read_record

    # As JSON has it, which knows no tuples.
    asked = json.loads(json.dumps(segmentor.settings(classes, **settings)))
    done = set()
    for file in out.glob(f"*{RESULT_ENDINGS['json']}"):
        record = read_record(file)
        stem = file.name.removesuffix(RESULT_ENDINGS["json"])
        whole = all((out / f"{stem}{ending}").exists() for ending in RESULT_ENDINGS.values())
        if record is not None and whole and asked.items() <= record["settings"].items():
            done.add(record["picture"].get("path"))
    return [file for file in files if os.path.abspath(file) not in done]


def _progress(bar: tqdm, file: Path, what: str) -> Callable[[int, int], None]:
    name = shown(file.name)
    return lambda done, total: bar.set_postfix_str(f"{name}: {what} {done}/{total}")


def _summary(file: Path, result: Segmentation, overlay: Path) -> str:
    from fsa.draw.lettering import percent, shortened

    present = [(name, share) for name, share in result.areas().items() if share > 0]
    listed = ", ".join(
        f"{shortened(name)} {percent(share)}" for name, share in present[:_CLASSES_SHOWN]
    )
    more = f", {len(present) - _CLASSES_SHOWN} more" if len(present) > _CLASSES_SHOWN else ""
    return shown(f"{file.name}: {listed}{more} -> {overlay}")
