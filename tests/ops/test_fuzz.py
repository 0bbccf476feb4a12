"""Files changed at random, by a seeded generator: a picture, a class list, or an `InputError`."""

from __future__ import annotations

import random
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fsa import InputError
from fsa.classes import parse_classes, read_class_file
from fsa.pictures.reading import read_image

KINDS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"]
SECONDS_EACH = 1.5
ROUNDS = 400


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in; numbers at the end of their range."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        # Headers are short, and most of what can go wrong is in them.
        at = rng.randrange(min(len(content), 80) if rng.random() < 0.6 else len(content))
        length = rng.choice((1, 2, 4, 16))
        change = rng.randrange(5)
        if change == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            content[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
        elif change == 2:
            del content[at : at + length]
        elif change == 3:
            content[at:at] = content[at : at + length]
        else:
            content = content[: max(at, 1)]
        if not content:
            return b"\x00"
    return bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_pictures_are_read_or_refused(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    file = tmp_path / "picture"
    image = Image.fromarray(noise)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, kind, **({} if kind in ("BMP", "GIF", "PPM", "JPEG2000") else {"exif": exif}))
    whole = file.read_bytes()
    rng = random.Random(kind)
    read = refused = 0
    end = time.monotonic() + SECONDS_EACH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(ROUNDS):
            if number and time.monotonic() > end:
                break
            file.write_bytes(mutated(whole, rng))
            try:
                picture = read_image(file, max_pixels=1_000_000)
            except InputError as error:
                refused += 1
                assert str(error).startswith(f"{file}: "), error  # noqa: PT017
            else:
                read += 1
                assert picture.rgb.dtype == torch.uint8
                assert picture.rgb.shape[0] == 3
                assert 0 < picture.rgb[0].numel() <= 1_000_000
    assert read + refused > 1
    assert refused


PIECES = [b"cat", b",", b"\n", b";", b"\r\n", b" ", b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf"]
PIECES += ["é".encode(), "猫".encode(), "😀".encode(), b"\xed\xa0\x80", "\u2028".encode()]
PIECES += [b"x" * 1001, b"dog", b"\x1b", b"\x85", "\u0301".encode(), b"#", b'"', b"\\n"]


def test_class_files_at_random_are_read_or_refused(tmp_path):
    file = tmp_path / "classes.txt"
    rng = random.Random(0)
    read = refused = 0
    end = time.monotonic() + 3
    for number in range(3000):
        if number and time.monotonic() > end:
            break
        file.write_bytes(b"".join(rng.choices(PIECES, k=rng.randrange(12))))
        try:
            classes = read_class_file(file)
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"{file}: "), error  # noqa: PT017
        else:
            read += 1
            # What was read is what any other door takes, and can be written and drawn.
            assert parse_classes(classes) == tuple(map(tuple, classes))
            for name in (name for synonyms in classes for name in synonyms):
                assert name == name.strip() != ""
                assert name.encode().decode() == name
                assert len(name.splitlines()) == 1
    assert read
    assert refused
