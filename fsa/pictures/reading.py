"""Pictures of every kind, read into one form."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fsa.errors import FSAWarning, InputError
from fsa.files import results_in

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded."""

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)

# Read whatever the file is called. Formats of Pillow's that run other programs or hold more than
# pictures (EPS, PDF, ...) are left out: a file may come from anywhere.
_FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")

_STRIP_PIXELS = 1 << 22

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


def size_in_header(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(H,W) of the picture in a file without decoding it, as it will be shown, or None.

    None where the file cannot be read, which `read_image` says in words.
    """
    with suppress(InputError):
        if not stat.S_ISREG(_mode(Path(path))):
            return None
        with _refusals(str(path)), _opened(Path(path)) as image:
            width, height = image.size
            if min(width, height) < 1:
                return None
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (width, height) if turned else (height, width)
    return None


def list_pictures(
    sources: Iterable[str | os.PathLike[str]], *, recursive: bool = False
) -> list[Path]:
    """The files behind a list of files and directories, each directory's sorted by name.

    Files are taken whatever they are called. In a directory, those with the extension of a picture
    are taken that are not hidden and no results of this library, which a warning names; links that
    lead nowhere are taken, to be said where they are read.

    Args:
        sources: files and directories.
        recursive: look into the folders of a directory as well, hidden ones and links excepted;
            otherwise a warning says that there are some.

    Raises:
        InputError: a path that is empty or does not exist, or a directory without pictures.
    """
    files: list[Path] = []
    for source in sources:
        if not os.fspath(source):
            raise InputError("a picture or a directory has an empty name")
        path = Path(source)
        if stat.S_ISDIR(_mode(path)):
            files.extend(_pictures_in(path, recursive))
        else:
            files.append(path)
    return files


def _pictures_in(folder: Path, recursive: bool) -> list[Path]:
    found, results, folders = _listed(folder)
    if recursive:
        for inner in folders:
            more, more_results, more_folders = _listed(inner)
            found += more
            results += more_results
            folders += more_folders
    elif folders:
        warnings.warn(
            f"{folder}: {len(folders)} folders in it are not looked into, such as "
            f"{folders[0].name}; recursive=True (--recursive) does",
            FSAWarning,
            stacklevel=3,
        )
    if results:
        warnings.warn(
            f"{folder}: {len(results)} results of earlier segmentations are left out, such as "
            f"{results[0].name}",
            FSAWarning,
            stacklevel=3,
        )
    if not found:
        raise InputError(f"{folder}: the directory holds no pictures ({', '.join(EXTENSIONS)})")
    return found


def _listed(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Of a directory, sorted by name: the pictures, the results among them, the folders."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from None
    folders = [path for path in entries if path.is_dir()]
    pictures = [
        path
        for path in entries
        if path.suffix.lower() in EXTENSIONS
        and (path.is_file() or (path.is_symlink() and not path.exists()))
    ]
    results = results_in(folder)
    return (
        [path for path in pictures if path.name not in results],
        [path for path in pictures if path.name in results],
        [path for path in folders if not path.is_symlink()],
    )


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
    image.load()
    # Without the copy that is made even of what need not be turned.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
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
    return _rows_to_tensor(image)


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


def _rows_to_tensor(image: Image.Image) -> Tensor:
    """A picture (3,H,W), some rows after the other, so that no other copy is ever whole."""
    width, height = image.size
    rgb = torch.empty((3, height, width), dtype=torch.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = image.crop((0, top, width, bottom)).convert("RGB")
        rgb[:, top:bottom] = torch.from_numpy(np.array(strip)).permute(2, 0, 1)
    return rgb


def _to_tensor(rgb: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _too_large(name: str, max_pixels: int, size: tuple[int, ...]) -> str:
    return (
        f"{name}: the picture of {size[0]} x {size[1]} has more than {max_pixels / 1e6:g} "
        "megapixels; make it smaller first"
    )
