from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fsa import InputError
from fsa.classes import parse_class_text, parse_classes
from fsa.models.loading import load_model
from fsa.models.text import OPENAI_IMAGENET_TEMPLATES, TextEncoder


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(load_model())


@torch.no_grad()
def test_a_feature_is_the_mean_over_the_eighty_templates(encoder):
    queries = encoder.encode(["cat", ["dog", "hound"]])
    loaded = encoder._loaded
    assert len(OPENAI_IMAGENET_TEMPLATES) == 80
    for row, name in enumerate(("cat", "dog", "hound")):
        texts = loaded.tokenizer([template(name) for template in OPENAI_IMAGENET_TEMPLATES])
        unit = functional.normalize(loaded.model.encode_text(texts), dim=-1)
        expected = functional.normalize(unit.mean(dim=0), dim=-1)
        torch.testing.assert_close(queries.features[row], expected, rtol=1e-4, atol=1e-5)
    assert queries.class_index.tolist() == [0, 1, 1]
    assert queries.names == ("cat", "dog")


def test_a_class_list_is_encoded_once_and_few_are_kept(encoder):
    assert encoder.encode(["cat", "dog"]) is encoder.encode(("cat", "dog"))
    first = encoder.encode(["tree"])
    for number in range(32):
        encoder.encode([f"thing {number}"])
    assert encoder.encode(["tree"]) is not first
    assert len(encoder._cache) == 32


def test_a_feature_does_not_depend_on_the_other_names(encoder):
    together = TextEncoder(encoder._loaded).encode(["cat", "traffic light on a pole", "bus"])
    for row, name in ((0, "cat"), (2, "bus")):
        by_itself = TextEncoder(encoder._loaded).encode([name])
        assert torch.equal(by_itself.features[0], together.features[row])


def test_one_line_of_classes():
    assert parse_class_text("cat; dog, puppy ;grass;") == [["cat"], ["dog", "puppy"], ["grass"]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes is empty"),
        ("cat", "must be a list of names"),
        (None, "must be a list of names"),
        (["cat", ""], "which is not a name"),
        (["cat", 3], "3"),
        ([["cat", None]], "None"),
        ([[]], "without a name"),
        (["cat", "Cat "], "'Cat' twice"),
        (["cat", ["dog", "cat"]], "'cat' twice"),
    ],
)
def test_bad_class_lists_are_refused_in_words(classes, message):
    with pytest.raises(InputError, match=message):
        parse_classes(classes)
