"""`fsa segment`: label pictures with classes, and write what was found."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsa.cli import options
from fsa.cli.groups import with_groups
from fsa.cli.terminal import shown
from fsa.errors import FSAError

if TYPE_CHECKING:
    from fsa.segment.result import Segmentation
    from fsa.segment.segmentor import Segmentor

_WRITERS = 2
# Results that wait to be written; with more, or with more pixels, the next picture waits for them.
_WAITING, _WAITING_PIXELS = 4, 32_000_000
# From this many windows on an estimate of the time comes first, and progress counts windows.
_WINDOWS_ESTIMATED = 5000


@with_groups
def segment(
    *,
    pictures: Annotated[
        list[str], typer.Argument(help="Pictures, or directories of them.", show_default=False)
    ],
    classes: options.ClassOptions,
    model: options.ModelOptions,
    feedback: options.Feedback = True,
    changes: options.FeedbackOptions,
    sizes: options.SizeOptions,
    prob_thd: Annotated[
        float,
        typer.Option(help="Pixels whose best class is less probable than this become background."),
    ] = 0.0,
    background: Annotated[
        str | None,
        typer.Option(help="The class that such pixels become; added if you did not name it."),
    ] = None,
    window_batch: Annotated[int, typer.Option(help="How many windows are computed at once.")] = 8,
    compute: options.ComputeOptions,
    cache_dir: options.CacheDir = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("fsa-out"),
    rle: Annotated[
        bool,
        typer.Option("--rle", help="Put the mask of each class into the JSON as COCO's RLE."),
    ] = False,
    polygons: Annotated[
        bool,
        typer.Option("--polygons", help="Put the outlines of each class into the JSON."),
    ] = False,
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

    class_list = classes.read()
    files = list_pictures(pictures, recursive=recursive)
    make_directory(out)
    shapes = tuple(name for name, asked in (("rle", rle), ("polygons", polygons)) if asked)
    if shapes:
        from fsa.segment.shapes import check_installed

        check_installed(shapes)

    segmentor = options.load_segmentor(
        model, compute, asdict(changes), feedback=feedback, cache_dir=cache_dir
    )
    if not quiet:
        options.announce_dtype(compute.dtype, segmentor)
    settings: dict[str, Any] = {
        **asdict(sizes),
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
    failures = _segment_all(segmentor, files, class_list, out, quiet, settings, shapes)
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
    shapes: tuple[str, ...],
) -> list[str]:
    """Segments and saves each picture; returns what went wrong, a line each.

    Results are written in the background, while the next pictures are computed.
    """
    from tqdm import tqdm

    from fsa.files import free_stem, safe_stem

    if not files:
        return []
    # Who sees no progress needs no count, for which every file is opened.
    windows = 0 if quiet else _windows(segmentor, files, settings)
    many = windows >= _WINDOWS_ESTIMATED
    if many:
        from fsa.segment.estimate import seconds_per_window

        seconds = windows * seconds_per_window(segmentor, classes, **settings)
        typer.echo(f"{windows} windows, about {_duration(seconds)}", err=True)
    failures: list[str] = []
    taken: set[str] = set()
    writing: deque[tuple[Path, Segmentation, Future[dict[str, Path]]]] = deque()
    with (
        tqdm(
            total=windows if many else len(files),
            unit="window" if many else "picture",
            disable=quiet or None,
            file=sys.stderr,
        ) as bar,
        ThreadPoolExecutor(_WRITERS, thread_name_prefix="fsa-write") as pool,
    ):

        def written() -> None:
            """Waits for the oldest result that is being written."""
            file, result, future = writing.popleft()
            try:
                paths = future.result()
            except FSAError as error:
                failures.append(str(error))
            else:
                if not quiet:
                    bar.write(_summary(file, result, paths["overlay"]), file=sys.stdout)

        def of_texts(done: int, total: int) -> None:
            bar.set_postfix_str(f"texts {done}/{total}")

        def of_windows(number: int, done: int, total: int) -> None:
            bar.set_postfix_str(f"{shown(files[number].name)}: window {done}/{total}")
            if many:
                bar.update()

        results = segmentor.segment_many(
            files, classes, progress=of_windows, text_progress=of_texts, **settings
        )
        for file, result in zip(files, results, strict=True):
            # Pictures of the same name do not overwrite each other, of this run or an earlier one.
            stem = free_stem(out, safe_stem(file.stem), os.path.abspath(file), taken)
            taken.add(stem.casefold())
            if isinstance(result, FSAError):
                failures.append(str(result))
            else:
                future = pool.submit(result.save, out, stem, shapes=shapes)
                writing.append((file, result, future))
            while writing and (len(writing) > _WAITING or _pixels(writing) > _WAITING_PIXELS):
                written()
            if not many:
                bar.update()
        while writing:
            written()
    return failures


def _pixels(writing: deque[tuple[Path, Segmentation, Future[dict[str, Path]]]]) -> int:
    return sum(result.labels.size for _, result, _ in writing)


def _windows(segmentor: Segmentor, files: list[Path], settings: dict[str, Any]) -> int:
    """How many windows the pictures that can be read will have, as their headers say."""
    from fsa.pictures.reading import size_in_header
    from fsa.segment.estimate import window_count

    sizes = {name: settings[name] for name in ("window", "stride", "short_side")}
    found = (size_in_header(file) for file in files)
    return sum(window_count(segmentor, size, **sizes) for size in found if size is not None)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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


def _summary(file: Path, result: Segmentation, overlay: Path) -> str:
    from fsa.segment.result import CLASSES_NAMED

    present = result.named_areas()
    more = len(present) - CLASSES_NAMED
    listed = ", ".join([*present[:CLASSES_NAMED], *([f"{more} more"] if more > 0 else [])])
    return shown(f"{file.name}: {listed} -> {overlay}")
