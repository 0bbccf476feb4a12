"""Adds feedback to a method of your own: a function that returns the attention between patches.

    python examples/attention_function.py [PICTURE] [--out FOLDER]

The function below takes up CorrCLIP's idea: a patch attends only to patches of its own region, by
how similar their values are. CorrCLIP takes its regions from SAM's masks; here a region is made of
patches of nearly the same colour. For Trident, return the correlation of SAM's features instead.
"""

from __future__ import annotations

import argparse

from torch import Tensor
from torch.nn import functional

import fsa
from fsa import tiny
from fsa.hosts import LastBlock

SAME_COLOUR = 1.0
SHARPNESS = 10.0


def within_regions(block: LastBlock) -> Tensor:
    """The attention (B,N,N): rows sum to 1 and are 0 outside of the patch's region."""
    values = block.value[:, :, block.prefix_tokens :].transpose(1, 2).flatten(2)
    unit = functional.normalize(values, dim=-1)
    scores = SHARPNESS * unit @ unit.transpose(1, 2)

    # Your own regions can be computed from block.images, (B,3,H,W), on the grid block.grid.
    colours = functional.adaptive_avg_pool2d(block.images, block.grid).flatten(2).transpose(1, 2)
    distance = (colours[:, :, None] - colours[:, None]).norm(dim=-1)
    return scores.masked_fill(distance > SAME_COLOUR, float("-inf")).softmax(dim=-1)


def main() -> None:
    scene = tiny.demo_scenes()[4]
    parser = argparse.ArgumentParser()
    parser.add_argument("picture", nargs="?", default=scene.picture)
    parser.add_argument("--out", default="fsa-out")
    options = parser.parse_args()

    baseline = fsa.load_segmentor(host=within_regions, feedback=False)
    for name, segmentor in (("baseline", baseline), ("feedback", baseline.with_feedback(True))):
        result = segmentor.segment(options.picture, scene.classes)
        result.save(f"{options.out}/{name}")
        shares = ", ".join(f"{label} {share:.0%}" for label, share in result.areas().items())
        print(f"{name}: {shares}")


if __name__ == "__main__":
    main()
