"""From a picture and class names to labels: the whole pipeline, and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fsa
from fsa import hosts
from fsa.arguments import integer_within
from fsa.classes import Classes, parse_classes
from fsa.config import SEGMENTATION_SCALE, FSAConfig, logit_scale_factor
from fsa.errors import InputError, named_out_of_memory
from fsa.models.guides import LAYER, VFM
from fsa.models.loading import TINY, LoadedModel
from fsa.models.text import Progress, TextEncoder, TextQueries
from fsa.models.text_cache import user_text_cache
from fsa.ops.checks import autocast_off
from fsa.pictures import windows
from fsa.pictures.reading import read_image
from fsa.segment.assembly import (
    check_vfm,
    host_name,
    host_with_vfm,
    loaded_model,
    resolve_feedback,
)
from fsa.segment.graphs import GraphCache
from fsa.segment.inspection import PatchAttentions, WindowAttentions, window_attentions
from fsa.segment.labels import class_probabilities, label_map, named_background, require_finite
from fsa.segment.result import Segmentation
from fsa.segment.sizes import PAPER_SIZES, TINY_SIZES, Sizes, resized

_DEFAULT_VFM = "dino"


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
    cache_text: bool = True,
) -> Segmentor:
    """A segmentor for any class names.

    Args:
        host: one of `fsa.hosts.names()`, or a function that returns the attention between patches;
            see `fsa.hosts.build`.
        model: "tiny", the embedded model, or a name of open_clip's such as "ViT-B-16"; or a
            `CLIPModel`, `SiglipModel` or another that `fsa.models.transformers.from_transformers`
            takes, with its `processor`.
        pretrained: a tag of open_clip's or the path of a checkpoint; see
            `fsa.models.loading.load_model`.
        vfm: for "proxyclip" only: see `fsa.models.guides.load_vfm`; default "dino", and for the
            embedded model "layer", which needs no second model.
        feedback: True for the published configuration, False for the baseline without feedback, or
            a configuration.
        device: default the GPU if there is one, else the CPU; of a model that is passed as an
            object, where it is.
        dtype: default float16 on a GPU and float32 on the CPU, or "auto" for the fastest, see
            `fsa.models.loading.load_model`; of a model that is passed as an object, what it is.
        backend: of the ops: "auto", "triton" or "torch".
        cache_dir: where downloaded weights are kept.
        vfm_pretrained: weights of the vfm; see `fsa.models.guides.load_vfm`.
        processor: of a model of transformers: its `CLIPProcessor` or `SiglipProcessor`.
        cuda_graph: on a GPU, captures the forward once for each shape of a batch of windows and
            number of queries, and replays it; at most 8 graphs are kept.
        cache_text: keeps the text features of class names on the disk for the next process, in
            `fsa.models.text_cache.cache_folder`.

    Raises:
        InputError: an argument that is not accepted.
        ModelUnavailableError: weights that are not there or cannot be fetched.
    """
    check_vfm(host, vfm, vfm_pretrained)
    loaded = loaded_model(
        model, pretrained, processor, device=device, dtype=dtype, cache_dir=cache_dir
    )
    default_vfm = LAYER if loaded.name == TINY else _DEFAULT_VFM
    built, guide = host_with_vfm(
        host,
        loaded,
        default_vfm if vfm is None else vfm,
        vfm_pretrained,
        backend=backend,
        cache_dir=cache_dir,
    )
    # Raises here, before any picture, where the backend cannot run.
    fsa.explain(device=loaded.device, dtype=loaded.dtype, backend=backend)
    text = TextEncoder(loaded, user_text_cache() if cache_text else None)
    return Segmentor(host_name(host), built, loaded, text, guide, feedback, cuda_graph=cuda_graph)


class Segmentor:
    """Segments pictures into any classes; made by `load_segmentor`.

    Attributes:
        host_name: as `load_segmentor` took it; of a function, its name.
        host: the module behind it.
        loaded: the CLIP model.
        vfm: ProxyCLIP's other model, or None.
        config: how feedback is computed, or None for the baseline.
        logit_scale: of the merged cosines before the softmax over queries.
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
        self.host_name, self.host = host_name, host
        self.loaded, self.vfm = loaded, vfm
        self.config = resolve_feedback(feedback, vfm, loaded)
        self.logit_scale = SEGMENTATION_SCALE * logit_scale_factor(loaded.temperature)
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
        """A segmentor with the same CLIP model and another host. If feedback was True, the new host
        gets its own published configuration.

        Args:
            host: as in `load_segmentor`.
            vfm: for "proxyclip": as in `load_segmentor`; default "layer".
            vfm_pretrained: weights of the vfm; see `fsa.models.guides.load_vfm`.
            cache_dir: where downloaded weights are kept.

        Raises:
            InputError, ModelUnavailableError: as `load_segmentor`.
        """
        check_vfm(host, vfm, vfm_pretrained)
        built, guide = host_with_vfm(
            host,
            self.loaded,
            LAYER if vfm is None else vfm,
            vfm_pretrained,
            backend=self.host.backend,
            cache_dir=cache_dir,
        )
        return self._like_this(host_name(host), built, guide, self._feedback)

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

    def settings(
        self,
        classes: Classes,
        *,
        window: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
        prob_thd: float = 0.0,
        background: str | int | None = None,
        window_batch: int = 8,
    ) -> dict[str, Any]:
        """What `segment` does with these arguments, as plain values, without doing it.

        Raises:
            InputError: arguments that `segment` accepts with no picture.
        """
        sizes = self._sizes(window, stride, short_side)
        integer_within("window_batch", window_batch, 1)
        names, background_index = named_background(parse_classes(classes), prob_thd, background)
        return {
            "host": self.host_name,
            "model": self.loaded.name,
            "pretrained": self.loaded.pretrained,
            "vfm": self.vfm.name if self.vfm else None,
            "feedback": self.config.to_dict() if self.config else None,
            "short_side": sizes.short_side,
            "window": sizes.window,
            "stride": sizes.stride,
            "prob_thd": float(prob_thd),
            "background": names[background_index] if background_index is not None else None,
            "classes": [list(c) if not isinstance(c, str) else [c] for c in classes],
            "backend": self.host.backend,
            "device": str(self.loaded.device),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
        }

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
        progress: Progress | None = None,
        text_progress: Progress | None = None,
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
            window_batch: how many windows are computed at once; it does not change the result.
            progress: called with (windows done, windows in all).
            text_progress: called with (texts done, texts in all), as by `TextEncoder.encode`.

        Raises:
            InputError: a picture or an argument that is not accepted.
            OutOfMemoryError: a working size or a batch of windows that does not fit.
        """
        start = time.perf_counter()
        sizes = self._sizes(window, stride, short_side)
        integer_within("window_batch", window_batch, 1)
        picture = read_image(image)
        names, background_index = named_background(parse_classes(classes), prob_thd, background)
        queries = self._text.encode(classes, progress=text_progress)
        what = f"windows of {sizes.window} pixels, {window_batch} at once, on {self.loaded.device}"
        memory = named_out_of_memory(what, "lower window_batch, window or short_side")
        with torch.inference_mode(), memory, self.loaded.naming(picture.label):
            image = self.normalise(resized(picture, sizes.short_side, self.loaded.device))
            cosines = windows.merged(
                image,
                lambda crops: self.window_cosines(crops, queries),
                len(queries.features),
                windows.plan(image.shape[-2], image.shape[-1], sizes.window, sizes.stride),
                window_batch,
                progress,
            )
            label_tensor = label_map(
                cosines,
                queries,
                (picture.rgb.shape[-2], picture.rgb.shape[-1]),
                prob_thd,
                background_index,
                scale=self.logit_scale,
            )
            # Waits for the device, so that the time is the whole one.
            labels = label_tensor.cpu().numpy()
            require_finite(cosines)
            compute_scores = partial(class_probabilities, cosines.cpu(), queries, self.logit_scale)
        settings = {
            "fsa": fsa.__version__,
            "torch": torch.__version__,
            **self.settings(
                classes,
                window=window,
                stride=stride,
                short_side=short_side,
                prob_thd=prob_thd,
                background=background,
            ),
            "seconds": round(time.perf_counter() - start, 3),
        }
        return Segmentation(labels, compute_scores, list(names), settings, picture)

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

        Args, Raises: as `window_attentions`.
        """
        seen = self.window_attentions(
            image, classes, patch, window=window, stride=stride, short_side=short_side
        )
        return seen.of_patch()

    def window_attentions(
        self,
        image: Any,
        classes: Classes,
        patch: tuple[int, int] | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
        max_patches: int | None = None,
    ) -> WindowAttentions:
        """What the patches of a window attend to, before and after feedback.

        Attention never leaves a window; of the windows that show the patch, this is the one whose
        middle is nearest to it.

        Args:
            image, classes, window, stride, short_side: as in `segment`.
            patch: row and column on the grid of patches of the resized picture, from 0; default
                the patch in the middle.
            max_patches: a window with more is refused before its attention is computed.

        Raises:
            InputError: as `segment`; a patch that is not there; too many patches; a segmentor
                without feedback.
        """
        if self.config is None:
            raise InputError("this segmentor has no feedback to look at: take with_feedback(True)")
        sizes = self._sizes(window, stride, short_side)
        picture = read_image(image)
        working = self.normalise(resized(picture, sizes.short_side, self.loaded.device))
        queries = self._text.encode(classes)
        with self.loaded.naming(picture.label):
            return window_attentions(
                self, working, queries.features, patch, sizes, max_patches=max_patches
            )

    def explore(self, image: Any, classes: Classes, out: str | Path, **options: Any) -> Path:
        """Writes one HTML page to look into feedback; see `fsa.showcase.explorer.explore`."""
        # The explorer is made of segmentors, so it can only be imported when it is asked for.
        from fsa.showcase.explorer import explore

        return explore(self, image, classes, out, **options)

    def _sizes(self, window: int | None, stride: int | None, short_side: int | None) -> Sizes:
        default = TINY_SIZES if self.loaded.name == TINY else PAPER_SIZES
        return default.override(window, stride, short_side, max(self.host.tower.patch_size))

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
        # The model runs in its own type, which under torch.autocast would be lost on the way.
        with autocast_off(windows):
            vfm_features, tokens = self.vfm_features(windows)
            features = self.host.features(
                windows, text_features, vfm_features=vfm_features, tokens=tokens, config=self.config
            )
            unit = features.float()
            if not self.host.compared_as_they_are:
                unit = functional.normalize(unit, dim=-1)
            grid = self.host.grid(windows.shape[-2], windows.shape[-1], vfm_features)
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
        padded, (top, left) = self.padded(crops)
        forward = self.forward if self.graphs is None else self.graphs
        cosines = forward(padded, queries.features)
        # One window at a time: at full size all of them, for all queries, are large.
        for maps in cosines.split(1):
            maps = functional.interpolate(maps, size=padded.shape[-2:], mode="bilinear")
            yield maps[0, :, top : top + height, left : left + width]

    def vfm_features(self, windows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the vfm makes of windows, and CLIP's tokens where they come with it."""
        return self.vfm.with_trunk(windows, self.host.tower) if self.vfm else (None, None)

    def padded(self, crops: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Windows padded to whole patches, in the model's type, and where they begin in that."""
        of_vfm = self.vfm.multiple if self.vfm else 1
        rows, columns = (math.lcm(side, of_vfm) for side in self.host.tower.patch_size)
        padded, corner = windows.pad_to_multiple(crops, (rows, columns))
        return padded.to(self.loaded.dtype), corner
