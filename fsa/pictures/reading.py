"""Pictures of every kind, read into one form."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fsa.errors import InputError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded."""

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

# Read whatever the file is called. Formats of Pillow's that run other programs or hold more than
# pictures (EPS, PDF, ...) are left out: a file may come from anywhere.
_FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A picture in memory.

    Attributes:
        rgb: (3,H,W) uint8.
        name: of the file without its extension, or "picture".
        path: of the file as it was given, or None for what came from memory.
    """

    rgb: Tensor
    name: str
    path: str | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.path or "the picture"


def read_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """A picture from a file, from Pillow, from an array or from a tensor.

    Args:
        source: a path; a PIL image; an array (H,W), (H,W,1), (H,W,3) or (H,W,4); or a tensor
            (H,W), (1,H,W), (3,H,W) or (4,H,W). Arrays and tensors hold uint8, uint16, or floats in
            [0, 1].
        max_pixels: pictures with more are refused, files before they are decoded. It takes the
            place of Pillow's own limit.

    What a file holds decides how it is read, not what it is called: PNG, JPEG, JPEG 2000, WebP,
    BMP, TIFF, GIF (the first frame) and PPM. EXIF orientation is applied; transparency is laid
    over white; 16 bits become 8.

    Raises:
        InputError: a file or a value that is no picture; the message names it.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return Picture(_from_file(path, max_pixels), path.stem, str(path))
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        # Pillow reads a file only now that its pixels are asked for.
        with _refusals("the picture"):
            return Picture(_from_pillow(source, "the picture", max_pixels), "picture")
    if isinstance(source, Tensor):
        array = source.detach().cpu()
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            array = array.permute(1, 2, 0)
        elif array.ndim != 2:
            raise InputError(
                "a picture as a tensor must be (H, W), (1, H, W), (3, H, W) or (4, H, W); it has "
                f"shape {tuple(source.shape)}"
            )
        if array.dtype in (torch.bfloat16, torch.float16):
            array = array.float()
        return Picture(_from_array(array.numpy(), max_pixels), "picture")
    if isinstance(source, np.ndarray):
        return Picture(_from_array(source, max_pixels), "picture")
    raise InputError(
        f"a picture must be a path, a PIL image, an array or a tensor, not {type(source).__name__}"
    )


def list_pictures(sources: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files behind a list of files and directories, each directory's sorted by name.

    Files are taken whatever they are called; in a directory only those with the extension of a
    picture that are not hidden.

    Raises:
        InputError: a path that does not exist, or a directory without pictures.
    """
    files: list[Path] = []
    for source in map(Path, sources):
        if not stat.S_ISDIR(_mode(source)):
            files.append(source)
            continue
        try:
            found = sorted(
                path
                for path in source.iterdir()
                if path.suffix.lower() in EXTENSIONS
                and not path.name.startswith(".")
                and path.is_file()
            )
        except OSError as error:
            raise InputError(f"{source}: cannot be listed ({error.strerror})") from None
        if not found:
            raise InputError(f"{source}: the directory holds no pictures ({', '.join(EXTENSIONS)})")
        files.extend(found)
    return files


def _from_file(path: Path, max_pixels: int) -> Tensor:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: this is a directory, not a picture")
    if not stat.S_ISREG(mode):
        # A pipe may never end, and a device has no end.
        raise InputError(f"{path}: this is a pipe or a device, not a file")
    with _refusals(str(path)), _opened(path) as image:
        return _from_pillow(image, str(path), max_pixels)


def _mode(path: Path) -> int:
    """What kind of file a path names, as `stat` tells it."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or directory") from None
    # ValueError: a name with a null character.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r}: cannot be opened ({reason})") from None


def _opened(path: Path) -> Image.Image:
    """A picture of which only the header was read, whatever size it claims to have.

    Pillow's limit, which would warn or refuse before ours is looked at, is one for the process.
    """
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Says in words what Pillow raises for files that are truncated, malformed or no pictures."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture in a format that is read") from None
    # Its decoders raise almost anything: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{name}: the picture cannot be read ({reason})") from None


def _from_pillow(image: Image.Image, name: str, max_pixels: int) -> Tensor:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name}: the picture is empty ({width} x {height})")
    if width * height > max_pixels:
        raise InputError(_too_large(name, max_pixels, (width, height)))
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        # Mode I is a wide type for either depth.
        shallow = image.mode == "I" and grey.max() <= 255
        grey = grey.astype(np.uint8) if shallow else _to_8_bits(grey)
        return _to_tensor(np.repeat(grey[..., None], 3, axis=-1))
    if image.mode == "F":
        raise InputError(f"{name}: pictures of floating-point numbers have no agreed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return _to_tensor(np.asarray(image.convert("RGB")))


def _from_array(array: np.ndarray, max_pixels: int) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(
            "a picture as an array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); it has shape "
            f"{array.shape}"
        )
    if array.shape[0] * array.shape[1] > max_pixels:
        raise InputError(_too_large("the picture", max_pixels, array.shape[1::-1]))
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError("a picture of floating-point numbers must hold values in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == np.uint16:
        array = _to_8_bits(array.astype(np.int64))
    elif array.dtype != np.uint8:
        raise InputError(
            f"a picture must hold uint8, uint16 or floats in [0, 1], not {array.dtype}"
        )
    if array.shape[-1] == 4:
        opacity = array[..., 3:].astype(np.float32) / 255
        array = (array[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8)
    elif array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return _to_tensor(array)


def _to_8_bits(deep: np.ndarray) -> np.ndarray:
    """Values of 0 to 65535 as uint8."""
    return ((deep * 255 + 32767) // 65535).astype(np.uint8)


def _to_tensor(rgb: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _too_large(name: str, max_pixels: int, size: tuple[int, ...]) -> str:
    return (
        f"{name}: the picture of {size[0]} x {size[1]} has more than {max_pixels / 1e6:g} "
        "megapixels; make it smaller first"
    )
