"""Files and names made to do harm, or broken beyond repair: each is refused in words."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from fsa import InputError, tiny
from fsa.classes import MAX_NAMES, parse_class_text, read_class_file
from fsa.draw.figures import beside_legend
from fsa.draw.lettering import _FONT_FILES, _missing, fonts, written
from fsa.models import guides as vfm
from fsa.models.loading import load_model
from fsa.models.tower import Tower
from fsa.pictures.reading import Picture, list_pictures, read_image
from tests.support.results import made_result
from tests.support.towers import SMALL_CLIP


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG whose header claims a size, whatever follows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


BOMBS = {
    "a.png": png(40_000, 40_000, bytes(1000)),
    "b.png": png(2**31 - 1, 2**31 - 1),
    "c.bmp": bmp(60_000, 60_000),
    "d.gif": gif(65_000, 65_000),
    "e.ppm": b"P6 99999 99999 255\n",
    # Between Pillow's warning, at 89 megapixels, and its error, at 179.
    "f.png": png(12_000, 10_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs_are_refused_by_our_limit_without_a_warning(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(BOMBS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            InputError, match=rf"{name}: the picture of \d+ x \d+ has more than 100"
        ):
            read_image(file)


@pytest.mark.parametrize("size", [(10_000, 9_500), (20_000, 10_000)])
def test_our_limit_rules_over_pillows(size, tmp_path):
    file = tmp_path / "large.png"
    file.write_bytes(png(*size))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Allowed by the caller, so it is decoded, and found to be cut off.
        with pytest.raises(InputError, match=r"large\.png: the picture cannot be read"):
            read_image(file, max_pixels=1_000_000_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_small_picture_with_much_hidden_text_is_refused(tmp_path):
    text = b"comment\x00\x00" + zlib.compress(bytes(80_000_000), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + text))
    file = tmp_path / "text.png"
    file.write_bytes(png(1, 1, b"\x00\x07", extra=chunk))
    with pytest.raises(InputError, match=r"text\.png: the picture cannot be read"):
        read_image(file)


MISLABELLED = {
    "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
    "document.jpg": b"%PDF-1.7\n1 0 obj\n",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "archive.png": b"PK\x03\x04" + bytes(60),
    "program.jpg": b"\x7fELF\x02\x01\x01" + bytes(60),
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "icon.png": b"\x00\x00\x01\x00\x01\x00" + bytes(60),
    "zeros.png": bytes(4096),
}


@pytest.mark.parametrize("name", MISLABELLED)
def test_files_that_only_are_called_pictures_are_refused(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(MISLABELLED[name])
    with pytest.raises(InputError, match=rf"{name}: not a picture in a format that is read"):
        read_image(file)


def test_the_content_decides_not_the_name(tmp_path):
    file = tmp_path / "really a png.jpg"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file, "PNG")
    assert read_image(file).rgb[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_a_pillow_picture_that_turns_out_to_be_cut_off_is_refused(kind, tmp_path):
    file = tmp_path / "cut"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    file.write_bytes(file.read_bytes()[:-2000])
    with (
        Image.open(file) as lazy,
        pytest.raises(InputError, match="the picture: the picture cannot be read"),
    ):
        read_image(lazy)


def test_damaged_streams_are_refused(tmp_path):
    file = tmp_path / "damaged.png"
    whole = png(64, 64, bytes(64 * 65))
    at = whole.index(b"IDAT") + 8
    file.write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
    with pytest.raises(InputError, match=r"damaged\.png: the picture cannot be read"):
        read_image(file)


@pytest.mark.parametrize("path", ["x" * 5000, "a" * 300 + ".png", "nul\0l.png", "\udcff.png"])
def test_paths_that_no_file_can_have_are_refused(path):
    for read in (read_image, lambda p: list_pictures([p]), read_class_file):
        with pytest.raises(InputError, match=r"cannot be|no such file"):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have names on POSIX only")
def test_pipes_and_devices_do_not_hang_the_run(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="a pipe or a device"):
        read_image(pipe)
    with pytest.raises(InputError, match="this is no file"):
        read_class_file(pipe)
    (tmp_path / "real.png").write_bytes(b"")
    assert list_pictures([tmp_path]) == [tmp_path / "real.png"]


def test_directories_called_like_pictures_are_not_listed(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "real.png").write_bytes(b"")
    assert list_pictures([tmp_path]) == [tmp_path / "real.png"]
    (tmp_path / "real.png").unlink()
    with pytest.raises(InputError, match="holds no pictures"):
        list_pictures([tmp_path])


# --------------------------------------------------------------------------------------------------
# Classes


def test_a_class_file_of_a_million_lines_is_refused(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(f"thing {i}" for i in range(1_000_000)))
    with pytest.raises(InputError, match=rf"classes\.txt: classes holds more than {MAX_NAMES}"):
        read_class_file(file)
    assert len(parse_class_text(";".join(f"thing {i}" for i in range(MAX_NAMES)))) == MAX_NAMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * ((1 << 24) + 1), "more than 16 MiB"),
        ("é".encode() * ((1 << 23) + 1), "more than 16 MiB"),
        (b"x" * 100_000, "a name of 100000 characters, which begins 'xxx"),
        (b"\xff\xfe\x00c\x00a", "not a text in UTF-8"),
        (b"cat\ndo\x00g\n", "control characters"),
        (b"cat\n\x1b[31mdog\n", "control characters"),
        (b"", "classes is empty"),
        (b"\n\n\n", "classes is empty"),
        (b"cat\ncat\n", "'cat' twice"),
        (b"cat,,dog\n", "not a name"),
        (b"\x80\x04\x95pickle", "not a text in UTF-8"),
    ],
)
def test_class_files_that_are_none_are_refused_by_name(content, message, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_class_file(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value)) < 400 + len(str(file))


def test_class_files_of_other_systems_are_read(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffcat,  big   cat\r\nchâteau\r\n猫\r\n\r\n".encode())
    assert read_class_file(file) == [["cat", "big cat"], ["château"], ["猫"]]


# --------------------------------------------------------------------------------------------------
# Checkpoints


class Malicious:
    """A pickle that would write a file when opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.write_text, (self.file, "executed"))


