"""From a picture and class names to labels: the whole pipeline, and its result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fsa
from fsa import hosts
from fsa.arguments import integer_within
from fsa.classes import Classes, parse_classes
from fsa.config import SEGMENTATION_SCALE, FSAConfig, logit_scale_factor
from fsa.errors import FSAError, InputError
from fsa.models.guides import LAYER, VFM
from fsa.models.loading import TINY, LoadedModel
from fsa.models.text import Progress, TextEncoder, TextQueries
from fsa.models.text_cache import user_text_cache
from fsa.pictures.ahead import read_ahead
from fsa.pictures.reading import read_image
from fsa.segment.assembly import (
    check_vfm,
    host_name,
    host_with_vfm,
    loaded_model,
    resolve_feedback,
)
from fsa.segment.inspection import PatchAttentions, WindowAttentions, window_attentions
from fsa.segment.labels import Choice, named_background
from fsa.segment.model import WindowModel
from fsa.segment.pipeline import Checked, Job, WindowProgress, segmentations
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
    host_options: Mapping[str, Any] | None = None,
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
        host_options: what `fsa.hosts.build` takes for this host, such as {"key_weight": 0.3} for
            "pearl"; default as published.
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
        options=host_options,
        backend=backend,
        cache_dir=cache_dir,
    )
    # Raises here, before any picture, where the backend cannot run.
    fsa.explain(device=loaded.device, dtype=loaded.dtype, backend=backend)
    text = TextEncoder(loaded, user_text_cache() if cache_text else None)
    return Segmentor(host_name(host), built, loaded, text, guide, feedback, cuda_graph=cuda_graph)


class Segmentor(WindowModel):
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
        super().__init__(
            host, loaded, vfm, resolve_feedback(feedback, vfm, loaded), cuda_graph=cuda_graph
        )
        self.host_name = host_name
        self.logit_scale = SEGMENTATION_SCALE * logit_scale_factor(loaded.temperature)
        self._feedback = feedback
        self._text = text

    def with_feedback(self, feedback: bool | FSAConfig) -> Segmentor:
        """The same models with another configuration of feedback."""
        return self._like_this(self.host_name, self.host, self.vfm, feedback)

    def with_host(
        self,
        host: str | hosts.AttentionFunction,
        *,
        host_options: Mapping[str, Any] | None = None,
        vfm: str | Callable[[Tensor], Tensor] | None = None,
        vfm_pretrained: bool | str | None = None,
        cache_dir: str | None = None,
    ) -> Segmentor:
        """A segmentor with the same CLIP model and another host. If feedback was True, the new host
        gets its own published configuration.

        Args:
            host, host_options: as in `load_segmentor`.
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
            options=host_options,
            backend=self.host.backend,
            cache_dir=cache_dir,
        )
        return self._like_this(host_name(host), built, guide, self._feedback)

    def _like_this(
        self, host_name: str, host: hosts.Host, vfm: VFM | None, feedback: bool | FSAConfig
    ) -> Segmentor:
        captured = self.graphs is not None
        return Segmentor(
            host_name, host, self.loaded, self._text, vfm, feedback, cuda_graph=captured
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
        checked = self._checked(
            classes, window, stride, short_side, prob_thd, background, window_batch
        )
        return checked.settings

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
        on_device: bool = False,
        progress: Progress | None = None,
        text_progress: Progress | None = None,
    ) -> Segmentation:
        """Labels every pixel of a picture with one of the classes.

        A picture whose cosines would not fit at the working size is merged and labelled strip by
        strip.

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
            on_device: leaves labels and scores on the model's device, for `label_tensor` and
                `score_tensor`.
            progress: called with (windows done, windows in all).
            text_progress: called with (texts done, texts in all), as by `TextEncoder.encode`.

        Raises:
            InputError: a picture or an argument that is not accepted.
            OutOfMemoryError: a working size or a batch of windows that does not fit.
        """
        started = time.perf_counter()
        # What is not accepted is said before a picture is read, and before texts are encoded.
        checked = self._checked(
            classes, window, stride, short_side, prob_thd, background, window_batch
        )
        picture = read_image(image)
        job = self._job(checked, classes, on_device, text_progress)
        of_one = None if progress is None else lambda _, done, total: progress(done, total)
        (result,) = segmentations(job, [picture], progress=of_one, started=started)
        if isinstance(result, FSAError):
            raise result
        return result

    def segment_many(
        self,
        pictures: Iterable[Any],
        classes: Classes,
        *,
        window: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
        prob_thd: float = 0.0,
        background: str | int | None = None,
        window_batch: int = 8,
        on_device: bool = False,
        progress: WindowProgress | None = None,
        text_progress: Progress | None = None,
    ) -> Iterator[Segmentation | FSAError]:
        """Segments many pictures, in their order; one that fails does not stop the others.

        Files are read in the background, and a batch of windows is filled across pictures, so that
        a result comes when the batch with its last window is computed. A few pictures are in memory
        at a time. Each result equals that of `segment` to the rounding of another batch.

        Args:
            pictures: each as `segment` takes it; may be endless.
            classes, window, stride, short_side, prob_thd, background, window_batch, on_device: as
                in `segment`.
            progress: called with (number of the picture from 0, its windows done, its windows in
                all).
            text_progress: as in `segment`; texts are encoded before this returns.

        Yields:
            For each picture its segmentation, or the error that it failed with.

        Raises:
            InputError: an argument that no picture is accepted with.
        """
        if isinstance(pictures, (str, os.PathLike)):
            raise InputError(
                f"pictures={str(pictures)!r} must be several; for a folder pass "
                "fsa.pictures.reading.list_pictures([folder])"
            )
        checked = self._checked(
            classes, window, stride, short_side, prob_thd, background, window_batch
        )
        job = self._job(checked, classes, on_device, text_progress)
        return segmentations(job, read_ahead(pictures), progress=progress)

    def _checked(
        self,
        classes: Classes,
        window: int | None,
        stride: int | None,
        short_side: int | None,
        prob_thd: float,
        background: str | int | None,
        window_batch: int,
    ) -> Checked:
        """What the arguments of `segment` mean; raises InputError for those not accepted."""
        sizes = self.sizes(window, stride, short_side)
        integer_within("window_batch", window_batch, 1)
        names, background_index = named_background(parse_classes(classes), prob_thd, background)
        settings = {
            "host": self.host_name,
            "host_options": self.host.options,
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
        return Checked(names, background_index, sizes, window_batch, settings)

    def _job(
        self,
        checked: Checked,
        classes: Classes,
        on_device: bool,
        text_progress: Progress | None,
    ) -> Job:
        """What is done with every picture; encodes the texts."""
        queries = self._text.encode(classes, progress=text_progress)
        settings = checked.settings
        return Job(
            segmentor=self,
            queries=queries,
            names=checked.names,
            sizes=checked.sizes,
            choice=Choice(
                queries, settings["prob_thd"], checked.background_index, self.logit_scale
            ),
            window_batch=checked.window_batch,
            settings={"fsa": fsa.__version__, "torch": torch.__version__, **settings},
            on_device=on_device,
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
        sizes = self.sizes(window, stride, short_side)
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

    def sizes(
        self, window: int | None = None, stride: int | None = None, short_side: int | None = None
    ) -> Sizes:
        """The sizes that `segment` takes: those given, and the defaults of the model for others.

        Raises:
            InputError: a size that is not accepted.
        """
        default = TINY_SIZES if self.loaded.name == TINY else PAPER_SIZES
        return default.override(window, stride, short_side, max(self.host.tower.patch_size))

    def encode(self, classes: Classes, *, allow_repeats: bool = False) -> TextQueries:
        """The text queries of a class list; see `fsa.models.text.TextEncoder.encode`."""
        return self._text.encode(classes, allow_repeats=allow_repeats)
