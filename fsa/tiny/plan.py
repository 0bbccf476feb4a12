"""What training shows, how long and how fast."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fsa.tiny.vocabulary import OBJECTS

LAST_TEMPERATURE = 100.0
"""Where CLIP's ends. The published constants of FSA are for cosines trained there."""


@dataclass(frozen=True)
class View:
    """What a step shows: pictures of one size; sizes in pixels.

    Attributes:
        size: of the pictures.
        object_sizes: shortest and longest side of an object.
        most_objects: how many objects a picture has at most.
        groups: of pictures in a step. A group shows every object once as its first, and its
            captions are compared with its own pictures only, so that few of them fit two.
        parts: into how many the patches of each picture are dealt at random. The image tower is
            given one part at a time, in as many updates.
    """

    size: int
    object_sizes: tuple[int, int]
    most_objects: int
    groups: int
    parts: int = 1

    @property
    def batch(self) -> int:
        return self.groups * len(OBJECTS)


# An update costs about the same for each. A part of a large picture costs little more than a whole
# small one, and shows objects as large as those of scenes.
CROP = View(size=64, object_sizes=(36, 84), most_objects=2, groups=3)
SMALL = View(size=112, object_sizes=(36, 150), most_objects=3, groups=2, parts=2)
MEDIUM = View(size=160, object_sizes=(40, 170), most_objects=3, groups=1, parts=2)
FULL = View(size=224, object_sizes=(40, 200), most_objects=4, groups=1, parts=4)
VIEWS = (CROP, SMALL, MEDIUM, FULL)


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Attributes:
        steps: batches of pictures.
        views: what steps may show.
        shares: of the steps that show each of the views.
        whole: share of the steps, the last ones, whose pictures keep all of their patches.
        whole_shares: of those steps that show each of the views.
        learning_rate: after `warmup` steps, until the last `decay` of the steps, a share, in which
            it falls to 0 as a line.
        first_temperature: where the temperature begins; it ends where CLIP's does.
        freeze_text: leaves the text tower as it is, which saves most of its cost.
        seed: of the weights and of every scene.
    """

    steps: int = 20000
    views: tuple[View, ...] = VIEWS
    shares: tuple[float, ...] = (0.5, 0.3, 0.1, 0.1)
    whole: float = 0.2
    whole_shares: tuple[float, ...] = (0.1, 0.5, 0.0, 0.4)
    learning_rate: float = 1.0e-3
    warmup: int = 200
    decay: float = 0.5
    weight_decay: float = 0.05
    first_temperature: float = 14.3
    freeze_text: bool = False
    seed: int = 0
    workers: int = 1
    save_every: int = 250

    def rate(self, step: int) -> float:
        rising = (step + 1) / self.warmup
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, rising, falling)

    def temperature(self, step: int) -> float:
        """Rises over the first third of the steps to where CLIP's ends.

        The published constants of FSA are for cosines trained there.
        """
        progress = min(1.0, 3 * step / self.steps)
        return self.first_temperature * (LAST_TEMPERATURE / self.first_temperature) ** progress

    def view(self, step: int) -> View:
        """What a step shows, from the seed and the step alone."""
        whole = step >= (1 - self.whole) * self.steps
        shares = self.whole_shares if whole else self.shares
        drawn = np.random.default_rng((self.seed, step, 3)).choice(len(self.views), p=shares)
        view = self.views[drawn]
        return replace(view, parts=1) if whole else view