NAME = "fsa-hostile-vit"


@pytest.fixture
def load_either(monkeypatch):
    """Functions that load a file as a CLIP model and as a vision model, both small."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, SMALL_CLIP)
    monkeypatch.setitem(vfm._KNOWN, "dino", vfm._Known("test_vit.r160_in1k"))
    tower = Tower(open_clip.model.CLIP(**SMALL_CLIP).visual)
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return (
        lambda file: load_model(NAME, str(file), device="cpu"),
        lambda file: vfm.load_vfm("dino", tower=tower, pretrained=str(file), **statistics),
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "zip in front"])
def test_pickles_posing_as_checkpoints_are_refused_and_not_executed(
    kind, suffix, load_either, tmp_path
):
    file, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    if kind == "torch":
        torch.save({"state_dict": Malicious(trace)}, file)
    else:
        front = b"PK\x03\x04" if kind == "zip in front" else b""
        file.write_bytes(front + pickle.dumps(Malicious(trace)))
    for load in load_either:
        with pytest.raises(InputError, match=f"weights{suffix}: this is not a checkpoint that can"):
            load(file)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, {"cls_token": "text"}])
def test_files_of_other_things_than_tensors_are_refused(content, load_either, tmp_path):
    file = tmp_path / "odd.pt"
    torch.save(content, file)
    for load in load_either:
        with pytest.raises(InputError, match=r"odd\.pt: this"):
            load(file)


# --------------------------------------------------------------------------------------------------
# Output


@pytest.fixture
def result():
    labels = np.zeros((4, 5), np.int32)
    picture = Picture(torch.zeros(3, 4, 5, dtype=torch.uint8), "picture")
    return made_result(labels, ["cat"], picture)


@pytest.mark.parametrize(
    "stem",
    [
        "../../escape",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../../b",
        "..\\..\\escape",
        "C:\\escape",
        "~/escape",
        "nul\0l",
        "line\nbreak",
        ".hidden",
        "\udcff",
        "\u202egnp",
    ],
)
def test_no_name_leads_out_of_the_output_directory(stem, result, tmp_path):
    folder = tmp_path / "out"
    files = result.save(folder, stem)
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert written == sorted(folder / path.name for path in files.values())
    assert not any(path.name.startswith(".") for path in written)


def test_a_link_in_the_output_directory_is_replaced_and_not_followed(result, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "picture.json").symlink_to(victim)
    result.save(folder)
    assert victim.read_text() == "precious"
    assert json.loads((folder / "picture.json").read_text())["picture"] == {
        "name": "picture",
        "path": None,
        "width": 5,
        "height": 4,
    }


def test_hostile_file_names_stay_inside_through_the_command(run, tmp_path):
    pictures = tmp_path / "in"
    pictures.mkdir()
    picture = Image.new("RGB", (40, 40))
    for name in ("a..png", "$(touch x).png", "a;b.png", "-rf.png", "\u202egnp.png"):
        picture.save(pictures / name)
    out = tmp_path / "out"
    small = ["--short-side", "32", "--window", "32", "--stride", "32", "--quiet"]
    code, _, stderr = run("segment", pictures, "--classes", "cat", "--out", out, *small)
    assert code == 0, stderr
    assert len(list(out.glob("*.json"))) == 5
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {pictures, out}


def test_names_of_every_script_are_drawn_or_numbered(monkeypatch):
    names = ["cat", "собака", "猫", "naïve", "العشب", "😀", "x" * 999]
    labels = np.arange(len(names))[None].repeat(4, axis=0)
    for files in (_FONT_FILES, ()):
        monkeypatch.setattr("fsa.draw.lettering._FONT_FILES", files)
        fonts.cache_clear()
        image = beside_legend(Image.new("RGB", (7, 4)), labels, names)
        assert image.width < 600
        for name in names:
            text, font = written(name, "class 1", 12)
            assert not _missing(text, font)
        # Without other fonts a name in Chinese is its number, and accents are left out.
        if not files:
            assert written("猫", "class 2", 12)[0] == "class 2"
            assert written("naïve", "class 3", 12)[0] in ("naïve", "naive")
    fonts.cache_clear()


def test_the_embedded_weights_gone_is_reported(monkeypatch, tmp_path):
    from fsa.cli.info import report

    monkeypatch.setattr(tiny, "_WEIGHTS", tmp_path / "gone.safetensors")
    assert "embedded model, MISSING" in report()
