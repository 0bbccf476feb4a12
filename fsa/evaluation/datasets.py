"""A benchmark on disk, or any folder laid out in the same spirit, ready to be evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fsa.classes import read_class_file
from fsa.errors import InputError
from fsa.evaluation.layouts import (
    FOLDER,
    IGNORE,
    LAYOUTS,
    ORIGINAL_SUFFIX,
    Layout,
    class_list,
    names,
)

_MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
# Whatever a mask is called. Pillow would run another program for some of the formats it knows.
_MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    """A picture with its mask; neither need exist until it is read."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Dataset:
    """Pictures, masks and classes, ready to be evaluated.

    Attributes:
        name: of the layout, or "folder".
        root: where it begins.
        samples: in a fixed order, sorted by name or as the split file lists them.
        classes: text queries of each class.
        class_names: one name per class, for tables.
        reduce_zero_label, ignore, background: as in `Layout`.
    """

    name: str
    root: Path
    samples: tuple[Sample, ...] = field(repr=False)
    classes: tuple[tuple[str, ...], ...] = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    reduce_zero_label: bool = False
    ignore: tuple[int, ...] = (IGNORE,)
    background: int | None = None

    def read_mask(self, path: Path) -> np.ndarray:
        """A mask as classes: (H,W) int32, and -1 where a pixel is not counted.

        Raises:
            InputError: a file that is not a mask, or a value that is neither a class nor ignored;
                the message names the file and the value.
        """
        stored = _read_values(path)
        mask = stored.astype(np.int32)
        if self.reduce_zero_label:
            # 255 stays what it is: unlabelled.
            mask = np.where(mask == 0, self.ignore[0], np.where(mask == IGNORE, IGNORE, mask - 1))
        uncounted = np.isin(mask, self.ignore)
        count = len(self.classes)
        strange = ((mask < 0) | (mask >= count)) & ~uncounted
        mask[uncounted] = -1
        if strange.any():
            value = int(stored[strange].min())
            raise InputError(
                f"{path}: the mask holds the label {value}, which is no class: there are {count} "
                f"({self._meaning()}); {self._remedy(value)}"
            )
        return mask

    def _meaning(self) -> str:
        first = 1 if self.reduce_zero_label else 0
        ignored = ", ".join(map(str, self.ignore))
        return f"{first} to {first + len(self.classes) - 1}, and {ignored} is not counted"

    def _remedy(self, value: int) -> str:
        if self.name == FOLDER:
            return f"add it to classes.txt or pass --ignore {value}"
        return "are these the masks of another benchmark?"


def open_dataset(
    name: str,
    root: Path,
    *,
    class_list_name: str | None = None,
    classes_file: Path | None = None,
    ignore: Sequence[int] = (),
) -> Dataset:
    """A dataset, from its layout on disk.

    Args:
        name: one of `names()`.
        root: the folder it lies in; see `Layout.homes`.
        class_list_name: another published class list than the benchmark's own.
        classes_file: class names of the user's instead, one class a line, synonyms after commas.
        ignore: for "folder": values of the masks that are not counted, besides 255.

    Raises:
        InputError: an unknown name, or what is missing on disk.
    """
    if name not in names():
        raise InputError(f"dataset {name!r} is not known: {', '.join(names())}")
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; root is where {name!r} lies")
    if name == FOLDER:
        return _open_folder(root, classes_file, ignore)
    if ignore:
        raise InputError(f"ignore is for {FOLDER!r}; {name!r} has its own: {LAYOUTS[name].ignore}")
    layout = LAYOUTS[name]
    home = _home(root, layout)
    if home is None:
        raise InputError(
            f"{root}: {_missing_folders(root, layout)}; `fsa data check {name} {root}` says where "
            "it comes from"
        )
    samples = _listed(home, layout) if layout.splits else _found(home, layout)
    if classes_file is not None:
        classes = _classes(classes_file)
        expected = len(class_list(name))
        if len(classes) != expected:
            raise InputError(
                f"{classes_file}: {len(classes)} classes, but {name!r} has {expected}, in its order"
            )
    else:
        classes = class_list(class_list_name or name)
    class_names = [entry[0] for entry in classes]
    if layout.background is not None:
        class_names[layout.background] = "background"
    return Dataset(
        name=name,
        root=home,
        samples=tuple(samples),
        classes=classes,
        class_names=tuple(class_names),
        reduce_zero_label=layout.reduce_zero_label,
        ignore=layout.ignore,
        background=layout.background,
    )


