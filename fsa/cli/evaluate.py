"""`fsa eval`: measure mIoU on a benchmark or a folder.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsa.cli import options
from fsa.cli.groups import with_groups
from fsa.errors import InputError

if TYPE_CHECKING:
    from fsa.config import FSAConfig
    from fsa.evaluation.datasets import Dataset
    from fsa.evaluation.processes import Group
    from fsa.evaluation.protocol import Preset, Protocol
    from fsa.evaluation.result import Result
    from fsa.segment.segmentor import Segmentor

_WINDOW_BATCH_CPU = 8
_WINDOW_BATCH_GPU = 64


class OnError(str, Enum):
    """What a file that cannot be used does."""

    stop = "stop"
    skip = "skip"


@dataclass(frozen=True)
class GivenModel(options.ModelOptions):
    """As `ModelOptions`, but None where nothing was given, which --list does not ask for."""

    host: options.HostIfGiven = None  # type: ignore[assignment]
    host_option: options.HostOption = None
    model: options.ModelIfGiven = None  # type: ignore[assignment]

    def with_defaults(self) -> options.ModelOptions:
        """What is evaluated."""
        return replace(self, host=self.host or options.DEFAULT_HOST, model=self.model or "tiny")


@with_groups
def evaluate(
    *,
    dataset: Annotated[
        str, typer.Argument(help='A benchmark (see "fsa data list"), or "folder".')
    ] = "",
    root: Annotated[
        Path | None, typer.Option(help="Folder that holds the pictures and masks of the dataset.")
    ] = None,
    list_cells: Annotated[
        bool,
        typer.Option("--list", help="Print the presets, and the paper's numbers with commands."),
    ] = False,
    chosen: GivenModel,
    feedback: options.Feedback = True,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Published settings to use: fsa, proxyclip, sclip, clearclip, clearclip-224, "
            "naclip, pearl or tiny; default those the host was published with."
        ),
    ] = None,
    short_side: Annotated[
        int | None, typer.Option(help=f"{options.SHORT_SIDE}; default the preset's.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help=f"{options.WINDOW}; default the preset's.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help=f"{options.STRIDE}; default the preset's.")
    ] = None,
    whole: Annotated[
        bool | None,
        typer.Option(
            "--whole/--windows",
            help="Label each picture in one piece, or by sliding windows; default the preset's.",
        ),
    ] = None,
    prob_thd: Annotated[
        float | None,
        typer.Option(
            help="Pixels whose best class is less probable than this become background; default "
            "the preset's."
        ),
    ] = None,
    area_thd: Annotated[
        float | None,
        typer.Option(
            help="Classes that cover no more than this share of the foreground are dropped; "
            "default the preset's."
        ),
    ] = None,
    logit_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of the cosines before the softmax over classes; default the preset's."
        ),
    ] = None,
    pamr_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of PAMR, which refines the labels by the colours of the picture; default "
            "the preset's."
        ),
    ] = None,
    propagation_grid: Annotated[
        int | None,
        typer.Option(
            help="Rows and columns of cells on which PEARL's propagation spreads the classes over "
            "the picture, 0 for none; default the preset's."
        ),
    ] = None,
    antialias: Annotated[
        bool | None,
        typer.Option(
            "--antialias/--no-antialias",
            help="Smooth pictures when they are made smaller; default no, as published.",
        ),
    ] = None,
    changes: options.FeedbackOptions,
    feedback_logit_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of the cosines by which FSA compares patches; default as published."
        ),
    ] = None,
    uniform_logit_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of the cosines under uniform attention, which FSA compares with; default "
            "as published."
        ),
    ] = None,
    classes_file: Annotated[
        Path | None,
        typer.Option(help="Text file with other names for the classes, one class a line."),
    ] = None,
    ignore: options.Ignore = None,
    sweep: Annotated[
        str,
        typer.Option(
            help="Ablations to run, separated by commas: scaling, pruning, isolation, adaptations, "
            "similarity, confidence, beta."
        ),
    ] = "",
    on_error: Annotated[
        OnError,
        typer.Option(help="Whether a file that cannot be used stops the run, or is skipped."),
    ] = OnError.stop,
    workers: Annotated[int, typer.Option(help="Number of processes that decode pictures.")] = 2,
    window_batch: Annotated[
        int | None,
        typer.Option(
            help=f"Windows per forward pass; default {_WINDOW_BATCH_CPU}, on a GPU "
            f"{_WINDOW_BATCH_GPU}."
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Pictures per unit of work; default the window batch.")
    ] = None,
    compute: options.ComputeOptions,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default one under fsa-eval/.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over; discard what an earlier run counted.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but the mIoU.")] = False,
) -> None:
    """Measure mIoU on a benchmark or a folder of pictures with masks.

    If the command is killed, start it again: it continues where it stopped. Under torchrun the
    pictures are shared out: torchrun --nproc-per-node 8 -m fsa eval ...
    """
    if list_cells:
        typer.echo(_listing(dataset, chosen.host.value if chosen.host else None, chosen.model))
        return
    if not dataset or root is None:
        raise InputError(
            "name a dataset and where it lies: fsa eval voc21 --root DIR, or fsa eval folder "
            "--root DIR for images/, masks/ and classes.txt"
        )
    model = chosen.with_defaults()

    # What can be wrong is found before the models are loaded.
    from fsa.evaluation import protocol

    family = preset or protocol.family_of(model.host.value, model.model, feedback)
    settings = protocol.preset(family, dataset).override(
        short_side=short_side,
        window=window,
        stride=stride,
        whole=whole,
        prob_thd=prob_thd,
        area_thd=area_thd,
        logit_scale=logit_scale,
        pamr_steps=pamr_steps,
        propagation_grid=propagation_grid,
        antialias=antialias,
    )

    from fsa.evaluation import datasets

    opened = datasets.open_dataset(
        dataset,
        root,
        class_list_name=settings.class_list,
        classes_file=classes_file,
        ignore=ignore or (),
    )
    from fsa.evaluation import processes

    of_feedback = {
        **asdict(changes),
        "logit_scale": feedback_logit_scale,
        "uniform_logit_scale": uniform_logit_scale,
    }
    try:
        group = processes.start()
        compute = replace(compute, device=processes.own_device(compute.device))
        segmentor = options.load_segmentor(
            model,
            compute,
            of_feedback,
            feedback=feedback,
            host_options=protocol.host_options(family, dataset, model.host.value),
        )
        if not quiet and group.rank == 0:
            options.announce_dtype(compute.dtype, segmentor)
        on_gpu = segmentor.loaded.device.type == "cuda"
        run_options = {
            "window_batch": _default_batch(on_gpu) if window_batch is None else window_batch,
            "chunk": chunk,
            "workers": workers,
            "on_error": on_error.value,
            "restart": restart,
            "quiet": quiet,
            "vfm_pretrained": model.vfm_pretrained,
        }
        first = group.rank == 0
        if sweep:
            swept = [name.strip() for name in sweep.split(",")]
            folder = out or _folder(opened, model, "-".join(["sweep", *swept]))
            _sweep(swept, segmentor, opened, settings, folder, run_options, group)
        else:
            folder = out or _folder(opened, model, "fsa" if feedback else "host")
            _once(segmentor, opened, settings, folder, run_options, first)
    finally:
        processes.stop()


def _default_batch(on_gpu: bool) -> int:
    return _WINDOW_BATCH_GPU if on_gpu else _WINDOW_BATCH_CPU


def _folder(dataset: Dataset, model: options.ModelOptions, kind: str) -> Path:
    from fsa.files import safe_stem

    words = [dataset.root.name if dataset.name == "folder" else dataset.name]
    words += [model.host.value, model.model, *([model.vfm] if model.vfm else [])]
    return Path("fsa-eval") / safe_stem("-".join([*words, kind]))


def _once(
    segmentor: Segmentor,
    dataset: Dataset,
    settings: Preset,
    folder: Path,
    run_options: dict[str, Any],
    first: bool,
) -> None:
    from fsa.evaluation import report, runner

    def announce(protocol: Protocol) -> None:
        if not run_options["quiet"]:
            typer.echo(f"{protocol.describe()}\n")

    result = runner.evaluate(segmentor, dataset, settings, folder, announce=announce, **run_options)
    if not first:
        return
    if run_options["quiet"]:
        typer.echo(f"{100 * result.miou():.2f}")
    else:
        typer.echo(f"\n{report.text(result)}\nwritten to {folder}/")


def _sweep(
    names: list[str],
    segmentor: Segmentor,
    dataset: Dataset,
    settings: Preset,
    folder: Path,
    run_options: dict[str, Any],
    group: Group,
) -> None:
    from fsa.evaluation import locking, runner, sweep
    from fsa.files import make_directory

    if segmentor.config is None:
        raise InputError("--sweep varies feedback, which --no-feedback turns off")
    chosen = sweep.rows(names, segmentor.config)

    def one(config: FSAConfig | None, out: Path) -> Result:
        return runner.evaluate(
            segmentor.with_feedback(False if config is None else config),
            dataset,
            settings,
            out,
            **run_options,
        )

    make_directory(folder)
    with locking.exclusive(folder, group):
        swept = sweep.run(chosen, folder, one)
        files = swept.save(folder) if group.rank == 0 else []
    if group.rank == 0:
        typer.echo(swept.markdown())
        typer.echo(f"written: {', '.join(str(file) for file in files)}")
        if not sweep.can_plot() and {"confidence", "beta"} & {row.table for row in chosen}:
            typer.echo("the plot needs matplotlib: pip install 'fsa-kernels[plots]'", err=True)


def _listing(dataset: str, host: str | None, model: str | None) -> str:
    from fsa.evaluation import paper, protocol

    wanted = {"dataset": dataset or None, "host": host, "model": model}
    lines = [f"{name}: {text}" for name, text in protocol.FAMILIES.items()]
    lines += ["", protocol.table(), "", "the paper's mIoU without -> with FSA, and the command"]
    lines.append("(add --no-feedback for the first number)")
    for cell in paper.cells():
        if all(value in (None, getattr(cell, name)) for name, value in wanted.items()):
            lines.append(
                f"table {cell.table}  {cell.without:5.1f} -> {cell.with_fsa:5.1f}  {cell.command()}"
            )
    return "\n".join(lines)
