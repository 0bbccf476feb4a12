"""The embedded model: its scenes, its training and what it learnt."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fsa import tiny
from fsa.tiny import compose, train
from fsa.tiny.captions import caption
from fsa.tiny.pictographs import TRAIN_STYLES, UNSEEN_STYLE
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


def test_the_vocabulary_is_without_repeats():
    names = [name for entry in CLASSES for name in (*entry.names, *entry.unseen_synonyms)]
    assert len(names) == len(set(names))
    assert len(OBJECTS) >= 150
    assert len(TEXTURES) == 8
    assert all(len(entry.codepoint) in (4, 5) for entry in OBJECTS)
    assert all(entry.unseen_synonyms for entry in CLASSES)


def test_no_split_has_the_seed_of_training_or_of_another():
    splits = (compose.VALIDATION, *compose.TESTS, *compose.SINGLES, compose.GUARD)
    seeds = [split.seed for split in splits]
    assert len({train.Plan().seed, *seeds}) == len(seeds) + 1
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


SHORT = train.Plan(crop_steps=2, small_steps=1, full_steps=1, warmup=1, workers=0, save_every=1)


def phase(size, batch, **changes):
    settings = {"object_sizes": (20, 40), "fewest_objects": 1, "most_objects": 2, **changes}
    return train.Phase(size=size, batch=batch, **settings)


@pytest.mark.slow
def test_training_goes_on_where_it_was_stopped(sprites, tmp_path, monkeypatch):
    for name, size in (("CROP", 48), ("SMALL", 64), ("FULL", 80)):
        monkeypatch.setattr(train, name, phase(size, batch=4, fewest_objects=0))
    cpu = torch.device("cpu")
    whole = train.train(sprites, tmp_path / "whole", SHORT, cpu, progress=False)

    class Stopped(Exception):
        pass

    update = train._update

    def stopping(model, optimizer, images, tokens, plan, step):
        if step == 1:
            raise Stopped
        return update(model, optimizer, images, tokens, plan, step)

    monkeypatch.setattr(train, "_update", stopping)
    with pytest.raises(Stopped):
        train.train(sprites, tmp_path / "parts", SHORT, cpu, progress=False)
    monkeypatch.setattr(train, "_update", update)
    parts = train.train(sprites, tmp_path / "parts", SHORT, cpu, progress=False)
    from safetensors.torch import load_file

    first, second = load_file(whole), load_file(parts)
    assert first.keys() == tiny.load().state_dict().keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, msg=name)
    assert whole.with_suffix(".sha256").read_text().endswith("tiny.safetensors\n")


@pytest.mark.slow
def test_training_lowers_the_loss(sprites, tmp_path, monkeypatch):
    crop = phase(64, batch=16, object_sizes=(40, 60), most_objects=1)
    monkeypatch.setattr(train, "CROP", crop)
    losses = []
    update = train._update

    def recording(*arguments):
        losses.append(update(*arguments)[0])
        return losses[-1], 0.0

    monkeypatch.setattr(train, "_update", recording)
    plan = train.Plan(
        crop_steps=24, small_steps=0, full_steps=0, warmup=4, workers=0, learning_rate=1e-3
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
