"""The margins of tests/bench/test_quality.py, measured with the present weights.

    python -m bench guards

segments the held-out scenes with each guarded host, without and with feedback, as they are and
several times with a little noise. A guard is the score as it is less some deviations of the noisy
ones, so that another machine's rounding cannot trip it. Writes tests/scenes/guards.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench import ROOT
from fsa import load_segmentor
from fsa.evaluation.metrics import confusion, mean_iou
from fsa.segment.segmentor import Segmentor

SCENES = ROOT / "tests" / "scenes"
FILE = SCENES / "guards.json"
# CLIP as it is gains most, so it shows best whether feedback works.
HOSTS = ("clip", "maskclip", "sclip")
DEVIATIONS = 4

_COPIES = 4
# Of the added noise, in steps of 8 bits.
_NOISE = 2.0


def scores(segmentor: Segmentor, noise: int | None = None) -> dict[str, float]:
    """mIoU in percent over all scenes: of the host as a baseline, and what feedback adds to it.

    Args:
        segmentor: with feedback.
        noise: seed of noise on the pictures, None for none.
    """
    baseline = segmentor.with_feedback(False)
    without, adapted = (
        100
        * mean_iou(
            sum(
                confusion(s.segment(picture, classes).labels, mask, len(classes))
                for picture, mask, classes in scenes(noise)
            )
        )
        for s in (baseline, segmentor)
    )
    return {"quality": without, "gain": adapted - without}


def scenes(noise: int | None = None) -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Pictures (H,W,3) uint8, masks (H,W) uint8 and class names."""
    rng = np.random.default_rng(noise)
    found = []
    for entry in json.loads((SCENES / "scenes.json").read_text()):
        picture, mask = (np.asarray(Image.open(SCENES / entry[k])) for k in ("picture", "mask"))
        if noise is not None:
            noisy = picture + rng.normal(0, _NOISE, picture.shape)
            picture = noisy.round().clip(0, 255).astype(np.uint8)
        found.append((picture, mask, entry["classes"]))
    return found


def measured(segmentor: Segmentor) -> dict[str, dict[str, float]]:
    """quality and gain -> value, deviation, and the least that the test accepts."""
    as_it_is = scores(segmentor)
    noisy = [scores(segmentor, seed) for seed in range(_COPIES)]
    guards = {}
    for name, value in as_it_is.items():
        deviation = float(np.std([copy[name] for copy in noisy], ddof=1))
        guards[name] = {
            "value": round(value, 2),
            "deviation": round(deviation, 2),
            "least": round(value - DEVIATIONS * deviation, 2),
        }
    return guards


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the margins."""
    argparse.ArgumentParser(prog="python -m bench guards", description=__doc__).parse_args(
        arguments[1:]
    )
    segmentor = load_segmentor(device="cpu")
    guards: dict[str, Any] = {host: measured(segmentor.with_host(host)) for host in tqdm(HOSTS)}
    FILE.write_text(json.dumps(guards, indent=1) + "\n")
    for host, entry in guards.items():
        for name, guard in entry.items():
            kind = "" if name == "quality" else "; a gain" if guard["least"] > 0 else "; no gain"
            print(f"{host} {name}: {guard['value']} (least {guard['least']}{kind})")
    return 0
