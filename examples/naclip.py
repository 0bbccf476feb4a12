"""Segments a picture with NACLIP, without and with feedback.

    python examples/naclip.py [PICTURE] [--out FOLDER]

NACLIP's attention is key-key attention with a Gaussian neighbourhood. For a real CLIP model, use
fsa.load_segmentor(host="naclip", model="ViT-B-16", pretrained="openai").
"""

from __future__ import annotations

import argparse

import fsa
from fsa import tiny


def main() -> None:
    scene = tiny.demo_scenes()[4]
    parser = argparse.ArgumentParser()
    parser.add_argument("picture", nargs="?", default=scene.picture)
    parser.add_argument("--out", default="fsa-out")
    options = parser.parse_args()

    naclip = fsa.load_segmentor(host="naclip", feedback=False)
    for name, segmentor in (("baseline", naclip), ("feedback", naclip.with_feedback(True))):
        result = segmentor.segment(options.picture, scene.classes)
        result.save(f"{options.out}/{name}")
        shares = sorted(result.areas().items(), key=lambda item: -item[1])
        print(f"{name}:", ", ".join(f"{label} {share:.0%}" for label, share in shares))


if __name__ == "__main__":
    main()
