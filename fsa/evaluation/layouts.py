"""How the benchmarks lie on disk, what the numbers in their masks mean, and their class lists.

The layouts of the eight benchmarks are those of mmsegmentation's dataset preparation guide; those
of ADE847 and Context459 are the ones that CAT-Seg's preparation scripts write. Class names are the
published text queries, as ProxyCLIP and FSA use them (their spelling, such as "tvmonitor",
is part of the protocol); "-sclip" and "-clearclip" lists are those of these two methods.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources

IGNORE = 255
"""The value of a mask's pixels that are not counted, unless a layout says otherwise."""

FOLDER = "folder"
"""The name of any folder with images/, masks/ and classes.txt."""

_LARGEST_MASK_VALUE = 65535


@dataclass(frozen=True)
class Layout:
    """How a benchmark lies on disk, and what its numbers mean.

    Attributes:
        title: as papers call it.
        images, masks: folders under the root.
        image_suffix, mask_suffix: what follows a picture's name; a mask has the picture's name,
            with its own suffix.
        splits: where the file may lie that lists the names, one a line; empty: all count.
        homes: where the root may really begin, for archives that unpack into a folder of theirs.
        reduce_zero_label: 0 means unlabelled, and class k is stored as k + 1.
        ignore: values that are not counted, after `reduce_zero_label`.
        background: the class that uncertain pixels become, or None.
        commas_in_names: a line of the class list is one text, commas included.
        pictures: how many there are in the published split.
        source: where it comes from, in words.
    """

    title: str
    images: str
    masks: str
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    splits: tuple[str, ...] = ()
    homes: tuple[str, ...] = ("",)
    reduce_zero_label: bool = False
    ignore: tuple[int, ...] = (IGNORE,)
    background: int | None = None
    commas_in_names: bool = False
    pictures: int = 0
    source: str = ""


_VOC = Layout(
    title="PASCAL VOC 2012 with background",
    images="JPEGImages",
    masks="SegmentationClass",
    splits=("ImageSets/Segmentation/val.txt",),
    homes=("", "VOC2012", "VOCdevkit/VOC2012"),
    background=0,
    pictures=1449,
    source="the archive VOCtrainval_11-May-2012.tar of PASCAL VOC 2012",
)
_CONTEXT = Layout(
    title="PASCAL Context with background",
    images="JPEGImages",
    masks="SegmentationClassContext",
    splits=("ImageSets/SegmentationContext/val.txt",),
    homes=("", "VOC2010", "VOCdevkit/VOC2010"),
    background=0,
    pictures=5104,
    source=(
        "VOCtrainval_03-May-2010.tar of PASCAL VOC 2010, and masks that mmsegmentation's "
        "tools/dataset_converters/pascal_context.py makes from trainval_merged.json"
    ),
)
_COCO = Layout(
    title="COCO-Stuff 164k",
    images="images/val2017",
    masks="annotations/val2017",
    mask_suffix="_labelTrainIds.png",
    pictures=5000,
    source=(
        "val2017.zip of COCO and stuffthingmaps_trainval2017.zip of COCO-Stuff, whose masks "
        "`fsa data convert coco_stuff ROOT` renumbers"
    ),
)

LAYOUTS: dict[str, Layout] = {
    "voc21": _VOC,
    "voc20": replace(
        _VOC, title="PASCAL VOC 2012 without background", reduce_zero_label=True, background=None
    ),
    "context60": _CONTEXT,
    "context59": replace(
        _CONTEXT, title="PASCAL Context without background", reduce_zero_label=True, background=None
    ),
    "coco_object": replace(
        _COCO,
        title="COCO-Object",
        mask_suffix="_instanceTrainIds.png",
        background=0,
        source=(
            "val2017.zip of COCO and stuffthingmaps_trainval2017.zip of COCO-Stuff, whose masks "
            "`fsa data convert coco_object ROOT` renumbers"
        ),
    ),
    "coco_stuff": _COCO,
    "cityscapes": Layout(
        title="Cityscapes",
        images="leftImg8bit/val",
        masks="gtFine/val",
        image_suffix="_leftImg8bit.png",
        mask_suffix="_gtFine_labelTrainIds.png",
        pictures=500,
        source=(
            "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of Cityscapes, whose masks "
            "`fsa data convert cityscapes ROOT` renumbers"
        ),
    ),
    "ade20k": Layout(
        title="ADE20K, 150 classes",
        images="images/validation",
        masks="annotations/validation",
        homes=("", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
        reduce_zero_label=True,
        pictures=2000,
        source="ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark",
    ),
    "ade847": Layout(
        title="ADE20K full, 847 classes",
        images="images_detectron2/validation",
        masks="annotations_detectron2/validation",
        mask_suffix=".tif",
        homes=("", "ADE20K_2021_17_01"),
        # 255 is a class here.
        ignore=(_LARGEST_MASK_VALUE,),
        commas_in_names=True,
        pictures=2000,
        source="ADE20K_2021_17_01 of ADE20K, prepared by CAT-Seg's prepare_ade20k_full.py",
    ),
    "context459": Layout(
        title="PASCAL Context full, 459 classes",
        images="JPEGImages",
        masks="annotations_detectron2/pc459_val",
        mask_suffix=".tif",
        splits=("pascalcontext_val.txt", "ImageSets/SegmentationContext/val.txt"),
        homes=("", "VOC2010", "VOCdevkit/VOC2010"),
        # 255 is a class here; 459 is what CAT-Seg leaves out.
        ignore=(459, _LARGEST_MASK_VALUE),
        pictures=5104,
        source=(
            "VOCtrainval_03-May-2010.tar and trainval.tar.gz of PASCAL Context, prepared by "
            "CAT-Seg's prepare_pascal_context_459.py"
        ),
    ),
}


ORIGINAL_SUFFIX = {
    "coco_object": ".png",
    "coco_stuff": ".png",
    "cityscapes": "_gtFine_labelIds.png",
}
"""The masks that `fsa data convert` renumbers, beside which it writes the others."""


def names() -> tuple[str, ...]:
    """The benchmarks, and "folder"."""
    return (*LAYOUTS, FOLDER)


def class_list(name: str) -> tuple[tuple[str, ...], ...]:
    """A published class list of the package: "voc21", "voc21-sclip", ..."""
    text = resources.files("fsa.evaluation").joinpath(f"classes/{name}.txt").read_text("utf-8")
    lines = text.splitlines()
    if name in LAYOUTS and LAYOUTS[name].commas_in_names:
        return tuple((line,) for line in lines)
    return tuple(tuple(part.strip() for part in line.split(",")) for line in lines)
