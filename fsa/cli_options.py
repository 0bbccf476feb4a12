"""Options that several commands take, with their help in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Pretrained = Annotated[str | None, typer.Option(help="A tag of open_clip's, or a checkpoint file.")]
Vfm = Annotated[
    str | None,
    typer.Option(help="For proxyclip: dino, dinov2, dinov3, sam, mae, layer, layer:K."),
]
VfmPretrained = Annotated[str | None, typer.Option(help="A checkpoint file for the vfm.")]
Feedback = Annotated[
    bool, typer.Option("--feedback/--no-feedback", help="With FSA, or the host alone.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Model = Annotated[
    str, typer.Option(help='"tiny" (embedded), or an open_clip name such as ViT-B-16.')
]
ClassesFile = Annotated[Path | None, typer.Option(help="The same from a file, one class a line.")]
Window = Annotated[int | None, typer.Option(help="Side of the sliding window.")]
Stride = Annotated[int | None, typer.Option(help="From one window to the next.")]