def check(name: str, root: Path, *, ignore: Sequence[int] = ()) -> list[str]:
    """What is missing before a dataset can be evaluated, one sentence each; an empty list if
    nothing is.

    Every file is looked for, and the first masks are read.
    """
    root = Path(root)
    layout = LAYOUTS.get(name)
    if layout is not None and root.is_dir() and _home(root, layout) is None:
        return [f"{root}: {_missing_folders(root, layout)}", *_how_to_get(name, root, layout)]
    try:
        dataset = open_dataset(name, root, ignore=ignore)
    except InputError as error:
        return [str(error), *(_how_to_get(name, root, layout) if layout else [])]
    problems = []
    for what, paths in (
        ("pictures", [sample.image for sample in dataset.samples]),
        ("masks", [sample.mask for sample in dataset.samples]),
    ):
        missing = [path for path in paths if not path.is_file()]
        if missing:
            problems.append(
                f"{len(missing)} of {len(paths)} {what} are missing: {_some(missing, dataset.root)}"
            )
            hint = _unprepared(name, missing[0])
            if hint:
                problems.append(hint)
    expected = LAYOUTS[name].pictures if name in LAYOUTS else 0
    if expected and len(dataset.samples) != expected:
        problems.append(
            f"there are {len(dataset.samples)} pictures, but the published split has {expected}: "
            "the number will not compare with the papers'"
        )
    for sample in dataset.samples[:_SHOWN]:
        if sample.mask.is_file():
            try:
                dataset.read_mask(sample.mask)
            except InputError as error:
                problems.append(str(error))
    return problems


def _open_folder(root: Path, classes_file: Path | None, ignore: Sequence[int]) -> Dataset:
    from fsa.pictures.reading import EXTENSIONS

    images, masks = root / "images", root / "masks"
    absent = [f"{folder.name}/" for folder in (images, masks) if not folder.is_dir()]
    if classes_file is None and not (root / "classes.txt").is_file():
        absent.append("classes.txt (one class a line, synonyms after commas)")
    if absent:
        raise InputError(f"{root}: there is no {' and no '.join(absent)}")
    classes = _classes(classes_file or root / "classes.txt")
    pictures = _walk(images, EXTENSIONS)
    if not pictures:
        raise InputError(f"{images}: the folder holds no pictures ({', '.join(EXTENSIONS)})")
    of_stem = {
        path.relative_to(masks).with_suffix(""): path for path in _walk(masks, _MASK_EXTENSIONS)
    }
    samples = []
    seen: dict[Path, Path] = {}
    for path in pictures:
        stem = path.relative_to(images).with_suffix("")
        if stem in seen:
            raise InputError(f"{path} and {seen[stem]} share the name of their mask")
        seen[stem] = path
        # A mask that is not there is reported when it is to be read, by this name.
        mask = of_stem.get(stem, masks / stem.with_name(f"{stem.name}.png"))
        samples.append(Sample(stem.as_posix(), path, mask))
    return Dataset(
        name=FOLDER,
        root=root,
        samples=tuple(samples),
        classes=classes,
        class_names=tuple(entry[0] for entry in classes),
        ignore=(IGNORE, *ignore) if IGNORE not in ignore else tuple(ignore),
        background=next(
            (i for i, entry in enumerate(classes) if entry[0].casefold() == "background"), None
        ),
    )


