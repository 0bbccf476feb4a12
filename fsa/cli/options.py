"""Options that several commands take, with their choices and their help in one place.

Nothing heavy is imported, so that help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsa.errors import InputError

if TYPE_CHECKING:
    from fsa.segment.segmentor import Segmentor


class HostName(str, Enum):
    """The hosts, spelled out here so that help needs no model code."""

    clip = "clip"
    maskclip = "maskclip"
    sclip = "sclip"
    clearclip = "clearclip"
    proxyclip = "proxyclip"
    naclip = "naclip"
    segearth = "segearth"
    pearl = "pearl"
    qk = "qk"
    qq = "qq"
    kk = "kk"
    vv = "vv"


class BackendName(str, Enum):
    """The backends of the ops."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


DEFAULT_HOST = HostName.clearclip

Classes = Annotated[
    str,
    typer.Option(
        help='Class names, such as "cat; dog, puppy; grass". Commas separate synonyms; write \\, '
        "and \\; for a comma and a semicolon within a name.",
        show_default=False,
    ),
]
ClassesFile = Annotated[
    Path | None, typer.Option(help="A text file of class names, one class a line.")
]
_HOST = typer.Option(
    # The names themselves would be a line wider than a terminal.
    metavar="<name>",
    help="The method that segments, to which FSA is added: "
    f"{', '.join(host.value for host in HostName)}; default {DEFAULT_HOST.value}.",
)
_MODEL = typer.Option(help='"tiny" (embedded, the default), or an open_clip name such as ViT-B-16.')
Host = Annotated[HostName, _HOST]
HostIfGiven = Annotated[HostName | None, _HOST]
HostOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<name=value>",
        help="A constant of the host, such as key_weight=0.3 for pearl; may be given several "
        "times. A name that the host does not have is answered with those that it has.",
    ),
]
Model = Annotated[str, _MODEL]
ModelIfGiven = Annotated[str | None, _MODEL]
Pretrained = Annotated[
    str | None,
    typer.Option(
        help="The weights: one of open_clip's tags for the model, or the path of a checkpoint."
    ),
]
Vfm = Annotated[
    str | None,
    typer.Option(
        help="The model that guides proxyclip: dino, dinov2, dinov3, sam, mae, pe-spatial, "
        "c-radio, or layer or layer:K for a layer of CLIP itself; default dino, with tiny layer."
    ),
]
VfmPretrained = Annotated[
    str | None, typer.Option(help="A checkpoint file with the weights of --vfm.")
]
Feedback = Annotated[
    bool, typer.Option("--feedback/--no-feedback", help="With FSA, or the baseline without it.")
]
Beta = Annotated[
    float | None,
    typer.Option(help="How sharply FSA weighs the patches it keeps; default as published."),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        help="The share of its attention for which a patch keeps the most similar others (the "
        "paper's p); default as published."
    ),
]
WINDOW = "Side of the sliding window in pixels"
STRIDE = "Distance in pixels from one window to the next"
SHORT_SIDE = "Length in pixels to which the short side of a picture is resized first"
Window = Annotated[int | None, typer.Option(help=f"{WINDOW}; default 336, with tiny 112.")]
Stride = Annotated[int | None, typer.Option(help=f"{STRIDE}; default 112, with tiny 56.")]
ShortSide = Annotated[int | None, typer.Option(help=f"{SHORT_SIDE}; default 336, with tiny 224.")]
Ignore = Annotated[
    list[int] | None,
    typer.Option(help="For a folder: a value of the masks that is not counted, besides 255."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16, bfloat16, or auto for what is fastest on this machine; default "
        "float16 on a GPU, else float32."
    ),
]
Backend = Annotated[
    BackendName, typer.Option(help='What computes FSA; "fsa info" says what auto chooses.')
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache", help="Keep the text features of class names for the next run, or not."
    ),
]


CacheDir = Annotated[str | None, typer.Option(help="Where downloaded weights are kept.")]


@dataclass(frozen=True)
class ClassOptions:
    """What is looked for."""

    classes: Classes = ""
    classes_file: ClassesFile = None

    def read(self) -> list[list[str]]:
        """The names and synonyms of each class.

        Raises:
            InputError: neither or both of the options; names that are not accepted.
        """
        if bool(self.classes.strip()) == (self.classes_file is not None):
            raise InputError(
                'pass the classes as --classes "cat; dog, puppy", or as --classes-file'
            )
        from fsa.classes import parse_class_text, read_class_file

        if self.classes_file is not None:
            return read_class_file(self.classes_file)
        return parse_class_text(self.classes)


@dataclass(frozen=True)
class ModelOptions:
    """The host and the models behind it."""

    host: Host = DEFAULT_HOST
    host_option: HostOption = None
    model: Model = "tiny"
    pretrained: Pretrained = None
    vfm: Vfm = None
    vfm_pretrained: VfmPretrained = None


@dataclass(frozen=True)
class FeedbackOptions:
    """What of feedback is changed."""

    beta: Beta = None
    confidence: Confidence = None


@dataclass(frozen=True)
class SizeOptions:
    """How pictures are resized and cut."""

    window: Window = None
    stride: Stride = None
    short_side: ShortSide = None


@dataclass(frozen=True)
class DeviceOptions:
    """Where it is computed."""

    device: Device = None
    cache: Cache = True


@dataclass(frozen=True)
class ComputeOptions(DeviceOptions):
    """Where and how it is computed."""

    dtype: Dtype = None
    backend: Backend = BackendName.auto


def load_segmentor(
    model: ModelOptions,
    compute: DeviceOptions,
    changes: dict[str, float | None] | None = None,
    *,
    feedback: bool = True,
    host_options: dict[str, Any] | None = None,
    **others: Any,
) -> Segmentor:
    """The segmentor that the options ask for.

    Args:
        model, compute: as they were given.
        changes: fields of the feedback; those that are None stay as published.
        feedback: False for the baseline.
        host_options: of the host, where they were not given as --host-option.
        others: of `fsa.load_segmentor`, in place of what the options say.

    Raises:
        InputError, ModelUnavailableError: as `fsa.load_segmentor`; a change that is not accepted,
            or where there is no feedback.
    """
    from fsa.cli.startup import import_model_libraries

    import_model_libraries(model.model)
    from fsa import hosts
    from fsa.segment.segmentor import load_segmentor

    host = model.host.value
    of_host = {**(host_options or {}), **hosts.parsed_options(host, model.host_option or ())}
    arguments: dict[str, Any] = {
        "host_options": of_host,
        "vfm": model.vfm,
        "vfm_pretrained": model.vfm_pretrained,
        "feedback": feedback,
        "device": compute.device,
        "cache_text": compute.cache,
    }
    if isinstance(compute, ComputeOptions):
        arguments |= {"dtype": compute.dtype, "backend": compute.backend.value}
    segmentor = load_segmentor(host, model.model, model.pretrained, **{**arguments, **others})
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    if not given:
        return segmentor
    if segmentor.config is None:
        raise InputError(f"--no-feedback turns feedback off, and with it {', '.join(given)}")
    return segmentor.with_feedback(segmentor.config.replace(**given))


def announce_dtype(dtype: str | None, segmentor: Segmentor) -> None:
    """Says on the error output what --dtype auto has taken, and why."""
    from fsa.models.loading import AUTO, fastest_dtype

    if dtype == AUTO:
        fastest, reason = fastest_dtype(segmentor.loaded.device)
        name = str(fastest).removeprefix("torch.")
        typer.echo(f"--dtype auto takes {name}: {reason}", err=True)
