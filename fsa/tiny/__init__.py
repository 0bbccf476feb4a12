"""The embedded model: a small CLIP that segments pictographs and textures out of the box.

It exists so that a newcomer sees the library work without a download, and so that tests have
trained weights. It knows the words of `fsa.tiny.vocabulary` and not much else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from open_clip.model import CLIP

CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": 224,
        "patch_size": 16,
        "width": 192,
        "layers": 6,
        "head_width": 64,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 128,
        "heads": 2,
        "layers": 3,
    },
}
"""The model in open_clip's terms."""

_FOLDER = Path(__file__).parent
_WEIGHTS = _FOLDER / "weights" / "tiny.safetensors"
_DEMO = _FOLDER / "demo"


@dataclass(frozen=True)
class DemoScene:
    """A shipped picture with its mask.

    Attributes:
        picture, mask: files; the mask holds the index into `classes`, 255 is unlabelled.
        classes: names of the classes.
        styles: of the pictographs.
    """

    picture: Path
    mask: Path
    classes: tuple[str, ...]
    styles: tuple[str, ...]


def weights_path() -> Path:
    """The file of the weights, safetensors in half precision."""
    return _WEIGHTS


def checksum_holds() -> bool:
    """Whether the weights are the ones that were shipped."""
    expected = _WEIGHTS.with_suffix(".sha256").read_text().split()[0]
    return hashlib.sha256(_WEIGHTS.read_bytes()).hexdigest() == expected


def load(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CLIP:
    """The model in evaluation mode.

    Args:
        device: default the CPU.
        dtype: default float32.

    Raises:
        ModelUnavailableError: the weights are missing or not the ones that were shipped.
    """
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import load_file

    from fsa.errors import ModelUnavailableError

    if not _WEIGHTS.exists():
        raise ModelUnavailableError(
            f"the weights of the embedded model are missing at {_WEIGHTS}; reinstall fsa-kernels"
        )
    if not checksum_holds():
        raise ModelUnavailableError(
            f"the weights of the embedded model at {_WEIGHTS} are damaged: their checksum is not "
            "the shipped one; reinstall fsa-kernels"
        )
    model = CLIP(**CONFIG)
    model.load_state_dict(load_file(_WEIGHTS))
    return model.eval().requires_grad_(False).to(device=device, dtype=dtype or torch.float32)


def demo_scenes() -> list[DemoScene]:
    """The shipped pictures of `fsa demo`."""
    return [
        DemoScene(
            _DEMO / entry["picture"],
            _DEMO / entry["mask"],
            tuple(entry["classes"]),
            tuple(entry["styles"]),
        )
        for entry in json.loads((_DEMO / "scenes.json").read_text())
    ]
