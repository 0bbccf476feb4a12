"""From a picture and class names to labels: the whole pipeline, and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fsa
from fsa import hosts
from fsa.classes import Classes, parse_classes
from fsa.config import FSAConfig
from fsa.errors import InputError, named_out_of_memory
from fsa.models.guides import LAYER, VFM, load_vfm
from fsa.models.loading import TINY, LoadedModel, load_model
from fsa.models.text import TextEncoder, TextQueries
from fsa.models.transformers import from_transformers
from fsa.pictures import windows
from fsa.pictures.reading import Picture, read_image
from fsa.segment.graphs import GraphCache
from fsa.segment.inspection import PatchAttentions, attentions
from fsa.segment.labels import class_probabilities, label_map, named_background
from fsa.segment.result import Segmentation

_DEFAULT_VFM = "dino"
_LARGEST_SIDE = 16384


@dataclass(frozen=True)
class _Protocol:
    """Default sizes in pixels: of the short side, of a window, from one window to the next."""

    short_side: int
    window: int
    stride: int


# The papers' window of 336 with a stride of 112 for CLIP. The embedded model was trained on crops
# and small scenes, and sees best through small windows (measured on `fsa.tiny.compose.VALIDATION`).
_PAPER = _Protocol(short_side=336, window=336, stride=112)
_TINY = _Protocol(short_side=224, window=112, stride=56)


def load_segmentor(
    host: str | hosts.AttentionFunction = "clearclip",
    model: str | nn.Module = TINY,
    pretrained: str | None = None,
    vfm: str | Callable[[Tensor], Tensor] | None = None,
    feedback: bool | FSAConfig = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    cache_dir: str | None = None,
    *,
    vfm_pretrained: bool | str | None = None,
    processor: Any = None,
    cuda_graph: bool = False,
) -> Segmentor:
    """A segmentor for any class names.

    Args:
        host: "clip", "maskclip", "sclip", "clearclip", "proxyclip", "naclip", "segearth", "pearl",
            "qk", "qq", "kk" or "vv", or a function that returns the attention between patches; see
            `fsa.hosts.build`.
        model: "tiny", the embedded model, or a name of open_clip's such as "ViT-B-16"; or a
            `CLIPModel`, `SiglipModel` or another that `fsa.models.transformers.from_transformers`
            takes, with its `processor`.
        pretrained: a tag of open_clip's or the path of a checkpoint; see
            `fsa.models.loading.load_model`.
        vfm: for "proxyclip" only: see `fsa.models.guides.load_vfm`; default "dino", and for the
            embedded model "layer", which needs no second model.
        feedback: True for the published configuration, False for the host alone, or a
            configuration.
        device: default the GPU if there is one, else the CPU; of a model that is passed as an
            object, where it is.
        dtype: default float16 on a GPU and float32 on the CPU; of a model that is passed as an
            object, what it is.
        backend: of the ops: "auto", "triton" or "torch".
        cache_dir: where downloaded weights are kept.
        vfm_pretrained: weights of the vfm; see `fsa.models.guides.load_vfm`.
        processor: of a model of transformers: its `CLIPProcessor` or `SiglipProcessor`.
        cuda_graph: on a GPU, captures the forward once for each shape of a batch of windows and
            number of queries, and replays it; at most 8 graphs are kept.

    Raises:
        InputError: an argument that is not accepted.
        ModelUnavailableError: weights that are not there or cannot be fetched.
    """
    name = _host_name(host)
    _check_vfm(host, vfm, vfm_pretrained)
    if isinstance(model, str):
        if processor is not None:
            raise InputError(
                f"processor was given, but model={model!r} takes none; it is for models of "
                "transformers"
            )
        loaded = load_model(model, pretrained, device=device, dtype=dtype, cache_dir=cache_dir)
    else:
        if pretrained is not None:
            raise InputError(
                f"pretrained={pretrained!r} was given with a model that has its weights; leave it "
                "out, or pass a name as the model"
            )
        loaded = from_transformers(model, processor, device=device, dtype=dtype)
    built = hosts.build(host, loaded.model.visual, backend=backend)
    proxy = None
    if built.needs_vfm:
        proxy = load_vfm(
            vfm if vfm is not None else (LAYER if loaded.name == TINY else _DEFAULT_VFM),
            tower=built.tower,
            mean=loaded.mean,
            std=loaded.std,
            pretrained=vfm_pretrained,
            cache_dir=cache_dir,
        )
    # Raises here, before any picture, where the backend cannot run.
    fsa.explain(device=loaded.device, dtype=loaded.dtype, backend=backend)
    return Segmentor(
        name, built, loaded, TextEncoder(loaded), proxy, feedback, cuda_graph=cuda_graph
    )


class Segmentor:
    """Segments pictures into any classes; made by `load_segmentor`.

    Attributes:
        host_name: as `load_segmentor` took it; of a function, its name.
        host: the module behind it.
        loaded: the CLIP model.
        vfm: ProxyCLIP's other model, or None.
        config: how feedback is computed, or None for the host alone.
        graphs: the CUDA graphs of `forward`, or None where it runs eagerly.

    Raises:
        InputError: cuda_graph where the model is not on a CUDA device.
    """

    def __init__(
        self,
        host_name: str,
        host: hosts.Host,
        loaded: LoadedModel,
        text: TextEncoder,
        vfm: VFM | None,
        feedback: bool | FSAConfig,
        *,
        cuda_graph: bool = False,
    ) -> None:
        if cuda_graph and loaded.device.type != "cuda":
            raise InputError(
                f"cuda_graph=True needs a CUDA device; the model is on {loaded.device}"
            )
        self.graphs = GraphCache(self.forward) if cuda_graph else None
        self.host_name = host_name
        self.host = host
        self.loaded = loaded
        self.vfm = vfm
        self.config = _resolve_feedback(feedback, vfm, loaded.name)
        self._feedback = feedback
        self._text = text
        # Made once, on the device: a copy from the host would wait for it in every picture.
        self._mean, self._std = (
            torch.tensor(channels, device=loaded.device)[:, None, None]
            for channels in (loaded.mean, loaded.std)
        )

    def with_feedback(self, feedback: bool | FSAConfig) -> Segmentor:
        """The same models with another configuration of feedback."""
        return self._like_this(self.host_name, self.host, self.vfm, feedback)

    def with_host(
        self,
        host: str | hosts.AttentionFunction,
        *,
        vfm: str | Callable[[Tensor], Tensor] | None = None,
        vfm_pretrained: bool | str | None = None,
        cache_dir: str | None = None,
    ) -> Segmentor:
        """The same CLIP model under another host; feedback=True stays the published one there.

        Args:
            host: as in `load_segmentor`.
            vfm: for "proxyclip": as in `load_segmentor`; default "layer".
            vfm_pretrained: weights of the vfm; see `fsa.models.guides.load_vfm`.
            cache_dir: where downloaded weights are kept.

        Raises:
            InputError, ModelUnavailableError: as `load_segmentor`.
        """
        name = _host_name(host)
        _check_vfm(host, vfm, vfm_pretrained)
        built = hosts.build(host, self.loaded.model.visual, backend=self.host.backend)
        proxy = None
        if built.needs_vfm:
            proxy = load_vfm(
                vfm if vfm is not None else LAYER,
                tower=built.tower,
                mean=self.loaded.mean,
                std=self.loaded.std,
                pretrained=vfm_pretrained,
                cache_dir=cache_dir,
            )
        return self._like_this(name, built, proxy, self._feedback)

    def _like_this(
        self, host_name: str, host: hosts.Host, vfm: VFM | None, feedback: bool | FSAConfig
    ) -> Segmentor:
        return Segmentor(
            host_name,
            host,
            self.loaded,
            self._text,
            vfm,
            feedback,
            cuda_graph=self.graphs is not None,
        )

    def check(
        self,
        classes: Classes,
        *,
        window: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
        prob_thd: float = 0.0,
        background: str | int | None = None,
        window_batch: int = 8,
    ) -> None:
        """Looks at arguments of `segment` without a picture.

        Raises:
            InputError: those that `segment` accepts with no picture.
        """
        self._sizes(window, stride, short_side)
        _check_window_batch(window_batch)
        named_background(parse_classes(classes), prob_thd, background)

    def segment(
        self,
        image: Any,
        classes: Classes,
        *,
        window: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
        prob_thd: float = 0.0,
        background: str | int | None = None,
        window_batch: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> Segmentation:
        """Labels every pixel of a picture with one of the classes.

        Args:
            image: a path, PIL image, array or tensor; see `fsa.pictures.reading.read_image`.
            classes: names, each a string or a list of synonyms.
            window: side of the sliding window in pixels of the resized picture; default 336, and
                112 for the embedded model.
            stride: from one window to the next; default 112, and 56 for the embedded model.
            short_side: to which the picture is resized first; default 336, and 224 for the
                embedded model.
            prob_thd: pixels whose best class has a lower probability become background.
            background: what they become: a class by number or by any of its names, or another
                name, which is added as a last class; default a class "background" if there is
                one, else added.
            window_batch: how many windows are computed at once; no influence on the result.
            progress: called with (windows done, windows in all).

        Raises:
            InputError: a picture or an argument that is not accepted.
            OutOfMemoryError: a working size or a batch of windows that does not fit.
        """
        start = time.perf_counter()
        sizes = self._sizes(window, stride, short_side)
        _check_window_batch(window_batch)
        picture = read_image(image)
        names, background_index = named_background(parse_classes(classes), prob_thd, background)
        queries = self._text.encode(classes)
        what = f"windows of {sizes.window} pixels, {window_batch} at once, on {self.loaded.device}"
        advice = "lower window_batch, window or short_side"
        with torch.inference_mode(), named_out_of_memory(what, advice):
            cosines = self._merged_cosines(picture, queries, sizes, window_batch, progress)
            labels = label_map(
                cosines, queries, tuple(picture.rgb.shape[-2:]), prob_thd, background_index
            )
            scores = class_probabilities(cosines, queries)
        # Waits for the device, so that the time is the whole one.
        labels, scores = labels.cpu().numpy(), scores.cpu().numpy()
        settings = {
            "fsa": fsa.__version__,
            "torch": torch.__version__,
            "host": self.host_name,
            "model": self.loaded.name,
            "pretrained": self.loaded.pretrained,
            "vfm": self.vfm.name if self.vfm else None,
            "feedback": self.config.to_dict() if self.config else None,
            "short_side": sizes.short_side,
            "window": sizes.window,
            "stride": sizes.stride,
            "prob_thd": prob_thd,
            "background": names[background_index] if background_index is not None else None,
            "classes": [list(c) if not isinstance(c, str) else [c] for c in classes],
            "backend": self.host.backend,
            "device": str(self.loaded.device),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - start, 3),
        }
        return Segmentation(
            labels=labels,
            scores=scores,
            class_names=list(names),
            settings=settings,
            picture=picture,
        )

    def attentions_at(
        self,
        image: Any,
        classes: Classes,
        patch: tuple[int, int],
        *,
        window: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
    ) -> PatchAttentions:
        """What one patch of a picture attends to, before and after feedback.

        Attention never leaves a window; of the windows that show the patch, this is the one whose
        middle is nearest to it.

        Args:
            image, classes, window, stride, short_side: as in `segment`.
            patch: row and column on the grid of patches of the resized picture, from 0.

        Raises:
            InputError: as `segment`; a patch that is not there; a segmentor without feedback.
        """
        if self.config is None:
            raise InputError("this segmentor has no feedback to look at: take with_feedback(True)")
        sizes = self._sizes(window, stride, short_side)
        working = self._working_image(read_image(image), sizes.short_side)
        height, width = working.shape[-2:]
        patch_height, patch_width = self.host.tower.patch_size
        rows, columns = math.ceil(height / patch_height), math.ceil(width / patch_width)
        if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
            raise InputError(
                f"patch={patch[0]},{patch[1]} is not in the picture: it has rows 0 to {rows - 1} "
                f"and columns 0 to {columns - 1} of patches"
            )
        y = min((patch[0] + 0.5) * patch_height, height - 1)
        x = min((patch[1] + 0.5) * patch_width, width - 1)
        parts = windows.plan(height, width, sizes.window, sizes.stride)
        part = min(parts, key=lambda w: math.hypot(*_from_middle(w, y, x)))

        queries = self._text.encode(classes)
        padded, (top, left) = self._padded(working[(slice(None), *part.slices)][None])
        vfm_features, tokens = self._vfm_features(padded)
        seen = attentions(
            self.host,
            padded,
            queries.features,
            vfm_features=vfm_features,
            tokens=tokens,
            config=self.config,
        )
        grid = self.host.grid(*padded.shape[-2:], vfm_features)
        at = (
            int((y - part.top + top) * grid[0] / padded.shape[-2]),
            int((x - part.left + left) * grid[1] / padded.shape[-1]),
        )
        index = at[0] * grid[1] + at[1]
        rows_of = (m[0, index].unflatten(0, grid) for m in (seen.host, seen.feedback, seen.adapted))
        host, feedback, adapted = (row.float().cpu().numpy() for row in rows_of)
        return PatchAttentions(
            size=(height, width),
            area=windows.Window(part.top - top, part.left - left, *padded.shape[-2:]),
            patch=at,
            host=host,
            feedback=feedback,
            adapted=adapted,
        )

    def _sizes(self, window: int | None, stride: int | None, short_side: int | None) -> _Protocol:
        default = _TINY if self.loaded.name == TINY else _PAPER
        window = default.window if window is None else window
        sizes = _Protocol(
            short_side=default.short_side if short_side is None else short_side,
            window=window,
            stride=min(default.stride, window) if stride is None else stride,
        )
        patch = max(self.host.tower.patch_size)
        for name, value, least, most in (
            ("window", sizes.window, patch, _LARGEST_SIDE),
            ("stride", sizes.stride, 1, sizes.window),
            ("short_side", sizes.short_side, patch, _LARGEST_SIDE),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"{name}={value!r} must be an integer from {least} to {most}")
        return sizes

    def _merged_cosines(
        self,
        picture: Picture,
        queries: TextQueries,
        sizes: _Protocol,
        window_batch: int,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Cosines (Q,h,w) at the working size, averaged over the windows."""
        image = self._working_image(picture, sizes.short_side)
        height, width = image.shape[-2:]
        parts = windows.plan(height, width, sizes.window, sizes.stride)
        merger = windows.WindowMerger(len(queries.features), height, width, image.device)
        for first in range(0, len(parts), window_batch):
            batch = parts[first : first + window_batch]
            crops = torch.stack([image[(slice(None), *part.slices)] for part in batch])
            for part, cosines in zip(batch, self.window_cosines(crops, queries), strict=True):
                merger.add(part, cosines)
            if progress is not None:
                progress(min(first + window_batch, len(parts)), len(parts))
        return merger.mean()

    def _working_image(self, picture: Picture, short_side: int) -> Tensor:
        """The picture resized and normalised, (3,h,w) float32 on the model's device."""
        height, width = picture.rgb.shape[-2:]
        scale = short_side / min(height, width)
        size = tuple(min(_LARGEST_SIDE, max(1, round(side * scale))) for side in (height, width))
        device = self.loaded.device
        image = picture.rgb.to(device).float()[None] / 255
        if size != (height, width):
            image = functional.interpolate(image, size=size, mode="bilinear", antialias=True)
        return self.normalise(image[0])

    @torch.no_grad()
    def forward(self, windows: Tensor, text_features: Tensor) -> Tensor:
        """The whole computation of one batch of windows, for `torch.compile` and the like.

        Args:
            windows: (B,3,H,W), normalised with the model's mean and deviation, in its type and on
                its device; H and W multiples of the patch sizes of the model and of the vfm.
            text_features: (Q,E) float32, of unit length.

        Returns:
            Cosines (B,Q,rows,columns) float32, on the host's grid.

        Raises:
            InputError: as `Host.features`.
        """
        vfm_features, tokens = self._vfm_features(windows)
        features = self.host.features(
            windows, text_features, vfm_features=vfm_features, tokens=tokens, config=self.config
        )
        unit = features.float()
        if not self.host.compared_as_they_are:
            unit = functional.normalize(unit, dim=-1)
        grid = self.host.grid(*windows.shape[-2:], vfm_features)
        return (unit @ text_features.T).transpose(1, 2).unflatten(2, grid)

    def encode(self, classes: Classes, *, allow_repeats: bool = False) -> TextQueries:
        """The text queries of a class list; see `fsa.models.text.TextEncoder.encode`."""
        return self._text.encode(classes, allow_repeats=allow_repeats)

    def normalise(self, image: Tensor) -> Tensor:
        """A picture (3,h,w) in [0, 1] as CLIP takes it, by its mean and deviation."""
        return (image - self._mean.to(image.device)) / self._std.to(image.device)

    def window_cosines(self, crops: Tensor, queries: TextQueries) -> Iterator[Tensor]:
        """Cosines (Q,h,w) of each of the windows (B,3,h,w), upsampled to their size.

        Args:
            crops: normalised, on the model's device; they may be of several pictures.
            queries: from `encode`.
        """
        height, width = crops.shape[-2:]
        padded, (top, left) = self._padded(crops)
        forward = self.forward if self.graphs is None else self.graphs
        cosines = forward(padded, queries.features)
        # One window at a time: at full size all of them, for all queries, are large.
        for maps in cosines.split(1):
            maps = functional.interpolate(maps, size=padded.shape[-2:], mode="bilinear")
            yield maps[0, :, top : top + height, left : left + width]

    def _vfm_features(self, windows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the vfm makes of windows, and CLIP's tokens where they come with it."""
        return self.vfm.with_trunk(windows, self.host.tower) if self.vfm else (None, None)

    def _padded(self, crops: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Windows padded to whole patches, in the model's type, and where they begin in that."""
        of_vfm = self.vfm.multiple if self.vfm else 1
        multiple = tuple(math.lcm(side, of_vfm) for side in self.host.tower.patch_size)
        padded, corner = windows.pad_to_multiple(crops, multiple)
        return padded.to(self.loaded.dtype), corner


def _from_middle(window: windows.Window, y: float, x: float) -> tuple[float, float]:
    return window.top + window.height / 2 - y, window.left + window.width / 2 - x


def _host_name(host: str | hosts.AttentionFunction) -> str:
    return host if isinstance(host, str) else getattr(host, "__name__", type(host).__name__)


def _check_vfm(
    host: str | hosts.AttentionFunction,
    vfm: str | Callable[[Tensor], Tensor] | None,
    vfm_pretrained: bool | str | None,
) -> None:
    if hosts.host_class(host).needs_vfm:
        return
    name = _host_name(host)
    if vfm is not None:
        raise InputError(f"vfm was given, but host {name!r} takes none; it is for 'proxyclip'")
    if vfm_pretrained is not None:
        raise InputError(
            f"vfm_pretrained was given, but host {name!r} takes no vfm; it is for 'proxyclip'"
        )


def _resolve_feedback(feedback: bool | FSAConfig, vfm: VFM | None, model: str) -> FSAConfig | None:
    if isinstance(feedback, FSAConfig):
        return feedback
    if not isinstance(feedback, bool):
        raise InputError(
            f"feedback must be True, False or an FSAConfig, not {type(feedback).__name__}"
        )
    return FSAConfig.preset(vfm=vfm.name if vfm else None, model=model) if feedback else None


def _check_window_batch(window_batch: int) -> None:
    if isinstance(window_batch, bool) or not isinstance(window_batch, int) or window_batch < 1:
        raise InputError(f"window_batch={window_batch!r} must be an integer >= 1")
