"""Pictures of every kind come out as (3,H,W) uint8, or are refused in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fsa import InputError
from fsa.pictures.reading import list_pictures, read_image

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_a_file_comes_out_as_it_is(tmp_path):
    file = tmp_path / "small cat.png"
    Image.fromarray(RGB).save(file)
    picture = read_image(file)
    assert picture.name == "small cat"
    assert np.array_equal(picture.rgb.permute(1, 2, 0).numpy(), RGB)
    assert read_image(str(file)).rgb.dtype == torch.uint8


def test_pillow_arrays_and_tensors_agree():
    expected = torch.from_numpy(RGB).permute(2, 0, 1)
    sources = (
        Image.fromarray(RGB),
        RGB,
        RGB.astype(np.float32) / 255,
        RGB.astype(np.uint16) * 257,
        expected,
        expected.float() / 255,
    )
    for source in sources:
        assert torch.equal(read_image(source).rgb, expected)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # Turned a quarter to the right.
    file = tmp_path / "turned.png"
    image.save(file, exif=exif)
    assert read_image(file).rgb.shape == (3, 6, 4)
    assert np.array_equal(read_image(file).rgb.permute(1, 2, 0).numpy(), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), 7),
        (np.full((2, 3, 1), 7, np.uint8), 7),
        (np.full((2, 3), 65535, np.uint16), 255),
        (np.full((2, 3), 32768, np.uint16), 128),
        (np.full((2, 3), 255, np.uint16), 1),
        (np.dstack([np.full((2, 3, 3), 9, np.uint8), np.zeros((2, 3), np.uint8)]), 255),
        (np.dstack([np.full((2, 3, 3), 9, np.uint8), np.full((2, 3), 255, np.uint8)]), 9),
    ],
)
def test_grey_deep_and_transparent_arrays(array, expected):
    assert (read_image(array).rgb == expected).all()
    assert read_image(array).rgb.shape == (3, 2, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_every_mode_of_pillow_is_read(mode, tmp_path):
    grey = Image.new("L", (5, 4), 255 if mode == "1" else 200)
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((4, 5), 200 * 257, np.uint16))
        image = image.convert("I") if mode == "I" else image
    else:
        image = grey.convert("RGB").convert(mode)
    rgb = read_image(image).rgb
    assert rgb.shape == (3, 4, 5)
    expected = 255 if mode == "1" else 200
    # The default palette of mode P has steps of 51.
    assert (rgb.int() - expected).abs().max() <= 4


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (read_image(image).rgb == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    file = tmp_path / "p.png"
    palette.save(file)
    assert (read_image(file).rgb == 255).all()


def test_one_pixel_is_a_picture():
    assert read_image(Image.new("RGB", (1, 1), "red")).rgb.flatten().tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures_are_refused_by_name(content, tmp_path):
    file = tmp_path / "odd.png"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"odd\.png"):
        read_image(file)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_refused_by_name(kind, tmp_path):
    whole = tmp_path / f"whole.{kind.lower()}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, kind)
    cut = tmp_path / f"cut.{kind.lower()}"
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError, match=r"cut\."):
        read_image(cut)


def test_missing_files_and_directories_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="this is a directory"):
        read_image(tmp_path)


def test_enormous_pictures_are_refused_before_they_are_decoded(tmp_path):
    file = tmp_path / "huge.png"
    Image.new("1", (3000, 2000)).save(file)
    with pytest.raises(InputError, match=r"huge\.png: the picture of 3000 x 2000 has more than 5"):
        read_image(file, max_pixels=5_000_000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 5), np.uint8), r"it has shape \(2, 3, 5\)"),
        (np.zeros((0, 3, 3), np.uint8), "it has shape"),
        (np.zeros((2, 3), np.int64), "not int64"),
        (np.full((2, 3), 1.5), r"values in \[0, 1\]"),
        (np.full((2, 3), np.nan), r"values in \[0, 1\]"),
        (torch.zeros(1, 3, 4, 4), r"shape \(1, 3, 4, 4\)"),
        (42, "not int"),
        (None, "not NoneType"),
    ],
)
def test_values_that_are_no_pictures_are_refused_in_words(source, message):
    with pytest.raises(InputError, match=message):
        read_image(source)


def test_directories_are_listed_in_order(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    single = tmp_path / "notes.txt"
    assert list_pictures([tmp_path, single]) == [tmp_path / "a.JPG", tmp_path / "b.png", single]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        list_pictures([empty])
    with pytest.raises(InputError, match="no such file or directory"):
        list_pictures([tmp_path / "gone"])
