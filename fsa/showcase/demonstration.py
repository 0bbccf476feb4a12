"""The demo: shipped pictures through each host, without and with feedback, in one PNG."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fsa import tiny
from fsa.draw.colours import palette
from fsa.draw.figures import Panel, paint, panel_grid
from fsa.evaluation.metrics import confusion, mean_iou
from fsa.files import make_room_for_png, write_whole
from fsa.segment.segmentor import Segmentor, load_segmentor
from fsa.showcase import comparison
from fsa.showcase.titles import title
from fsa.tiny.pictographs import UNSEEN_STYLE

# To be read on a slide that is as wide as the figure.
_PANEL_WIDTH, _TEXT_SIZE = 240, 22
# CLIP's own attention first, with the rest of its last block and without: feedback does most there.
HOSTS = ("clip", "qk", "maskclip", "sclip", "clearclip", "proxyclip")
# The scene and the host whose attention is shown.
_ATTENTION_SCENE, _ATTENTION_HOST = 2, "qk"


def run(out: Path) -> str:
    """Segments the shipped pictures, writes the PNG and returns the scores as a table.

    Beside it goes NAME-attention.png, what a patch of one of them attends to before and after
    feedback.

    Raises:
        InputError: the PNG cannot be written.
    """
    make_room_for_png(out)
    scenes = tiny.demo_scenes()
    base = load_segmentor("maskclip", feedback=True)
    runs = [
        (host, feedback, base.with_host(host).with_feedback(feedback))
        for host in HOSTS
        for feedback in (False, True)
    ]
    # The texts of a picture are encoded once, outside of what is timed.
    for scene in scenes:
        base.segment(Image.new("RGB", (32, 32)), scene.classes)

    rows = []
    scores: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    with tqdm(total=len(scenes) * len(runs), unit="run", leave=False, disable=None) as bar:
        for scene in scenes:
            picture, mask = Image.open(scene.picture).convert("RGB"), _read_mask(scene.mask)
            count = len(scene.classes)
            truth = paint(np.asarray(picture), mask, count)
            row = [Panel(picture, "picture"), Panel(Image.fromarray(truth), "truth")]
            for host, feedback, segmentor in runs:
                labels, seconds = _timed(segmentor, picture, scene.classes)
                score = mean_iou(confusion(labels, mask, count))
                scores.setdefault((host, feedback), []).append((score, seconds))
                painted = paint(np.asarray(picture), labels, count)
                caption = f"{100 * score:.1f} mIoU, {1000 * seconds:.0f} ms"
                row.append(Panel(Image.fromarray(painted), caption))
                bar.update()
            rows.append(row)

    titles = ["", ""]
    for host in HOSTS:
        titles += [title(host), f"{title(host)} + FSA"]
    legends = [
        [
            (name, (int(red), int(green), int(blue)))
            for name, (red, green, blue) in zip(
                scene.classes, palette(len(scene.classes)), strict=True
            )
        ]
        for scene in scenes
    ]
    figure = panel_grid(
        rows,
        titles,
        heading="The embedded model, each host without and with feedback self-adaptive attention",
        panel_width=_PANEL_WIDTH,
        text_size=_TEXT_SIZE,
        legends=legends,
        labels=[f"{n + 1}: {_style(scene)}" for n, scene in enumerate(scenes)],
    )
    write_whole(out, lambda stream: figure.save(stream, "PNG"))
    scene = scenes[min(_ATTENTION_SCENE, len(scenes)) - 1]
    attention = out.with_name(f"{out.stem}-attention.png")
    segmentor = base.with_host(_ATTENTION_HOST)
    comparison.run(segmentor, scene.picture, [[name] for name in scene.classes], attention)
    return f"{_table(scores, len(scenes))}\nwrote {out} and {attention}"


def _style(scene: tiny.DemoScene) -> str:
    return "unseen style" if UNSEEN_STYLE in scene.styles else "trained styles"


def _timed(
    segmentor: Segmentor, picture: Image.Image, classes: tuple[str, ...]
) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    labels = segmentor.segment(picture, classes).labels
    return labels, time.perf_counter() - start


def _read_mask(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def _table(scores: dict[tuple[str, bool], list[tuple[float, float]]], pictures: int) -> str:
    lines = [
        f"mean over {pictures} pictures: mIoU in percent, seconds a picture",
        f"{'host':<14} {'mIoU':>6} {'+ FSA':>6} {'gain':>6}   {'time':>6} {'+ FSA':>6}",
    ]
    for host in HOSTS:
        baseline, adapted = (np.mean(scores[host, feedback], axis=0) for feedback in (False, True))
        lines.append(
            f"{title(host):<14} {100 * baseline[0]:6.1f} {100 * adapted[0]:6.1f} "
            f"{100 * (adapted[0] - baseline[0]):+6.1f}   {baseline[1]:6.2f} {adapted[1]:6.2f}"
        )
    return "\n".join(lines)
