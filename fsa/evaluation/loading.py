"""Decoding and resizing in worker processes, so that the device never waits for Python."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fsa.errors import InputError
from fsa.evaluation.datasets import Dataset
from fsa.evaluation.protocol import LONG_SIDE, Preset
from fsa.evaluation.resizing import resize
from fsa.pictures.reading import read_image


@dataclass(frozen=True)
class Loaded:
    """A picture that is ready for windows, or why it is not.

    Attributes:
        index: in the dataset's samples.
        image: (3,h,w) uint8 at the working size, or None.
        mask: (H,W) int32 at the picture's own size, -1 where not counted, or None.
        error: what went wrong, or "".
    """

    index: int
    image: Tensor | None
    mask: Tensor | None
    error: str = ""

    def pin_memory(self) -> Loaded:
        """The same in page-locked memory, from which copies to the GPU overlap with work."""
        if self.image is None or self.mask is None:
            return self
        return Loaded(self.index, self.image.pin_memory(), self.mask.pin_memory())


def working_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(h,w) of a resized picture: the short side as asked, the long one at most `LONG_SIDE`."""
    scale = min(short_side / min(height, width), LONG_SIDE / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class Normalisation:
    """Pictures as CLIP takes them, with its statistics as the published configurations have them.

    These are on the scale of 0 to 255 and rounded to three decimals, which decides a pixel here
    and there that lies on the border of two classes.

    Args:
        mean, std: of the channels of pictures in [0, 1].
        device: where the pictures will be.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self._mean, self._std = (
            torch.tensor([round(255 * value, 3) for value in channels], device=device)[
                :, None, None
            ]
            for channels in (mean, std)
        )

    def __call__(self, image: Tensor) -> Tensor:
        """(3,h,w) uint8 -> (3,h,w) float32."""
        return (image.float() - self._mean) / self._std


def loader(
    dataset: Dataset, indices: list[int], preset: Preset, workers: int, pin: bool
) -> DataLoader:
    """Yields `Loaded` for each of the samples, in their order.

    Args:
        dataset: where the files are.
        indices: which samples.
        preset: to which size pictures are resized.
        workers: processes that decode; 0 decodes here.
        pin: whether to put tensors into page-locked memory.
    """
    return DataLoader(
        _Samples(dataset, indices, preset),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )


class _Samples(torch.utils.data.Dataset):
    def __init__(self, dataset: Dataset, indices: list[int], preset: Preset) -> None:
        self._dataset = dataset
        self._indices = indices
        self._read = partial(_read, dataset, preset)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Loaded:
        index = self._indices[position]
        # An exception would lose its class and its one line on the way between processes.
        try:
            return self._read(index)
        except InputError as error:
            return Loaded(index, None, None, str(error))


def _read(dataset: Dataset, preset: Preset, index: int) -> Loaded:
    sample = dataset.samples[index]
    image = read_image(sample.image).rgb
    mask = dataset.read_mask(sample.mask)
    if mask.shape != tuple(image.shape[-2:]):
        raise InputError(
            f"{sample.mask}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels, but the picture "
            f"{sample.image} is {image.shape[2]} x {image.shape[1]}"
        )
    size = working_size(mask.shape[0], mask.shape[1], preset.short_side)
    return Loaded(index, resize(image, size, preset.antialias), torch.from_numpy(mask))
