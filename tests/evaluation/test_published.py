"""Whole segmentors against label maps of the published code.

`published_labels.npz` holds what the published segmentors of FSA, ProxyCLIP, ClearCLIP, SCLIP,
NACLIP and PEARL (with their own towers, windows, PAMR and thresholds, and pictures read and resized
by OpenCV 4.10) answered in float32 on the CPU for two crops of the demo's scenes:

- `SETTING/SCENE`: labels (H,W) uint8 of the setting on the scene of that number;
- `dino/*` and `mae/*`: weights in float16 of a guide of one layer with random weights, under the
  names that timm and the published models share.

CLIP was the embedded model, its vision weights under the published towers' names and its text
features as the queries; only registries of mmsegmentation, which is not needed for one picture,
were replaced. beta is 3 throughout.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import fsa
from fsa import FSAConfig, tiny
from fsa.evaluation import datasets, protocol, runner
from fsa.models import guides
from tests.support.accuracy import VECTORS
from tests.support.evaluation_data import write_mask

# Rows and columns that are kept of the demo's scenes, from the upper left corner.
CROPS = {0: (300, 410), 4: (325, 371)}
CLASSES = (
    ("brick", "stone"),
    *[(name,) for name in ("mushroom", "rocket", "castle", "sand", "sky", "dog")],
    *[(name,) for name in ("frog", "bicycle", "key")],
    ("grass", "plants"),
)
# Of the pixels that a map may have otherwise: rounding in another order, on a border.
SHARE = 1e-4

with np.load(VECTORS / "published_labels.npz") as stored:
    PUBLISHED = dict(stored)
CASES = sorted({name for name in PUBLISHED if name.split("/")[0] not in ("dino", "mae")})


def random_guide(name, segmentor):
    weights = {
        key.removeprefix(f"{name}/"): torch.from_numpy(value).float()
        for key, value in PUBLISHED.items()
        if key.startswith(f"{name}/")
    }
    model = VisionTransformer(
        patch_size=weights["patch_embed.proj.weight"].shape[-1],
        embed_dim=weights["cls_token"].shape[-1],
        depth=1,
        num_heads=3,
        mlp_ratio=2.0,
        num_classes=0,
        dynamic_img_size=True,
    )
    model.load_state_dict(weights)
    model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    loaded = segmentor.loaded
    known = guides._KNOWN[name]
    return guides._TimmVFM(name, model.eval(), known, loaded.mean, loaded.std)


@pytest.mark.parametrize("case", CASES)
def test_the_published_labels_come_out(case, tmp_path):
    setting, number = case.split("/")
    family, dataset, *variant = setting.split("-")
    host = "proxyclip" if family == "fsa" else family
    proxy = {"vfm": "layer"} if host == "proxyclip" else {}
    segmentor = fsa.load_segmentor(
        host,
        feedback=FSAConfig(beta=3.0) if family == "fsa" else False,
        device="cpu",
        dtype="float32",
        **proxy,
    )
    if proxy:
        segmentor.vfm = random_guide("mae" if variant == ["mae"] else "dino", segmentor)
    preset = protocol.preset(family, dataset)
    if variant == ["no_pamr"]:
        preset = preset.override(pamr_steps=0)

    rows, columns = CROPS[int(number)]
    scene = Image.open(tiny.demo_scenes()[int(number)].picture).convert("RGB")
    picture = tmp_path / "picture.png"
    scene.crop((0, 0, columns, rows)).save(picture)
    write_mask(tmp_path / "mask.png", PUBLISHED[case])
    data = datasets.Dataset(
        name="folder",
        root=tmp_path,
        samples=(datasets.Sample("picture", picture, tmp_path / "mask.png"),),
        classes=CLASSES,
        class_names=tuple(names[0] for names in CLASSES),
        background=0,
    )
    result = runner.evaluate(segmentor, data, preset, tmp_path / "out", workers=0, quiet=True)
    # Against the published labels as the mask, what is off the diagonal is what differs.
    assert result.counts.sum() == rows * columns
    assert 1 - result.accuracy() <= SHARE
    assert np.count_nonzero(result.counts.sum(axis=1)) > 1
