"""CLIP models: the embedded one, open_clip's by name and tag, and local checkpoints."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_checkpoint
from open_clip.model import _build_vision_tower
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from torch import Tensor, nn

from fsa import tiny
from fsa.errors import FSAWarning, InputError, ModelUnavailableError, NotFiniteError
from fsa.models.checkpoints import (
    OPENAI_EXTRAS,
    check_weights,
    is_openai,
    refuse_torchscript,
    unreadable,
)
from fsa.models.hub import hub_if_reachable, unavailable
from fsa.models.initialisation import without_random_weights
from fsa.models.timm_tower import tower_of
from fsa.ops.processor import bfloat16_units

TINY = "tiny"
AUTO = "auto"
"""The type of numbers that is fastest on the device; see `fastest_dtype`."""

_DEFAULT_TAGS = {
    "ViT-B-16": "openai",
    "ViT-L-14": "openai",
    "ViT-L-14-336": "openai",
    "ViT-H-14": "laion2b_s32b_b79k",
}
_QUICK_GELU = "-quickgelu"
_DEVICES = ("cpu", "cuda")
_CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_MISMATCHES_NAMED = 3


@dataclass(frozen=True)
class LoadedModel:
    """A CLIP model ready to run.

    Attributes:
        model: open_clip's, in evaluation mode, without gradients; or one of transformers, see
            `fsa.models.transformers`.
        tokenizer: list of texts -> (T,L) int64.
        name: open_clip's name, or "tiny".
        pretrained: the tag or the file that the weights come from.
        mean, std: of the channels, that pictures in [0, 1] are normalised with.
        image_size: side of the pictures it was trained on, in pixels.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    name: str
    pretrained: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def not_finite(self, what: str) -> NotFiniteError:
        """The error to raise where the model makes NaN or inf of a picture or of class names."""
        kind = str(self.dtype).removeprefix("torch.")
        return NotFiniteError(
            f"{what}: {self.name} with the weights {self.pretrained} makes NaN or inf of it in "
            f"{kind}. The weights may be damaged"
            + ("; in dtype='float32' larger numbers fit" if self.dtype == torch.float16 else "")
        )

    @property
    def temperature(self) -> float | None:
        """What cosines were multiplied with in training, of a model trained with a sigmoid.

        None for one trained with a softmax. A bias tells them apart; see
        `fsa.config.logit_scale_factor`.
        """
        if getattr(self.model, "logit_bias", None) is None:
            return None
        return float(self.model.logit_scale.float().exp())

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Around what computes: names the picture and the weights where it makes NaN or inf."""
        try:
            yield
        except NotFiniteError:
            raise self.not_finite(what) from None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.visual.parameters()).dtype


def load_model(
    name: str = TINY,
    pretrained: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    cache_dir: str | None = None,
) -> LoadedModel:
    """A CLIP model by name.

    Args:
        name: "tiny", the embedded model, or a name of open_clip's such as "ViT-B-16".
        pretrained: a tag of open_clip's, or the path of a checkpoint (.safetensors, or a PyTorch
            file, which is read without executing code from it). None takes the tag of the
            papers: "openai" for ViT-B-16 and ViT-L-14, "laion2b_s32b_b79k" for ViT-H-14.
            OpenAI's weights need QuickGELU: their tag sees to it, and so does a file that OpenAI's
            own code wrote, a state_dict taken from their TorchScript archives included. Other files
            do not say: for OpenAI's, DFN's or MetaCLIP's weights pass the name
            "ViT-B-16-quickgelu"; under the plain name a warning says that plain GELU runs.
        device: "cpu" or a CUDA device; default the GPU if there is one, else the CPU.
        dtype: default float16 on a GPU and float32 on the CPU; "auto" takes what is fastest, see
            `fastest_dtype`.
        cache_dir: where downloaded weights are kept; default the hub's own.

    Raises:
        InputError: an unknown name, tag, device or type, a model whose vision tower is not accepted
            (see `fsa.models.tower.Tower`), a checkpoint of another model, or one with NaN or inf.
        ModelUnavailableError: weights that are not there or cannot be fetched.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    if name == TINY:
        return _load_tiny(pretrained, device, dtype)
    _check_name(name)
    _check_tower(name)
    tag, file = _weights(name, pretrained, cache_dir)
    refuse_torchscript(file)
    settings = get_pretrained_cfg(name, tag) if tag is not None else _shared_settings(name)
    quick_gelu = settings.get("quick_gelu", False) if tag is not None else _quick_gelu(name, file)
    model = _create(name, quick_gelu)
    _load_into(model, file, name)
    return LoadedModel(
        model=_ready(model, device, dtype, file),
        tokenizer=_tokenizer(name, cache_dir),
        name=name,
        pretrained=tag if tag is not None else str(file),
        mean=tuple(settings.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(settings.get("std") or open_clip.OPENAI_DATASET_STD),
        image_size=_side(model),
    )


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device meant, checked to be there.

    Raises:
        InputError: an unknown device, one that is neither the CPU nor a CUDA device, or one this
            machine does not have.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device={device!r} is not a device, such as 'cpu' or 'cuda:0'") from None
    if resolved.type not in _DEVICES:
        raise InputError(
            f"device={str(device)!r} is not accepted: models run on 'cpu' or on a CUDA device, "
            "such as 'cuda:0'"
        )
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise InputError(
                f"device={str(device)!r} is not there: PyTorch {torch.__version__} sees {count} "
                "CUDA devices"
            )
    return resolved


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The floating-point type meant; by default float16 on a GPU and float32 on the CPU.

    Raises:
        InputError: another type.
    """
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype == AUTO:
        return fastest_dtype(device)[0]
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise InputError(
            f"dtype={dtype!r} is not accepted: it must be one of {', '.join((*_DTYPES, AUTO))}"
        )
    return resolved


def fastest_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The type in which a model runs fastest on a device, and why, as a clause.

    float16 on a GPU. On the CPU bfloat16 where the processor has units for it, AMX or AVX512-BF16,
    and float32 elsewhere: without them, bfloat16 is slower than float32.
    """
    if device.type == "cuda":
        return torch.float16, "the model runs on a GPU"
    units = bfloat16_units()
    if units:
        return torch.bfloat16, f"the processor multiplies it by {' and '.join(units)}"
    return torch.float32, "the processor has neither AMX nor AVX512-BF16, the units for bfloat16"


def _load_tiny(pretrained: str | None, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    if pretrained is not None:
        raise InputError(
            f"pretrained={pretrained!r}: the embedded model 'tiny' comes with its weights; "
            "leave pretrained out, or name an open_clip model"
        )
    context_length = tiny.CONFIG["text_cfg"]["context_length"]
    model = tiny.load(device, dtype)
    return LoadedModel(
        model=model,
        tokenizer=open_clip.SimpleTokenizer(context_length=context_length),
        name=TINY,
        pretrained="embedded",
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        image_size=_side(model),
    )


def _check_name(name: str) -> None:
    """Raises InputError for a name that open_clip does not know, with those that are near it."""
    known = open_clip.list_models()
    if name in known:
        return
    # Whoever writes in small letters is not asked to guess which letters are capital.
    spelled = {candidate.casefold(): candidate for candidate in (TINY, *known)}
    close = difflib.get_close_matches(name.casefold(), spelled, n=4, cutoff=0.4)
    hint = f"close to it: {', '.join(spelled[candidate] for candidate in close)}"
    raise InputError(
        f"model={name!r} is not a name that open_clip knows; "
        f"{hint if close else 'see open_clip.list_models()'}"
    )


def _check_tower(name: str) -> None:
    """Refuses a model by its vision tower, before weights are asked for."""
    settings = open_clip.get_model_config(name)
    build = partial(
        _build_vision_tower,
        settings["embed_dim"],
        settings["vision_cfg"],
        settings.get("quick_gelu", False),
    )
    # What is not initialised takes no memory before something is written to it.
    with _quiet(), without_random_weights():
        visual = build()
    try:
        tower_of(visual)
    except InputError as error:
        raise InputError(f"model={name!r} is not accepted: {error}") from None


def _quick_gelu(name: str, file: Path) -> bool:
    """Whether a local checkpoint is to run with QuickGELU although the name does not say so."""
    if open_clip.get_model_config(name).get("quick_gelu", False):
        return False
    if is_openai(file):
        return True
    tags = open_clip.list_pretrained_tags_by_model(name)
    quick = [tag for tag in tags if get_pretrained_cfg(name, tag).get("quick_gelu", False)]
    if quick and name + _QUICK_GELU in open_clip.list_models():
        warnings.warn(
            f"{file} does not say whether its model uses QuickGELU; {name} runs plain GELU. For "
            f"weights that need it ({', '.join(quick)}) pass the name {name}{_QUICK_GELU}",
            FSAWarning,
            stacklevel=3,
        )
    return False


def _weights(name: str, pretrained: str | None, cache_dir: str | None) -> tuple[str | None, Path]:
    """(tag, file), or (None, file) for a local checkpoint."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        if name not in _DEFAULT_TAGS:
            raise InputError(
                f"model={name!r} has no default weights; pass pretrained= one of "
                f"{', '.join(tags) or 'no tags'}, or the path of a checkpoint"
            )
        pretrained = _DEFAULT_TAGS[name]
    path = Path(pretrained).expanduser()
    if path.is_file():
        return None, path
    if pretrained in tags:
        return pretrained, _download(name, pretrained, cache_dir)
    if path.suffix in _CHECKPOINT_SUFFIXES or len(path.parts) > 1:
        raise ModelUnavailableError(f"pretrained={pretrained!r}: no such file")
    raise InputError(
        f"pretrained={pretrained!r} is neither a file nor a tag of {name}; its tags are "
        f"{', '.join(tags) or 'none'}"
    )


def _shared_settings(name: str) -> dict[str, Any]:
    """The statistics of pictures that all pretrained weights of a name agree on, for a file of it.

    SigLIP, PE and MobileCLIP were trained on pictures that are normalised otherwise than CLIP's.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    every = [get_pretrained_cfg(name, tag) for tag in tags]
    return {
        key: every[0].get(key)
        for key in ("mean", "std")
        if every and all(settings.get(key) == every[0].get(key) for settings in every)
    }


def _create(name: str, quick_gelu: bool) -> nn.Module:
    """open_clip's model of a name without weights; some text towers are described on a hub."""
    text = open_clip.get_model_config(name)["text_cfg"]
    from_hub = text.get("hf_model_name")
    if (from_hub or "hf_tokenizer_name" in text) and find_spec("transformers") is None:
        raise InputError(
            f"the text of {name} goes through the transformers library, which is not installed: "
            "pip install 'fsa-kernels[transformers]'"
        )
    try:
        hub = hub_if_reachable() if from_hub else nullcontext()
        # The weights come next, all of them or an error.
        with _quiet(), hub, without_random_weights():
            return open_clip.create_model(name, force_quick_gelu=quick_gelu, pretrained_text=False)
    # The hub's client and its HTTP library raise many kinds of errors here.
    except Exception:
        if not from_hub:
            raise
        raise unavailable(
            f"the text tower of {name}", from_hub, "copy its config.json into the hub's cache"
        ) from None


def _download(name: str, tag: str, cache_dir: str | None) -> Path:
    settings = get_pretrained_cfg(name, tag)
    try:
        with _quiet(), hub_if_reachable():
            file = download_pretrained(settings, cache_dir=cache_dir)
    # The hub's client, its HTTP library and open_clip raise many kinds of errors here.
    except Exception:
        file = None
    if not file:
        source = settings.get("hf_hub") or settings.get("url")
        passing = "pass the file: pretrained=PATH (on the command line --pretrained PATH)"
        if settings.get("quick_gelu", False) and name + _QUICK_GELU in open_clip.list_models():
            quick = name + _QUICK_GELU
            passing = (
                f"pass the file with the name of the model that has QuickGELU: model={quick!r}, "
                f"pretrained=PATH (on the command line --model {quick} --pretrained PATH)"
            )
        raise unavailable(f"{name} ({tag})", source.rstrip("/"), passing) from None
    return Path(file)


def _load_into(model: Any, file: Path, name: str) -> None:
    try:
        with _quiet():
            unmatched = load_checkpoint(model, str(file), strict=False, weights_only=True)
        missing, unexpected = unmatched.missing_keys, unmatched.unexpected_keys
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise unreadable(file) from None
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        shown = " ".join(lines[:_MISMATCHES_NAMED])
        raise InputError(f"{file}: this checkpoint does not fit {name}. {shown[:400]}") from None
    # Whatever a broken or hostile file makes the readers raise; nothing in it was executed.
    except Exception:
        raise unreadable(file) from None
    unexpected = [key for key in unexpected if key not in OPENAI_EXTRAS]
    if missing or unexpected:
        found = [
            f"{what} {', '.join(keys[:_MISMATCHES_NAMED])}{', ...' * more}."
            for what, keys in (("It lacks", missing), ("It holds besides", unexpected))
            if keys
            for more in [len(keys) > _MISMATCHES_NAMED]
        ]
        raise InputError(f"{file}: this checkpoint does not fit {name}. {' '.join(found)}")
    check_weights(model, file)


def _tokenizer(name: str, cache_dir: str | None) -> Any:
    from_hub = "hf_tokenizer_name" in open_clip.get_model_config(name)["text_cfg"]
    try:
        with _quiet(), hub_if_reachable() if from_hub else nullcontext():
            return open_clip.get_tokenizer(name, cache_dir=cache_dir)
    # Tokenizers of some models come from the hub, with its many kinds of errors.
    except Exception:
        raise unavailable(
            f"the tokenizer of {name}", "its hub", "copy it into the hub's cache"
        ) from None


def _ready(model: Any, device: torch.device, dtype: torch.dtype, file: Path) -> nn.Module:
    model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    if dtype == torch.float16:
        # It ends at 65504, far below the other types.
        check_weights(model, file)
    return model


def _side(model: Any) -> int:
    size = model.visual.image_size
    return size if isinstance(size, int) else size[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps open_clip's and the hub's log lines off the terminal; errors come as exceptions."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
