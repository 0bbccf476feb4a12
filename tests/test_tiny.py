"""The embedded model: its scenes, its training and what it learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fsa import tiny
from fsa.tiny import train
from fsa.tiny.scenes import Composer, caption
from fsa.tiny.vocabulary import CLASSES, OBJECTS, TEXTURES


@pytest.fixture(scope="module")
def sprites():
    """Pictographs that the test draws itself: opaque discs, each in its own colour."""
    drawn = {}
    for index, entry in enumerate(OBJECTS):
        image = Image.new("RGBA", (64, 64))
        colour = (index * 2, 255 - index * 2, (index * 37) % 256, 255)
        ImageDraw.Draw(image).ellipse((2, 2, 61, 61), fill=colour)
        drawn[entry.codepoint] = [image]
    return drawn


@pytest.fixture(scope="module")
def composer(sprites):
    return Composer(sprites, (96, 128), seed=5, object_sizes=(30, 60), most_objects=3)


def test_a_scene_is_made_from_its_seed_and_index_alone(sprites, composer):
    again = Composer(sprites, (96, 128), seed=5, object_sizes=(30, 60), most_objects=3)
    composer.scene(3)
    for index in (7, 2):
        first, second = composer.scene(index), again.scene(index)
        assert np.array_equal(first.picture, second.picture)
        assert np.array_equal(first.mask, second.mask)
    other = Composer(sprites, (96, 128), seed=6, object_sizes=(30, 60), most_objects=3)
    assert not np.array_equal(other.scene(2).picture, composer.scene(2).picture)


def test_masks_are_exact(sprites):
    """The same scene with one object taken out differs only where the mask says the object is."""
    composer = Composer(sprites, (96, 128), seed=9, object_sizes=(40, 60))
    for index in range(5):
        scene = composer.scene(index, objects=1)
        assert scene.picture.shape == (96, 128, 3)
        (thing,) = scene.objects
        hidden = {**sprites, OBJECTS[thing].codepoint: [Image.new("RGBA", (64, 64))]}
        without = Composer(hidden, (96, 128), seed=9, object_sizes=(40, 60)).scene(index, objects=1)
        changed = (scene.picture != without.picture).any(axis=-1)
        inside = scene.mask == thing
        assert set(np.unique(scene.mask)) == {thing, *scene.textures}
        # Within a pixel: the edge of a disc is blended.
        assert (inside & ~changed).mean() < 0.002
        assert (changed & ~inside).sum() < 0.15 * inside.sum()


def test_captions_name_what_is_there_and_nothing_else(composer):
    rng = np.random.default_rng(0)
    named = 0
    for index in range(60):
        scene = composer.scene(index)
        sentence = f" {caption(scene, rng).rstrip('.').replace(',', '')} "
        present = {*scene.objects, *scene.textures}
        found = {
            i
            for i, entry in enumerate(CLASSES)
            if any(f" {name} " in sentence for name in entry.names)
        }
        assert found & present, sentence
        named += len(found & present) / len(present)
    assert 0.4 < named / 60 < 0.95  # Often, but not always all.


def test_a_scene_may_be_all_ground(sprites):
    composer = Composer(sprites, (64, 64), seed=5, fewest_objects=0, most_objects=0)
    scene = composer.scene(0)
    assert scene.objects == ()
    sentence = caption(scene, np.random.default_rng(0))
    assert any(name in sentence for i in scene.textures for name in CLASSES[i].names)


def test_the_vocabulary_is_without_repeats():
    names = [name for entry in CLASSES for name in entry.names]
    assert len(names) == len(set(names))
    assert len(OBJECTS) >= 60
    assert len(TEXTURES) == 8
    assert all(len(entry.codepoint) in (4, 5) for entry in OBJECTS)


SHORT = train.Plan(crop_steps=2, small_steps=1, full_steps=1, warmup=1, workers=0, save_every=1)


def phase(size, batch, **changes):
    settings = {"object_sizes": (20, 40), "fewest_objects": 1, "most_objects": 2, **changes}
    return train.Phase(size=size, batch=batch, **settings)


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
