"""Seeded scenes: pictographs on textured grounds, with exact masks and captions.

A scene is drawn from (seed, index) alone, so a split is a seed and a range of indices. Many scenes
are rendered at once, on the CPU or a GPU, so that a model in training never waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fsa.tiny.pictographs import PAINTED
from fsa.tiny.textures import BANK_SIDE, BANK_TILES, texture_bank
from fsa.tiny.vocabulary import CLASSES, OBJECTS, TEXTURES

_MASK_ALPHA = 0.5
# An object of which fewer pixels can be seen is not in the scene's list.
_VISIBLE_PIXELS = 64
_NONE = -1

# Uniform numbers that one object, and that the rest of a scene, take.
_PER_OBJECT = 24
_PER_SCENE = 24


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is in them.

    Attributes:
        pictures: (B,3,H,W) uint8.
        masks: (B,H,W) uint8, index into `fsa.tiny.vocabulary.CLASSES`.
        objects: for each picture, the indices of the objects that can be seen.
        textures: for each picture, the indices of its textures.
    """

    pictures: Tensor
    masks: Tensor
    objects: list[tuple[int, ...]]
    textures: list[tuple[int, ...]]


class Sprites:
    """The pictographs of some styles, as tensors.

    Args:
        folder: holds STYLE/CODEPOINT.png, or several STYLE/CODEPOINT-NAME.png, as
            `fsa.tiny.pictographs` and `fsa.tiny.paint` write them.
        styles: a style may lack objects, as long as another of them has them.
        device: where scenes are to be rendered.
        painted: share of the objects in scenes that are from the style `painted`, if it is among
            the styles and has the object. All other drawings of an object are equally frequent.
    """

    def __init__(
        self,
        folder: Path,
        styles: Sequence[str],
        device: torch.device | str = "cpu",
        painted: float = 0.5,
    ) -> None:
        levels: list[list[Tensor]] = []
        members = []
        total = 0
        for entry in OBJECTS:
            given = [f for s in styles if s != PAINTED for f in _files(folder / s, entry.codepoint)]
            anew = _files(folder / PAINTED, entry.codepoint) if PAINTED in styles else []
            if not given and not anew:
                raise FileNotFoundError(
                    f"{folder} has no picture of {entry.name!r} ({entry.codepoint}) in the styles "
                    f"{', '.join(styles)}; see fsa.tiny.pictographs"
                )
            members.append((total, len(given), len(anew)))
            total += len(given) + len(anew)
            levels.append(_levels(given + anew))
        self.levels = [torch.cat(of_objects).to(device) for of_objects in zip(*levels, strict=True)]
        self.first, self.given, self.painted = np.array(members).T
        self.share = np.where(self.given == 0, 1.0, np.where(self.painted == 0, 0.0, painted))
        self.device = torch.device(device)

    def choose(self, classes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Drawings (K,) of objects (K,), as indices into the levels, by numbers in [0, 1)."""
        share = self.share[classes]
        new = uniform < share
        start = np.where(new, 0.0, share)
        width = np.where(new, share, 1.0 - share)
        count = np.where(new, self.painted[classes], self.given[classes])
        place = ((uniform - start) / width * count).astype(int)
        return self.first[classes] + np.where(new, self.given[classes], 0) + place


def _files(folder: Path, codepoint: str) -> list[Path]:
    only = folder / f"{codepoint}.png"
    return [only] if only.exists() else sorted(folder.glob(f"{codepoint}-*.png"))


def _levels(files: Sequence[Path]) -> list[Tensor]:
    """Pictures (K,4,S,S) uint8, and the same at half and at a quarter of their side."""
    pictures = [_square(Image.open(file).convert("RGBA")) for file in files]
    whole = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    # Colours multiplied by opacity, so that blending and shrinking leave no fringe.
    whole[:, :3] = (whole[:, :3].int() * whole[:, 3:].int() // 255).to(torch.uint8)
    levels = [whole]
    for _ in range(2):
        smaller = functional.avg_pool2d(levels[-1].float(), 2).round()
        levels.append(smaller.to(torch.uint8))
    return levels


def _square(picture: Image.Image) -> np.ndarray:
    """The picture in the middle of a transparent square."""
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas)


class Composer:
    """Composes scenes.

    Args:
        sprites: the pictographs; their device is where scenes are rendered.
        size: height and width of the scenes in pixels.
        seed: of everything random, textures included.
        object_sizes: shortest and longest side of an object in pixels.
        fewest_objects, most_objects: how many objects a scene has.
        bare: share of the scenes that have none.
        augment: True varies colour, shape and sharpness further than scenes for tests do.
    """

    def __init__(
        self,
        sprites: Sprites,
        size: tuple[int, int],
        *,
        seed: int,
        object_sizes: tuple[int, int] = (36, 100),
        fewest_objects: int = 1,
        most_objects: int = 4,
        bare: float = 0.0,
        augment: bool = False,
    ) -> None:
        self.sprites = sprites
        self.size = size
        self.seed = seed
        self.object_sizes = object_sizes
        self.fewest_objects = fewest_objects
        self.most_objects = most_objects
        self.bare = bare
        self.augment = augment
        self._bank = torch.from_numpy(texture_bank(seed)).to(sprites.device)

    def compose(self, indices: Sequence[int], *, objects: int | None = None) -> Scenes:
        """The scenes of these indices.

        The first objects of len(OBJECTS) scenes whose indices follow each other from a multiple of
        that number are all different.

        Args:
            indices: 0, 1, 2, ...
            objects: how many objects each has; None draws from `fewest_objects` to `most_objects`.
        """
        most = self.most_objects if objects is None else objects
        uniform = self._draw(indices, _PER_SCENE + most * _PER_OBJECT)
        scene, per_object = uniform[:, :_PER_SCENE], uniform[:, _PER_SCENE:]
        per_object = per_object.reshape(len(indices), most, _PER_OBJECT)

        if objects is None:
            span = self.most_objects - self.fewest_objects + 1
            counts = self.fewest_objects + (scene[:, 0] * span).astype(int)
            counts[scene[:, 1] < self.bare] = 0
        else:
            counts = np.full(len(indices), objects)
        classes = self._classes(indices, per_object[..., 0])
        classes[np.arange(most)[None] >= counts[:, None]] = _NONE

        pictures, masks, textures = self._grounds(scene)
        for place in range(most):
            self._put(pictures, masks, classes[:, place], per_object[:, place])
        pictures = self._finish(pictures, scene, indices)
        return Scenes(
            pictures=pictures,
            masks=masks.to(torch.uint8),
            objects=self._visible(masks, classes),
            textures=textures,
        )

    def _draw(self, indices: Sequence[int], count: int) -> np.ndarray:
        """(B,count) numbers in [0, 1), each row from the seed and the index alone."""
        return np.stack([np.random.default_rng((self.seed, i)).random(count) for i in indices])

    def _classes(self, indices: Sequence[int], uniform: np.ndarray) -> np.ndarray:
        """(B,K) objects; the first runs through all of them, in an order anew each time."""
        classes: np.ndarray = np.zeros(uniform.shape, dtype=int)
        orders: dict[int, np.ndarray] = {}
        for row, index in enumerate(indices):
            epoch, place = divmod(int(index), len(OBJECTS))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((self.seed, 104729, epoch)).permutation(
                    len(OBJECTS)
                )
            if classes.shape[1]:
                classes[row, 0] = orders[epoch][place]
        others = 1 + (uniform[:, 1:] * (len(OBJECTS) - 1)).astype(int)
        classes[:, 1:] = (classes[:, :1] + others) % len(OBJECTS)
        return classes

    def _grounds(self, uniform: np.ndarray) -> tuple[Tensor, Tensor, list[tuple[int, ...]]]:
        """One texture, or two parted by a wavy line: pictures (B,3,H,W) float32 and masks."""
        device = self.sprites.device
        height, width = self.size
        first = (uniform[:, 2] * len(TEXTURES)).astype(int)
        second = (first + 1 + (uniform[:, 3] * (len(TEXTURES) - 1)).astype(int)) % len(TEXTURES)
        parted = uniform[:, 4] < 0.5
        pictures = self._texture(first, uniform[:, 5:10])
        below = self._texture(second, uniform[:, 10:15])

        base = (0.3 + 0.4 * uniform[:, 15]) * height
        waves = 0.05 * uniform[:, 16] * height
        angle = np.arange(width)[None] / width * (3 + 9 * uniform[:, 17:18])
        line = base[:, None] + waves[:, None] * np.sin(angle + 6 * uniform[:, 18:19])
        line[~parted] = height
        under = torch.arange(height, device=device)[None, :, None] > _tensor(line, device)[:, None]
        pictures = torch.where(under[:, None], below, pictures)
        masks = torch.where(
            under,
            torch.as_tensor(second, device=device)[:, None, None],
            torch.as_tensor(first, device=device)[:, None, None],
        ) + len(OBJECTS)
        textures: list[tuple[int, ...]] = [
            (len(OBJECTS) + int(a), len(OBJECTS) + int(b)) if two else (len(OBJECTS) + int(a),)
            for a, b, two in zip(first, second, parted, strict=True)
        ]
        return pictures, masks, textures

    def _texture(self, textures: np.ndarray, uniform: np.ndarray) -> Tensor:
        """Random crops of the bank, (B,3,H,W) float32, with some change of colour."""
        height, width = self.size
        tiles = (uniform[:, 0] * 2 * BANK_TILES).astype(int)
        tops = (uniform[:, 1] * (BANK_SIDE - height + 1)).astype(int)
        lefts = (uniform[:, 2] * (BANK_SIDE - width + 1)).astype(int)
        crops = []
        for texture, tile, top, left in zip(textures, tiles, tops, lefts, strict=True):
            crop = self._bank[texture, tile // 2, :, top : top + height, left : left + width]
            crops.append(crop.flip(-1) if tile % 2 else crop)
        tint = np.stack([uniform[:, 3], uniform[:, 4], (uniform[:, 3] + uniform[:, 4]) / 2], axis=1)
        return (
            torch.stack(crops).float()
            * _tensor(0.85 + 0.3 * tint, self.sprites.device)[:, :, None, None]
        )

    def _put(
        self, pictures: Tensor, masks: Tensor, classes: np.ndarray, uniform: np.ndarray
    ) -> None:
        """Draws an object into each of the scenes that has one, over what is there."""
        (rows,) = np.nonzero(classes != _NONE)
        if len(rows) == 0:
            return
        device = self.sprites.device
        classes, uniform = classes[rows], uniform[rows]
        chosen = self.sprites.choose(classes, uniform[:, 1])
        low, high = self.object_sizes
        side = low * (high / low) ** uniform[:, 2]
        inverse, centre = self._placement(side, uniform)

        height, width = self.size
        y, x = torch.meshgrid(
            torch.arange(height, device=device) + 0.5,
            torch.arange(width, device=device) + 0.5,
            indexing="ij",
        )
        points = torch.stack([x, y], dim=-1).flatten(0, 1) - _tensor(centre, device)[:, None]
        grid = (points @ _tensor(inverse, device).transpose(1, 2)).unflatten(1, self.size)
        if self.augment:
            grid = self._bent(grid, uniform)
        sprites = torch.zeros((len(rows), 4, height, width), device=device)
        # The level whose pixels are nearest to the scene's in size; a coarser one now and then.
        shrink = np.log2(self.sprites.levels[0].shape[-1] / side)
        coarser = 0.5 * (self.augment & (uniform[:, 3] < 0.3))
        level = np.clip(np.round(shrink + coarser), 0, len(self.sprites.levels) - 1)
        for number, pictographs in enumerate(self.sprites.levels):
            (members,) = np.nonzero(level == number)
            if len(members):
                at = torch.as_tensor(members, device=device)
                of = torch.as_tensor(chosen[members], device=device)
                sprites[at] = functional.grid_sample(
                    pictographs[of].float(), grid[at], mode="bilinear", align_corners=False
                )
        opacity = sprites[:, 3:] / 255
        colours = self._recoloured(sprites[:, :3], opacity, uniform)
        where = torch.as_tensor(rows, device=device)
        pictures[where] = pictures[where] * (1 - opacity) + colours
        covered = opacity[:, 0] >= _MASK_ALPHA
        of_class = torch.as_tensor(classes, device=device)[:, None, None]
        masks[where] = torch.where(covered, of_class, masks[where])

    def _placement(self, side: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From a scene's pixels to a sprite's coordinates in [-1, 1]: matrices and centres."""
        angle = np.deg2rad(50 * uniform[:, 4] - 25)
        mirror = np.where(uniform[:, 5] < 0.5, -1.0, 1.0)
        narrow, shear = np.ones(len(side)), np.zeros(len(side))
        if self.augment:
            narrow = np.exp(0.5 * uniform[:, 6] - 0.25)
            shear = 0.4 * uniform[:, 7] - 0.2
        cosine, sine = np.cos(angle), np.sin(angle)
        turn = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], -2)
        zero = np.zeros_like(shear)
        skew = np.stack([np.stack([1 + zero, shear], -1), np.stack([zero, 1 + zero], -1)], -2)
        scale = np.stack([mirror * narrow, 1 / narrow], -1) / (side / 2)[:, None]
        inverse = scale[:, :, None] * (skew @ turn)
        # At least three quarters of each side stay inside.
        room = np.array(self.size[::-1])[None] + side[:, None] / 2
        centre = room * uniform[:, 8:10] - side[:, None] / 4
        inside = side[:, None] / 4
        return inverse, np.clip(centre, inside, np.array(self.size[::-1])[None] - inside)

    def _bent(self, grid: Tensor, uniform: np.ndarray) -> Tensor:
        """Sprite coordinates (B,H,W,2) displaced by a wave along each axis."""
        device = grid.device
        depth = _tensor(0.12 * uniform[:, 16:18], device)[:, None, None]
        cycles = _tensor(1 + 3 * uniform[:, 18:20], device)[:, None, None]
        phase = _tensor(2 * np.pi * uniform[:, 20:22], device)[:, None, None]
        return grid + depth * torch.sin(cycles * grid.flip(-1) + phase)

    def _recoloured(self, colours: Tensor, opacity: Tensor, uniform: np.ndarray) -> Tensor:
        """Colours (already multiplied by opacity) with another hue, saturation and light."""
        device = colours.device
        spread = 0.5 if self.augment else 0.3
        saturation, contrast, gain = (1 - spread + 2 * spread * uniform[:, 10:13]).T
        gain = 0.5 + 0.5 * gain if self.augment else gain
        hue = np.zeros(len(uniform))
        if self.augment:
            # Some turn to any hue or to grey, so that shape must do where colour tells nothing.
            turn = np.where(uniform[:, 15] < 0.15, 360, 50)
            hue = np.deg2rad(turn) * (uniform[:, 13] - 0.5)
            saturation = np.where(uniform[:, 14] < 0.08, 0.0, saturation)
        # Hue turns about the grey axis; saturation scales what is off it.
        grey = np.full((3, 3), 1 / 3)
        cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
        matrix = grey + saturation[:, None, None] * (
            np.cos(hue)[:, None, None] * (np.eye(3) - grey) + np.sin(hue)[:, None, None] * cross
        )
        matrix = _tensor((gain * contrast)[:, None, None] * matrix, device)
        offset = _tensor(gain * (1 - contrast) * 128, device)[:, None, None, None]
        changed = torch.einsum("bij,bjhw->bihw", matrix, colours) + offset * opacity
        return torch.minimum(changed.clamp_min(0), 255 * opacity)

    def _finish(self, pictures: Tensor, uniform: np.ndarray, indices: Sequence[int]) -> Tensor:
        """Light over the whole pictures: a gain and a gradient; softness and noise on top."""
        device = pictures.device
        across = np.linspace(-1, 1, self.size[1], dtype=np.float32)[None]
        light = 0.8 + 0.35 * uniform[:, 19:20] + 0.24 * (uniform[:, 20:21] - 0.5) * across
        pictures = pictures * _tensor(light, device)[:, None, None, :]
        if self.augment:
            soft = functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
            amount = _tensor(np.clip(3 * uniform[:, 21] - 2, 0, 1), device)[:, None, None, None]
            pictures = pictures + amount * (soft - pictures)
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + int(indices[0]))
            deviation = _tensor(np.clip(24 * uniform[:, 22] - 12, 0, 12), device)
            noise = torch.randn(pictures.shape, generator=generator, device=device)
            pictures = pictures + deviation[:, None, None, None] * noise
        return pictures.clamp(0, 255).to(torch.uint8)

    def _visible(self, masks: Tensor, classes: np.ndarray) -> list[tuple[int, ...]]:
        offsets = torch.arange(len(masks), device=masks.device)[:, None, None] * len(CLASSES)
        counts = torch.bincount(
            (masks + offsets).flatten(), minlength=len(masks) * len(CLASSES)
        ).reshape(len(masks), -1)
        seen = (counts >= _VISIBLE_PIXELS).cpu().numpy()
        return [
            tuple(dict.fromkeys(int(c) for c in row if c != _NONE and seen[i, c]))
            for i, row in enumerate(classes)
        ]


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32, device=device)
