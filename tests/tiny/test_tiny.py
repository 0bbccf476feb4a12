"""The embedded model: its scenes, its training and what it learnt."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fsa import tiny
from fsa.tiny import compose, train
from fsa.tiny.captions import caption
from fsa.tiny.pictographs import PAINTED, TRAIN_STYLES, UNSEEN_STYLE
from fsa.tiny.plan import CROP, FULL, SMALL, Plan, View
from fsa.tiny.scenes import Composer, Sprites
from fsa.tiny.vocabulary import CLASSES, OBJECTS, TEXTURES

SIZE = (96, 128)


def disc(colour):
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((2, 2, 61, 61), fill=colour)
    return image


@pytest.fixture(scope="module")
def pictographs(tmp_path_factory):
    """Pictographs that the test draws itself: opaque discs, each in its own colour."""
    folder = tmp_path_factory.mktemp("pictographs")
    for style in ("discs", UNSEEN_STYLE, *TRAIN_STYLES):
        (folder / style).mkdir()
        for index, entry in enumerate(OBJECTS):
            colour = (index, 255 - index, (index * 37) % 256, 255)
            disc(colour).save(folder / style / f"{entry.codepoint}.png")
    return folder


@pytest.fixture(scope="module")
def sprites(pictographs):
    return Sprites(pictographs, ["discs"])


@pytest.fixture(scope="module")
def composer(sprites):
    return Composer(sprites, SIZE, seed=5, object_sizes=(30, 60), most_objects=3)


def test_a_scene_is_made_from_its_seed_and_index_only(sprites, composer):
    again = Composer(sprites, SIZE, seed=5, object_sizes=(30, 60), most_objects=3)
    together = composer.compose([3, 7, 2])
    for row, index in ((1, 7), (2, 2)):
        by_itself = again.compose([index])
        assert torch.equal(together.pictures[row], by_itself.pictures[0])
        assert torch.equal(together.masks[row], by_itself.masks[0])
        assert together.objects[row] == by_itself.objects[0]
    other = Composer(sprites, SIZE, seed=6, object_sizes=(30, 60), most_objects=3)
    assert not torch.equal(other.compose([2]).pictures[0], together.pictures[2])


def test_masks_are_exact(sprites):
    """Scenes with their only object made transparent differ just where masks say objects are."""
    clear = Sprites.__new__(Sprites)
    clear.__dict__ = {**vars(sprites), "levels": [torch.zeros_like(x) for x in sprites.levels]}
    scenes, without = (
        Composer(s, SIZE, seed=9, object_sizes=(40, 60)).compose(range(5), objects=1)
        for s in (sprites, clear)
    )
    assert scenes.pictures.shape == (5, 3, *SIZE)
    for row in range(5):
        (thing,) = scenes.objects[row]
        changed = (scenes.pictures[row] != without.pictures[row]).any(dim=0)
        inside = scenes.masks[row] == thing
        assert set(scenes.masks[row].unique().tolist()) <= {thing, *scenes.textures[row]}
        # Within a pixel: the edge of a disc is blended.
        assert (inside & ~changed).float().mean() < 0.002
        assert (changed & ~inside).sum() < 0.2 * inside.sum()


def test_captions_name_what_is_there_and_nothing_else(composer):
    rng = np.random.default_rng(0)
    scenes = composer.compose(range(60))
    named = 0
    for objects, textures in zip(scenes.objects, scenes.textures, strict=True):
        sentence = f" {caption(objects, textures, rng).rstrip('.').replace(',', '')} "
        present = {*objects, *textures}
        found = {
            i
            for i, entry in enumerate(CLASSES)
            if any(f" {name} " in sentence for name in entry.names)
        }
        # A name may be the end of another's: "flower" in "tulip flower".
        assert found & present, sentence
        unseen = [n for e in CLASSES for n in e.unseen_synonyms if f" {n} " in sentence]
        assert all(any(n in name for i in present for name in CLASSES[i].names) for n in unseen)
        named += len(found & present) / len(present)
    assert 0.4 < named / 60 < 0.95  # Often, but not always all.


def test_a_scene_may_be_all_ground(sprites):
    composer = Composer(sprites, (64, 64), seed=5, fewest_objects=0, most_objects=0)
    scenes = composer.compose([0])
    assert scenes.objects == [()]
    sentence = caption((), scenes.textures[0], np.random.default_rng(0))
    assert any(name in sentence for i in scenes.textures[0] for name in CLASSES[i].names)


def test_every_object_comes_first_once_in_an_epoch(composer):
    masks = composer.compose(range(len(OBJECTS)), objects=1).masks
    assert len(masks.unique()) == len(CLASSES)


def test_a_missing_pictograph_is_named(pictographs):
    with pytest.raises(FileNotFoundError, match=OBJECTS[0].codepoint):
        Sprites(pictographs, ["nobody"])


def test_half_of_the_objects_are_painted_anew_and_half_are_as_given(pictographs, tmp_path):
    """Two given drawings and three painted ones: each half is shared equally."""
    for entry in OBJECTS:
        for file in (f"given/{entry.codepoint}-a", f"given/{entry.codepoint}-b"):
            (tmp_path / "given").mkdir(exist_ok=True)
            disc("red").save(tmp_path / f"{file}.png")
        (tmp_path / PAINTED).mkdir(exist_ok=True)
        for number in range(3):
            disc("blue").save(tmp_path / PAINTED / f"{entry.codepoint}-{number}.png")
    sprites = Sprites(tmp_path, ["given", PAINTED])
    uniform = np.linspace(0, 1, 1200, endpoint=False)
    chosen = sprites.choose(np.full(1200, 7), uniform) - sprites.first[7]
    assert np.bincount(chosen).tolist() == [300, 300, 200, 200, 200]
    is_blue = sprites.levels[0][sprites.first[7] :, 2, 32, 32][:5] == 255
    assert is_blue.tolist() == [False, False, True, True, True]
    given = Sprites(tmp_path, ["given"])
    chosen = given.choose(np.full(1200, 7), uniform) - given.first[7]
    assert np.bincount(chosen).tolist() == [600, 600]


def test_the_vocabulary_is_without_repeats():
    names = [name for entry in CLASSES for name in (*entry.names, *entry.unseen_synonyms)]
    assert len(names) == len(set(names))
    assert len(OBJECTS) == 64
    assert len(TEXTURES) == 8
    assert all(len(entry.codepoint) in (4, 5) for entry in OBJECTS)
    assert all(entry.unseen_synonyms for entry in CLASSES)


def test_no_split_has_the_seed_of_training_or_of_another():
    splits = (compose.VALIDATION, *compose.TESTS, *compose.SINGLES, compose.GUARD)
    seeds = [split.seed for split in splits]
    assert len({Plan().seed, *seeds}) == len(seeds) + 1
    for split in compose.TESTS:
        names = {name for entry in CLASSES for name in entry.names}
        assert split.synonyms == names.isdisjoint(split.class_names)
    assert UNSEEN_STYLE not in TRAIN_STYLES


def test_a_split_is_written_as_a_folder(pictographs, tmp_path):
    split = compose.TESTS[2]
    compose.compose_split(split, pictographs, tmp_path, count=3)
    classes = (tmp_path / "classes.txt").read_text().splitlines()
    assert classes == list(split.class_names)
    entries = json.loads((tmp_path / "scenes.json").read_text())
    assert len(entries) == 3
    for entry in entries:
        with Image.open(tmp_path / entry["picture"]) as picture:
            assert picture.size == (224, 224)
        with Image.open(tmp_path / entry["mask"]) as mask:
            present = np.unique(np.asarray(mask))
        assert entry["classes"] == [classes[i] for i in present]
        assert entry["caption"]


@pytest.mark.slow
def test_scenes_for_the_demo_and_the_guard_have_masks_of_their_own_classes(pictographs, tmp_path):
    compose.compose_demo(pictographs, tmp_path / "demo")
    compose.compose_guard(pictographs, tmp_path / "guard")
    for folder, count in (("demo", 6), ("guard", compose.GUARD_PICTURES)):
        entries = json.loads((tmp_path / folder / "scenes.json").read_text())
        assert len(entries) == count
        for entry in entries:
            with Image.open(tmp_path / folder / entry["mask"]) as mask:
                present = set(np.unique(np.asarray(mask)))
            asked = set(range(len(entry["classes"])))
            assert present < asked if folder == "guard" else present == asked


def test_a_step_shows_what_its_seed_and_number_say():
    plan = Plan(steps=1000, shares=(0.7, 0.3, 0, 0), whole=0.2, whole_shares=(0, 0.4, 0, 0.6))
    views = [plan.view(step) for step in range(plan.steps)]
    assert views == [plan.view(step) for step in range(plan.steps)]
    assert 0.6 < sum(view.size == CROP.size for view in views[:800]) / 800 < 0.8
    assert {view.parts for view in views[:800]} == {CROP.parts, SMALL.parts}
    assert {view.parts for view in views[800:]} == {1}
    assert {view.size for view in views[800:]} == {SMALL.size, FULL.size}
    other = replace(plan, seed=1)
    assert views != [other.view(step) for step in range(plan.steps)]


def test_the_rate_rises_stays_and_falls_to_nothing():
    plan = Plan(steps=100, warmup=10, decay=0.5, learning_rate=2.0)
    rates = [plan.rate(step) for step in range(101)]
    assert rates[9:51] == [2.0] * 42
    assert rates[0] == pytest.approx(0.2)
    assert rates[75] == pytest.approx(1.0)
    assert rates[100] == 0


def test_a_scene_is_encoded_as_the_model_does():
    model = tiny.load()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 224, 224), generator=generator, dtype=torch.uint8)
    images = train.normalise(pictures)
    features = train.encode_scene(model, images, generator)
    torch.testing.assert_close(features, model.encode_image(images, normalize=True))
    # The mean over patches and no attention between them would not notice their places.
    assert not torch.allclose(train.encode_scene(model, images.flip(3), generator), features)


def test_a_part_of_a_scene_is_its_patches_at_their_places():
    """Patches that are not in a part can be anything."""
    model, parts, side = tiny.load(), 3, 224
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    def encoded(pictures, part):
        return train.encode_scene(model, pictures, placement(), part, parts)

    def placement():
        return torch.Generator().manual_seed(1)

    generator = placement()
    for _ in range(2):  # The place on the grid is drawn first.
        torch.randint(1, (), generator=generator)
    dealt = train.deal(196, 2, generator, parts)
    for row in range(2):
        places = torch.cat([part[row] for part in dealt])
        assert sorted(places.tolist()) == list(range(196))
    others = images.clone()
    for row, places in enumerate(dealt[1].tolist()):
        for place in places:
            y, x = 16 * (place // 14), 16 * (place % 14)
            others[row, :, y : y + 16, x : x + 16] = 0
    for part in (0, 2):
        torch.testing.assert_close(encoded(others, part), encoded(images, part))
    assert not torch.allclose(encoded(others, 1), encoded(images, 1), atol=0.01)


def test_groups_of_a_batch_are_compared_with_themselves_only():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(12, 5, generator=generator) for _ in range(2))
    loss, matched = train.contrastive_loss(images, texts, 10.0, groups=3)
    by_themselves = [
        train.contrastive_loss(images[rows], texts[rows], 10.0)
        for rows in torch.arange(12).split(4)
    ]
    losses, shares = zip(*by_themselves, strict=True)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(matched, torch.stack(shares).mean())
    logits = 10 * images[:4] @ texts[:4].T
    expected = -(logits.log_softmax(0).diag().mean() + logits.log_softmax(1).diag().mean()) / 2
    torch.testing.assert_close(losses[0], expected)


# Muon came with torch 2.9.
trains = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="training needs torch.optim.Muon, of torch 2.9"
)


def view(size, **changes):
    settings = {"object_sizes": (20, 40), "most_objects": 2, "groups": 1, **changes}
    return View(size=size, **settings)


SHORT = Plan(
    steps=4,
    views=(view(48), view(64, parts=2)),
    shares=(0.5, 0.5),
    warmup=1,
    workers=0,
    save_every=1,
    whole=0.3,
    whole_shares=(0.5, 0.5),
)


@trains
@pytest.mark.slow
def test_training_goes_on_where_it_was_stopped(sprites, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    whole = train.train(sprites, tmp_path / "whole", SHORT, cpu, progress=False)

    class Stopped(Exception):
        pass

    update = train._update

    def stopping(model, optimizers, images, tokens, plan, step):
        if step == 1:
            raise Stopped
        return update(model, optimizers, images, tokens, plan, step)

    monkeypatch.setattr(train, "_update", stopping)
    with pytest.raises(Stopped):
        train.train(sprites, tmp_path / "parts", SHORT, cpu, progress=False)
    monkeypatch.setattr(train, "_update", update)
    parts = train.train(sprites, tmp_path / "parts", SHORT, cpu, progress=False)
    from safetensors.torch import load_file

    none = train.train(sprites, tmp_path / "none", replace(SHORT, steps=0), cpu, progress=False)
    before, first, second = (load_file(file) for file in (none, whole, parts))
    assert first.keys() == tiny.load().state_dict().keys()
    # Muon makes much of rounding where a gradient is near 0, so what is compared is the way that
    # all weights went.
    moved = sum(float((first[name] - before[name]).square().sum()) for name in first)
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    assert apart < 0.01 * moved
    assert whole.with_suffix(".sha256").read_text().endswith("tiny.safetensors\n")


@trains
@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_training_lowers_the_loss(sprites, tmp_path, monkeypatch, parts):
    crop = view(64, object_sizes=(40, 60), most_objects=1, parts=parts)
    losses = []
    update = train._update

    def recording(*arguments):
        losses.append(update(*arguments)[0])
        return losses[-1], 0.0

    monkeypatch.setattr(train, "_update", recording)
    plan = Plan(
        steps=24,
        views=(crop,),
        shares=(1.0,),
        whole_shares=(1.0,),
        warmup=4,
        workers=0,
        learning_rate=1e-3,
    )
    train.train(sprites, tmp_path, plan, torch.device("cpu"), progress=False)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2


def test_demo_scenes_are_labelled_throughout():
    scenes = tiny.demo_scenes()
    assert len(scenes) >= 4
    for scene in scenes:
        with Image.open(scene.picture) as picture, Image.open(scene.mask) as mask:
            assert picture.size == mask.size
            assert set(np.unique(np.asarray(mask))) == set(range(len(scene.classes)))
    assert len({Image.open(scene.picture).size for scene in scenes}) > 1
