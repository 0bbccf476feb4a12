"""The embedded model's quality, and what feedback adds to it, on held-out scenes.

`python -m bench guards` measures the margins. Where the gain's least value is above 0, the gain
itself is guarded; where it is below, feedback is guarded against costing more than it does.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench.quality import guards
from bench.quality import run as quality
from bench.quality import tables as quality_tables
from fsa import load_segmentor
from fsa.evaluation import metrics
from fsa.hosts import LastBlock
from fsa.models import text
from fsa.segment.inspection import attention_matrix, attentions
from fsa.tiny.compose import GUARD
from fsa.tiny.vocabulary import CLASSES


@pytest.fixture(scope="module")
def segmentor():
    return load_segmentor(device="cpu")


@pytest.mark.parametrize("host", guards.HOSTS)
def test_quality_and_the_gain_of_feedback_are_kept(segmentor, host):
    least = json.loads(guards.FILE.read_text())[host]
    scores = guards.scores(segmentor.with_host(host))
    for name, score in scores.items():
        assert score >= least[name]["least"], name
    # Feedback that does nothing is a gain lost, whatever its sign.
    assert scores["gain"] != 0


@pytest.fixture(scope="module")
def evaluator():
    return quality.Evaluator()


def test_the_evaluation_labels_as_the_segmentor_does(segmentor, evaluator):
    entry = json.loads((guards.SCENES / "scenes.json").read_text())[3]
    segmentor = segmentor.with_host("sclip")
    result = segmentor.segment(guards.SCENES / entry["picture"], entry["classes"])
    text_features = evaluator.text(entry["classes"])
    crops = evaluator.crops(result.picture.rgb)
    features = evaluator.hosts["sclip"].features(crops, text_features, config=segmentor.config)
    expected = evaluator.sampled(torch.from_numpy(result.labels))
    # Rounding may turn a pixel between two classes.
    assert (evaluator.labels(features, text_features) == expected).mean() > 0.995


def test_mean_iou_is_that_of_the_whole_confusion():
    rng = np.random.default_rng(0)
    areas, whole = quality.Areas(), np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    for picture in range(3):
        # Class 8 is in the second picture only; no picture has class 9, whatever is labelled.
        truth, labels = rng.integers(0, 6, 400), rng.integers(0, 10, 400)
        truth[:50] = 8 if picture == 1 else 0
        areas.add(labels, truth)
        whole += metrics.confusion(labels, truth, len(CLASSES))
    occur = whole.sum(axis=1) > 0
    expected = 100 * metrics.iou(whole)[occur].mean()
    assert areas.mean_iou(quality.resamples(3))[0] == pytest.approx(expected)
    without_second = areas.mean_iou(np.array([[1, 0, 1]]))[0]
    assert without_second == pytest.approx(_mean_iou_of(areas, (0, 2)))
    assert areas.first(2).mean_iou(np.ones((1, 2)))[0] == pytest.approx(_mean_iou_of(areas, (0, 1)))


def _mean_iou_of(areas, pictures):
    right, labelled, true = (
        sum(getattr(areas, name)[i] for i in pictures) for name in ("right", "labelled", "true")
    )
    occur = true > 0
    return 100 * (right[occur] / (labelled + true - right)[occur]).mean()


def test_intervals_hold_the_value_and_narrow_with_pictures():
    rng = np.random.default_rng(0)
    widths = []
    for pictures in (20, 320):
        outcome = rng.random(pictures) < 0.7
        weights = quality.resamples(pictures)
        interval = quality.with_interval(100 * (weights @ outcome) / pictures)
        assert interval["low"] < interval["value"] < interval["high"]
        widths.append(interval["high"] - interval["low"])
    assert 3 < widths[0] / widths[1] < 5.5  # The square root of 16.


def test_retention_and_purity_of_a_case_by_hand():
    # Two patches of one class that attend to each other, and one of another that attends to them.
    attention = torch.tensor([[[0.0, 0.9, 0.1], [0.6, 0.3, 0.1], [0.5, 0.3, 0.2]]])
    labels = torch.tensor([[4, 4, 7]])
    assert quality.retention(attention, labels, 1) == pytest.approx(2 / 3)
    assert quality.retention(attention, labels, 5) == pytest.approx(1 / 3)
    assert quality.purity(attention, labels) == pytest.approx((0.9 + 0.9 + 0.2) / 3)


@pytest.mark.parametrize("host", ["maskclip", "sclip", "clearclip", "proxyclip"])
def test_the_attention_that_is_shown_is_the_one_that_is_applied(segmentor, evaluator, host):
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (3, 224, 224), generator=generator, dtype=torch.uint8)
    crops = evaluator.crops(picture)[:2]
    module = evaluator.hosts[host]
    vfm_features = evaluator.vfm(crops) if module.needs_vfm else None
    config = segmentor.with_host(host).config
    block = LastBlock(module.tower, crops, module.tower.trunk(crops), vfm_features)
    attention = module.attention(block, config)
    matrix = attention_matrix(attention)
    # Values that are the same in every head see the mean over the heads.
    value = attention.value.mean(dim=1, keepdim=True).expand_as(attention.value)
    apply = attention.apply or torch.nn.Identity()
    applied = apply(value) - apply(torch.zeros_like(value))
    torch.testing.assert_close(applied.mean(dim=1), matrix @ value[:, 0], atol=1e-4, rtol=1e-4)

    queries = evaluator.text(["cat", "grass", "brick"])
    seen = attentions(module, crops, queries, vfm_features=vfm_features, config=config)
    plain = module.features(crops, queries, vfm_features=vfm_features, config=config)
    torch.testing.assert_close(seen.features, plain)
    torch.testing.assert_close(seen.feedback.sum(dim=-1), torch.ones(2, matrix.shape[-1]))
    if host != "maskclip":
        torch.testing.assert_close(
            seen.adapted, (seen.feedback @ matrix + matrix @ seen.feedback + seen.feedback) / 3
        )


def test_a_run_is_recorded_and_becomes_tables(tmp_path, monkeypatch, evaluator):
    pictures = guards.scenes()[:2]
    names = [entry.name for entry in CLASSES]

    def scenes(split, pictographs, count):
        for picture, mask, classes in pictures:
            known = np.array([names.index(name) for name in classes])
            yield torch.tensor(picture).permute(2, 0, 1), torch.from_numpy(known[mask])

    monkeypatch.setattr(quality, "_scenes", scenes)
    monkeypatch.setattr(quality, "SINGLES", ())
    monkeypatch.setattr(quality, "TESTS", (GUARD,))
    monkeypatch.setattr(quality, "Evaluator", lambda: evaluator)
    # All names with all templates take a while.
    monkeypatch.setattr(text, "OPENAI_IMAGENET_TEMPLATES", text.OPENAI_IMAGENET_TEMPLATES[:2])
    file = tmp_path / "quality.json"
    quality.run(tmp_path, file, pictures=2)
    record = json.loads(file.read_text())
    assert record["environment"]["commit"]
    (split,) = record["splits"]
    whats = {(s["host"], s["protocol"]): 0 for s in split["scores"]}
    assert len(whats) == len(quality.HOSTS) * len(quality.PROTOCOLS)
    monkeypatch.setattr(quality_tables, "FILE", file)
    made = quality_tables.tables()
    score = next(s for s in split["scores"] if (s["host"], s["what"]) == ("sclip", "published"))
    line = next(s for s in made["quality-hosts"].splitlines() if s.startswith("| SCLIP"))
    assert f"| {score['baseline']['value']:.1f} | {score['fsa']['value']:.1f} |" in line
    assert len(made["quality-pruning"].splitlines()) == 2 + 9
    monkeypatch.setattr(quality_tables, "FILE", tmp_path / "none.json")
    assert set(quality_tables.tables().values()) == {"not measured"}