def _classes(file: Path) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(synonyms) for synonyms in read_class_file(file))


def _home(root: Path, layout: Layout) -> Path | None:
    for home in layout.homes:
        candidate = root / home
        if (candidate / layout.images).is_dir() and (candidate / layout.masks).is_dir():
            return candidate
    return None


def _missing_folders(root: Path, layout: Layout) -> str:
    absent = [f"{part}/" for part in (layout.images, layout.masks) if not (root / part).is_dir()]
    places = [home for home in layout.homes if home]
    also = f" (nor under {' or '.join(places)})" if places else ""
    return f"there is no {' and no '.join(absent)}{also}"


def _how_to_get(name: str, root: Path, layout: Layout) -> list[str]:
    """What to do next where a benchmark, or a part of it, is not there."""
    home = root / layout.homes[-1]
    return [
        f"{name} comes from {layout.source}",
        f"unpack it so that {home / layout.images} and {home / layout.masks} are there, and check "
        "again",
    ]


def _listed(home: Path, layout: Layout) -> list[Sample]:
    candidates = [home / split for split in layout.splits]
    split = next((path for path in candidates if path.is_file()), candidates[0])
    try:
        lines = split.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{split}: the list of pictures cannot be read ({reason})") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"{split}: the list of pictures is empty")
    repeated = [name for name, count in Counter(found).items() if count > 1]
    if repeated:
        raise InputError(f"{split}: {repeated[0]!r} is listed twice")
    return [_sample(home, layout, name) for name in found]


def _found(home: Path, layout: Layout) -> list[Sample]:
    images = home / layout.images
    extension = f".{layout.image_suffix.rpartition('.')[2]}"
    pictures = [
        path for path in _walk(images, (extension,)) if path.name.endswith(layout.image_suffix)
    ]
    if not pictures:
        raise InputError(f"{images}: the folder holds no *{layout.image_suffix}")
    names_found = [
        path.relative_to(images).as_posix().removesuffix(layout.image_suffix) for path in pictures
    ]
    return [_sample(home, layout, name) for name in names_found]


def _sample(home: Path, layout: Layout, name: str) -> Sample:
    return Sample(
        name,
        home / layout.images / f"{name}{layout.image_suffix}",
        home / layout.masks / f"{name}{layout.mask_suffix}",
    )


def _walk(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in extensions and not path.name.startswith(".")
    )


def _some(paths: list[Path], root: Path) -> str:
    shown = ", ".join(path.relative_to(root).as_posix() for path in paths[:_SHOWN])
    return shown + (", ..." if len(paths) > _SHOWN else "")


def _unprepared(name: str, missing: Path) -> str:
    """What to run when the original masks are there and the renumbered ones are not."""
    original = ORIGINAL_SUFFIX.get(name)
    if original is None or not missing.name.endswith(LAYOUTS[name].mask_suffix):
        return ""
    stem = missing.name.removesuffix(LAYOUTS[name].mask_suffix)
    if not missing.with_name(f"{stem}{original}").is_file():
        return ""
    return f"the original masks are there: run `fsa data convert {name} ROOT`"


def _read_values(path: Path) -> np.ndarray:
    """The integers stored in a mask, (H,W)."""
    if not path.is_file():
        raise InputError(f"{path}: no such mask")
    try:
        with Image.open(path, formats=_MASK_FORMATS) as opened:
            if opened.mode in ("P", "L", "1", "I", "I;16", "I;16L", "I;16B", "I;16N"):
                return np.asarray(opened)
            mode = opened.mode
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        Image.DecompressionBombError,
    ) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, UnidentifiedImageError):
            reason = f"not one of {', '.join(_MASK_FORMATS)}"
        raise InputError(f"{path}: the mask cannot be read ({reason})") from None
    raise InputError(
        f"{path}: a mask must hold one number per pixel, by palette or in grey; this one is {mode}"
    )
