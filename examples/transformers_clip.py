"""Segments a picture with a CLIP model of the transformers library, with feedback.

    python examples/transformers_clip.py MODEL PICTURE CLASS [CLASS ...] [--host HOST]

MODEL is a name on the hub, such as openai/clip-vit-base-patch16, or a folder that was written by
`save_pretrained`.
"""

from __future__ import annotations

import argparse

from transformers import CLIPModel, CLIPProcessor

import fsa


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("picture")
    parser.add_argument("classes", nargs="+", metavar="CLASS")
    parser.add_argument("--host", default="sclip")
    parser.add_argument("--out", default="fsa-out")
    options = parser.parse_args()

    segmentor = fsa.load_segmentor(
        host=options.host,
        model=CLIPModel.from_pretrained(options.model),
        processor=CLIPProcessor.from_pretrained(options.model),
    )
    result = segmentor.segment(options.picture, options.classes)
    result.save(options.out)
    print(", ".join(f"{label} {share:.0%}" for label, share in result.areas().items()))


if __name__ == "__main__":
    main()
