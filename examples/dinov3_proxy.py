"""Segments a picture with ProxyCLIP guided by DINOv3, with feedback.

    python examples/dinov3_proxy.py [PICTURE] [--weights FILE | --random] [--out FOLDER]

DINOv3's weights come through timm's hub, where you have to accept their licence first, or from a
file that you name. With --random the weights are random, which shows that everything runs.
"""

from __future__ import annotations

import argparse

import fsa
from fsa import tiny


def main() -> None:
    scene = tiny.demo_scenes()[4]
    parser = argparse.ArgumentParser()
    parser.add_argument("picture", nargs="?", default=scene.picture)
    parser.add_argument("--weights", help="a checkpoint of vit_base_patch16_dinov3")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--out", default="fsa-out")
    options = parser.parse_args()

    segmentor = fsa.load_segmentor(
        host="proxyclip", vfm="dinov3", vfm_pretrained=False if options.random else options.weights
    )
    result = segmentor.segment(options.picture, scene.classes)
    result.save(options.out)
    print(", ".join(f"{label} {share:.0%}" for label, share in result.areas().items()))


if __name__ == "__main__":
    main()
