"""An evaluation: every picture labelled once, by one process or by many, in one matrix."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import fsa
from fsa.config import logit_scale_factor
from fsa.errors import InputError, NotFiniteError, named_out_of_memory
from fsa.evaluation import fingerprint, locking, processes, state
from fsa.evaluation.datasets import Dataset
from fsa.evaluation.loading import Loaded, Normalisation, loader
from fsa.evaluation.metrics import ConfusionMatrix
from fsa.evaluation.protocol import Preset, Protocol
from fsa.evaluation.refinement import pixel_adaptive_refinement, text_aware_propagation
from fsa.evaluation.result import Result
from fsa.files import make_directory
from fsa.models.text import TextQueries
from fsa.segment.batching import merged_cosines, whole_cosines
from fsa.segment.labels import label_map
from fsa.segment.segmentor import Segmentor

ON_ERROR = ("stop", "skip")

_SECONDS_BETWEEN_SAVES = 5.0


def evaluate(
    segmentor: Segmentor,
    dataset: Dataset,
    preset: Preset,
    out: Path,
    *,
    window_batch: int = 8,
    chunk: int | None = None,
    workers: int = 2,
    on_error: str = "stop",
    restart: bool = False,
    quiet: bool = False,
    vfm_pretrained: str | None = None,
    announce: Callable[[Protocol], None] | None = None,
) -> Result:
    """Labels every picture of a dataset and compares it with its mask.

    Work is done in chunks of pictures that lie next to each other. Windows are batched within a
    chunk, so the same numbers are multiplied together whichever process does it and however often
    the run was stopped: the matrix is the same, integer for integer. Run under torchrun, the
    chunks are dealt out to the processes.

    Args:
        segmentor: what labels.
        dataset: what is labelled.
        preset: how; see `fsa.evaluation.protocol`.
        out: directory of the results and of what is needed to go on after being killed.
        window_batch: windows per forward pass.
        chunk: pictures per unit of work; default as many as `window_batch`.
        workers: processes that decode, for each process that computes.
        on_error: "stop" at a file that cannot be used, or "skip" it and say so in the result. A
            run that stopped may go on with "skip".
        restart: throw away what an earlier run has counted.
        quiet: no progress.
        vfm_pretrained: for the protocol's record.
        announce: called with the protocol by the first process, before any work.

    Raises:
        InputError: a file that cannot be used, with on_error="stop", by name; an `out` in which
            another evaluation is running, or that holds one under another protocol or of files
            that have changed since; an argument that is not accepted.
    """
    chunk = window_batch if chunk is None else chunk
    for name, value, least in (
        ("window_batch", window_batch, 1),
        ("chunk", chunk, 1),
        ("workers", workers, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r} must be an integer >= {least}")
    if on_error not in ON_ERROR:
        raise InputError(f"on_error={on_error!r} must be one of {ON_ERROR}")
    _check_sizes(segmentor, preset)
    group = processes.current()
    make_directory(out)
    with locking.exclusive(out, group):
        quiet = quiet or group.rank > 0
        protocol = _protocol(segmentor, dataset, preset, window_batch, chunk, vfm_pretrained, quiet)
        if announce is not None and group.rank == 0:
            announce(protocol)
        run = _Run(segmentor, dataset, preset, protocol, out, group, quiet)
        run.resume(restart)
        run.work(workers, skip=on_error == "skip")
        return run.finish()


class _Run:
    """One process's share of an evaluation."""

    def __init__(
        self,
        segmentor: Segmentor,
        dataset: Dataset,
        preset: Preset,
        protocol: Protocol,
        out: Path,
        group: processes.Group,
        quiet: bool,
    ) -> None:
        self.segmentor = segmentor
        loaded = segmentor.loaded
        self.normalise = Normalisation(loaded.mean, loaded.std, loaded.device)
        self.dataset = dataset
        self.preset = preset
        self.protocol = protocol
        self.record = protocol.to_dict()
        self.out = out
        self.group = group
        self.quiet = quiet
        self.file = state.state_file(out, group.rank)
        self.own = state.State.empty(len(dataset.classes))
        self.earlier = state.State.empty(len(dataset.classes))
        self.remaining: list[int] = []
        self.saved_at = 0.0

    def resume(self, restart: bool) -> None:
        """Finds out what is done, and which chunks are this process's."""
        if restart and self.group.rank == 0:
            for file in state.state_files(self.out):
                file.unlink()
        self.group.barrier()
        if self.file.exists():
            self.own = self._load(self.file)
        if self.group.rank == 0:
            # Of processes that this run does not have.
            ours = {state.state_file(self.out, rank) for rank in range(self.group.size)}
            for file in state.state_files(self.out):
                if file not in ours:
                    self.earlier.merge(self._load(file))
        shares = self.group.gather(self.own.chunks | self.earlier.chunks)
        done = set().union(*shares)
        if sum(map(len, shares)) != len(done):
            raise InputError(f"{self.out}: a chunk was counted by two processes: use --restart")
        count = -(-len(self.dataset.samples) // self.protocol.chunk)
        open_chunks = [number for number in range(count) if number not in done]
        self.remaining = open_chunks[self.group.rank :: self.group.size]
        if done and not self.quiet:
            pictures = sum(len(self.pictures_of(number)) for number in done)
            print(
                f"going on after {pictures} of {len(self.dataset.samples)} pictures",
                file=sys.stderr,
            )

    def _load(self, file: Path) -> state.State:
        """A state of which every counted file is still what it was.

        Raises:
            InputError: as `state.load`; a picture or a mask that has changed.
        """
        loaded = state.load(file, self.record)
        for number, counted in loaded.contents.items():
            for what, before, now in zip(
                ("picture", "mask"), counted, self._contents_of(number), strict=True
            ):
                if before != now:
                    raise InputError(self._changed(what, number))
        return loaded

    def _contents_of(self, chunk: int) -> tuple[str, str]:
        samples = [self.dataset.samples[index] for index in self.pictures_of(chunk)]
        return (
            fingerprint.of_files(sample.image for sample in samples),
            fingerprint.of_files(sample.mask for sample in samples),
        )

    def _changed(self, what: str, chunk: int) -> str:
        samples = [self.dataset.samples[index] for index in self.pictures_of(chunk)]
        paths = [sample.image if what == "picture" else sample.mask for sample in samples]
        return (
            f"{self.out} holds an evaluation of other files: {what}s have changed since they were "
            f"counted, such as {fingerprint.newest(paths)}. Pass another --out, or --restart to "
            "count them again."
        )

    def pictures_of(self, chunk: int) -> range:
        size = self.protocol.chunk
        return range(chunk * size, min((chunk + 1) * size, len(self.dataset.samples)))

    def work(self, workers: int, skip: bool) -> None:
        """Counts this process's chunks, without the pictures that cannot be if `skip`."""
        indices = [index for number in self.remaining for index in self.pictures_of(number)]
        if not indices:
            return
        # Before the first is read: what changes while it is read was not counted as it is now.
        contents = {number: self._contents_of(number) for number in self.remaining}
        queries = self.segmentor.encode(self.dataset.classes, allow_repeats=True)
        device = self.segmentor.loaded.device
        share = f"process 1 of {self.group.size}: " if self.group.size > 1 else ""
        bar = tqdm(
            total=len(indices),
            unit="picture",
            desc=f"{share}{self.dataset.name}",
            disable=self.quiet,
            smoothing=0.05,
            file=sys.stderr,
        )
        loaded = iter(loader(self.dataset, indices, self.preset, workers, device.type == "cuda"))
        self.saved_at = started = time.monotonic()
        before = self.own.seconds
        with bar, torch.inference_mode():
            try:
                for number in self.remaining:
                    self._count(number, loaded, queries, bar, skip)
                    self.own.contents[number] = contents[number]
                    self.own.seconds = before + time.monotonic() - started
                    if time.monotonic() - self.saved_at > _SECONDS_BETWEEN_SAVES:
                        self._save()
            finally:
                # A run that counted nothing leaves nothing that another one must agree with.
                if self.own.contents:
                    self._save()

    def _count(
        self, number: int, loaded: Iterator[Loaded], queries: TextQueries, bar: tqdm, skip: bool
    ) -> None:
        """Counts a chunk; what is known of it counts only when it is whole."""
        device = self.segmentor.loaded.device
        matrix = ConfusionMatrix(len(self.dataset.classes), device)
        masks: dict[int, Tensor] = {}
        colours: dict[int, Tensor] = {}
        skipped: dict[str, str] = {}
        finite: dict[int, Tensor] = {}
        refined = self.preset.pamr_steps or self.preset.propagation_grid

        def images() -> Iterator[tuple[int, Tensor]]:
            for _ in self.pictures_of(number):
                item = next(loaded)
                if item.error:
                    if not skip:
                        raise InputError(item.error)
                    skipped[self.dataset.samples[item.index].name] = item.error
                    bar.update()
                    continue
                assert item.image is not None
                assert item.mask is not None
                masks[item.index] = item.mask.to(device, non_blocking=True)
                image = self.normalise(item.image.to(device, non_blocking=True))
                if refined:
                    colours[item.index] = image
                yield item.index, image

        pictures = 0
        try:
            for index, cosines in self._cosines(images(), queries):
                mask = masks.pop(index)
                size = (mask.shape[0], mask.shape[1])
                if refined:
                    cosines = self._refined(cosines, colours.pop(index), queries, size)
                finite[index] = cosines.isfinite().all()
                matrix.add(self._labels(cosines, queries, size), mask)
                pictures += 1
                bar.update()
        except NotFiniteError:
            # Of the pictures in hand; which of them cannot be told where windows share a batch.
            waiting = ", ".join(self.dataset.samples[index].name for index in masks)
            raise self.segmentor.loaded.not_finite(waiting) from None
        counts = matrix.counts().numpy()
        # Only here, where the counts have come to the host and nothing is waited for.
        for index, whole in finite.items():
            if not bool(whole):
                raise self.segmentor.loaded.not_finite(self.dataset.samples[index].name)
        self.own.counts += counts
        self.own.pictures += pictures
        self.own.skipped |= skipped

    def _cosines(
        self, images: Iterator[tuple[int, Tensor]], queries: TextQueries
    ) -> Iterator[tuple[int, Tensor]]:
        """The number and the cosines (Q,h,w) of each picture, at its working size."""
        if self.preset.whole:
            return whole_cosines(self.segmentor, images, queries)
        return merged_cosines(
            self.segmentor,
            images,
            queries,
            self.preset.window,
            self.preset.stride,
            self.protocol.window_batch,
        )

    def _refined(
        self, cosines: Tensor, image: Tensor, queries: TextQueries, size: tuple[int, int]
    ) -> Tensor:
        """Cosines (Q,H,W) at a picture's own size, refined by its colours."""
        steps, grid = self.preset.pamr_steps, self.preset.propagation_grid
        what = f"refining {len(cosines)} maps of {size[0]} x {size[1]} pixels"
        with named_out_of_memory(what, "pass --pamr-steps 0 --propagation-grid 0"):
            maps, image = (
                functional.interpolate(x[None], size=size, mode="bilinear")[0]
                for x in (cosines, image)
            )
            if steps:
                maps = pixel_adaptive_refinement(maps, image, steps)
            if grid:
                maps = text_aware_propagation(maps, image, queries.features, grid)
            return maps

    def _labels(self, cosines: Tensor, queries: TextQueries, size: tuple[int, int]) -> Tensor:
        """Labels (H,W) at a picture's own size."""
        return label_map(
            cosines,
            queries,
            size,
            self.preset.prob_thd,
            self.protocol.background if self.preset.prob_thd > 0 else None,
            # Of a model trained with a sigmoid, whose cosines are of another temperature.
            scale=self.preset.logit_scale * logit_scale_factor(self.segmentor.loaded.temperature),
            area_thd=self.preset.area_thd,
        )

    def _save(self) -> None:
        state.save(self.file, self.own, self.record)
        self.saved_at = time.monotonic()

    def finish(self) -> Result:
        """The sum over all processes; the first writes it down."""
        total = self.own
        total.merge(self.earlier)
        counts = self.group.sum(total.counts)
        parts = self.group.gather((total.pictures, total.skipped, total.seconds))
        skipped: dict[str, str] = {}
        for _, of_part, _ in parts:
            skipped |= of_part
        result = Result(
            counts=counts,
            class_names=self.dataset.class_names,
            pictures=sum(pictures for pictures, _, _ in parts),
            skipped=skipped,
            seconds=max(seconds for _, _, seconds in parts),
            protocol=self.record,
        )
        if self.group.rank == 0:
            result.save(self.out)
        return result


def _check_sizes(segmentor: Segmentor, preset: Preset) -> None:
    patch = max(segmentor.host.tower.patch_size)
    for name in ("window", "short_side"):
        if getattr(preset, name) < patch:
            raise InputError(
                f"{name}={getattr(preset, name)} must be at least a patch of the model, {patch}"
            )


def _protocol(
    segmentor: Segmentor,
    dataset: Dataset,
    preset: Preset,
    window_batch: int,
    chunk: int,
    vfm_pretrained: str | None,
    quiet: bool,
) -> Protocol:
    loaded, vfm = segmentor.loaded, segmentor.vfm
    background = dataset.background
    if preset.prob_thd > 0 and background is None:
        raise InputError(
            f"prob_thd={preset.prob_thd} turns uncertain pixels into background, but "
            f"{dataset.name!r} has no class of that name"
        )
    on_gpu = loaded.device.type == "cuda"
    return Protocol(
        dataset=dataset.name,
        pictures=len(dataset.samples),
        names=fingerprint.of_names(sample.name for sample in dataset.samples),
        preset=preset,
        classes=dataset.classes,
        reduce_zero_label=dataset.reduce_zero_label,
        ignore=dataset.ignore,
        background=background,
        host=segmentor.host_name,
        host_options=segmentor.host.options,
        model=loaded.name,
        pretrained=loaded.pretrained,
        weights=fingerprint.of_weights(loaded.model, quiet=quiet),
        vfm=vfm.name if vfm else None,
        vfm_pretrained=vfm_pretrained,
        vfm_weights=fingerprint.of_weights(vfm.module if vfm else None, quiet=quiet),
        feedback=segmentor.config.to_dict() if segmentor.config else None,
        backend=segmentor.host.backend,
        device=torch.cuda.get_device_name(loaded.device) if on_gpu else loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        window_batch=window_batch,
        chunk=chunk,
        fsa=fsa.__version__,
        torch=torch.__version__,
    )
