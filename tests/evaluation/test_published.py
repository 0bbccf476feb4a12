"""Whole segmentors against label maps of the published code.

`published_labels.npz` holds what the published segmentors of FSA, ProxyCLIP, ClearCLIP, SCLIP,
NACLIP and PEARL (with their own towers, windows, PAMR or propagation, and thresholds, and pictures
read and resized by OpenCV 4.10) answered in float32 on the CPU for `published-0.png` and
`published-1.png`:

- `SETTING/PICTURE`: labels (H,W) uint8 of the setting on the picture of that number;
- `queries`: text features (13,192), one for each name of `CLASSES`;
- `dino/*` and `mae/*`: weights in float16 of a guide of one layer with random weights, under the
  names that timm and the published models share.

CLIP was a tower of the embedded model's form with the weights of `vision_weights`, under the
published towers' names; only registries of mmsegmentation, which is not needed for one picture,
were replaced. beta is 3 throughout.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fsa
from fsa import FSAConfig
from fsa.evaluation import datasets, protocol, runner
from fsa.models import guides
from fsa.models.text import TextQueries
from tests.support.accuracy import VECTORS
from tests.support.evaluation_data import write_mask

CLASSES = (
    ("brick", "stone"),
    *[(name,) for name in ("mushroom", "rocket", "castle", "sand", "snow", "pig")],
    *[(name,) for name in ("owl", "doughnut", "house")],
    ("grass", "plants"),
)
# Of the pixels that a map may have otherwise: rounding in another order, on a border.
SHARE = 1e-4

with np.load(VECTORS / "published_labels.npz") as stored:
    PUBLISHED = dict(stored)
CASES = sorted(name for name in PUBLISHED if name.split("/")[0] not in ("queries", "dino", "mae"))


def vision_weights(visual):
    """Weights for a tower, of a generator whose numbers never change: small biases, gains near 1,
    matrices that keep the size of what they multiply. But attention is sharp and adds little, so
    that patches stay different."""
    generator = np.random.RandomState(0)
    weights = {}
    for name, tensor in sorted(visual.state_dict().items()):
        numbers = torch.from_numpy(generator.standard_normal(tuple(tensor.shape))).float()
        if tensor.ndim == 1 and name.endswith("weight"):
            numbers = 1 + 0.1 * numbers
        elif tensor.ndim == 1 or "positional" in name:
            numbers = 0.1 * numbers
        else:
            inputs = tensor.shape[0] if name == "proj" else tensor[0].numel()
            gain = {"in_proj_weight": 3, "out_proj.weight": 0.3}.get(name.partition("attn.")[2], 1)
            numbers = gain * numbers / inputs**0.5
        weights[name] = numbers
    return weights


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
def test_the_published_labels_come_out(case, tmp_path, monkeypatch):
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
    segmentor.loaded.model.visual.load_state_dict(vision_weights(segmentor.loaded.model.visual))
    class_index = torch.tensor([i for i, names in enumerate(CLASSES) for _ in names])
    queries = TextQueries(
        features=torch.from_numpy(PUBLISHED["queries"]),
        class_index=class_index,
        names=tuple(names[0] for names in CLASSES),
    )
    monkeypatch.setattr(segmentor, "encode", lambda *_, **__: queries)
    preset = protocol.preset(family, dataset)
    if variant == ["no_pamr"]:
        preset = preset.override(pamr_steps=0)

    picture = VECTORS / f"published-{number}.png"
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
    assert result.counts.sum() == PUBLISHED[case].size
    assert 1 - result.accuracy() <= SHARE
    assert np.count_nonzero(result.counts.sum(axis=1)) > 1
