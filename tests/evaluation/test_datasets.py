"""Every benchmark in a small tree of its real layout."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fsa import InputError
from fsa.evaluation import convert, datasets, loading
from tests.support.evaluation_data import folder, write_mask, write_picture

SIZE = (4, 6)
# As stored -> as counted, -1 where not.
PLAIN = ([0, 1, 2, 255], [0, 1, 2, -1])
REDUCED = ([0, 1, 2, 255], [-1, 0, 1, -1])

# name: folder under the root, pictures, masks, split file, stored values, expected, classes.
TREES = {
    "voc21": (
        "VOCdevkit/VOC2012",
        "JPEGImages/{}.jpg",
        "SegmentationClass/{}.png",
        "ImageSets/Segmentation/val.txt",
        PLAIN,
        21,
    ),
    "voc20": (
        "VOC2012",
        "JPEGImages/{}.jpg",
        "SegmentationClass/{}.png",
        "ImageSets/Segmentation/val.txt",
        ([0, 1, 20, 255], [-1, 0, 19, -1]),
        20,
    ),
    "context60": (
        "VOCdevkit/VOC2010",
        "JPEGImages/{}.jpg",
        "SegmentationClassContext/{}.png",
        "ImageSets/SegmentationContext/val.txt",
        ([0, 1, 59, 255], [0, 1, 59, -1]),
        60,
    ),
    "context59": (
        "VOC2010",
        "JPEGImages/{}.jpg",
        "SegmentationClassContext/{}.png",
        "ImageSets/SegmentationContext/val.txt",
        ([0, 1, 59, 255], [-1, 0, 58, -1]),
        59,
    ),
    "coco_object": (
        "",
        "images/val2017/{}.jpg",
        "annotations/val2017/{}_instanceTrainIds.png",
        "",
        ([0, 1, 80, 255], [0, 1, 80, -1]),
        81,
    ),
    "coco_stuff": (
        "",
        "images/val2017/{}.jpg",
        "annotations/val2017/{}_labelTrainIds.png",
        "",
        ([0, 1, 170, 255], [0, 1, 170, -1]),
        171,
    ),
    "cityscapes": (
        "",
        "leftImg8bit/val/{}_leftImg8bit.png",
        "gtFine/val/{}_gtFine_labelTrainIds.png",
        "",
        ([0, 1, 18, 255], [0, 1, 18, -1]),
        19,
    ),
    "ade20k": (
        "ADEChallengeData2016",
        "images/validation/{}.jpg",
        "annotations/validation/{}.png",
        "",
        ([0, 1, 150, 255], [-1, 0, 149, -1]),
        150,
    ),
    "ade847": (
        "ADE20K_2021_17_01",
        "images_detectron2/validation/{}.jpg",
        "annotations_detectron2/validation/{}.tif",
        "",
        ([0, 255, 846, 65535], [0, 255, 846, -1]),
        847,
    ),
    "context459": (
        "VOCdevkit/VOC2010",
        "JPEGImages/{}.jpg",
        "annotations_detectron2/pc459_val/{}.tif",
        "pascalcontext_val.txt",
        ([0, 255, 458, 459], [0, 255, 458, -1]),
        459,
    ),
}
NAMES = {
    "cityscapes": ["frankfurt/frankfurt_000000_000294", "lindau/lindau_000001_000019"],
    "coco_object": ["000000000139", "000000000285"],
    "coco_stuff": ["000000000139", "000000000285"],
}


COCO_CATEGORIES = {
    11: "fire hydrant",
    13: "stop sign",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    44: "bottle",
    46: "wine glass",
    65: "bed",
    67: "dining table",
    70: "toilet",
    72: "tv",
    82: "refrigerator",
    84: "book",
    90: "toothbrush",
}


def make(name, root):
    """A tree of two pictures; others lie beside them where the real tree has a split."""
    home, image, mask, split, (stored, _), _ = TREES[name]
    names = NAMES.get(name, ["2007_000033", "2007_000042"])
    values = np.array(stored * (SIZE[0] * SIZE[1] // 4)).reshape(SIZE)
    values = values.astype(np.uint16 if mask.endswith(".tif") else np.uint8)
    for number, picture in enumerate([*names, "not_listed"] if split else names):
        write_picture(root / home / image.format(picture), SIZE, number)
        write_mask(root / home / mask.format(picture), values)
    if split:
        (root / home / split).parent.mkdir(parents=True, exist_ok=True)
        (root / home / split).write_text("\n".join(names) + "\n")
    return names


@pytest.mark.parametrize("name", TREES)
def test_the_real_layout_is_read(name, tmp_path):
    names = make(name, tmp_path)
    dataset = datasets.open_dataset(name, tmp_path)
    assert [sample.name for sample in dataset.samples] == names
    assert len(dataset.classes) == len(dataset.class_names) == TREES[name][5]
    expected = np.array(TREES[name][4][1] * (SIZE[0] * SIZE[1] // 4)).reshape(SIZE)
    for sample in dataset.samples:
        assert sample.image.is_file()
        assert np.array_equal(dataset.read_mask(sample.mask), expected)
    with_background = name in ("voc21", "context60", "coco_object")
    assert dataset.background == (0 if with_background else None)
    assert (dataset.class_names[0] == "background") == with_background


@pytest.mark.parametrize("name", TREES)
def test_a_label_outside_of_the_classes_is_an_error(name, tmp_path):
    make(name, tmp_path)
    dataset = datasets.open_dataset(name, tmp_path)
    reduced = datasets.LAYOUTS[name].reduce_zero_label
    strange = TREES[name][5] + reduced + (name == "context459")
    mask = dataset.samples[0].mask
    write_mask(mask, np.full(SIZE, strange, np.uint16 if mask.suffix == ".tif" else np.uint8))
    with pytest.raises(InputError, match=rf"{mask.name}: the mask holds the label {strange}\b"):
        dataset.read_mask(mask)


def test_masks_with_a_palette_hold_indices(tmp_path):
    make("voc21", tmp_path)
    dataset = datasets.open_dataset("voc21", tmp_path)
    image = Image.fromarray(np.array([[0, 15], [20, 255]], dtype=np.uint8), mode="L").convert("P")
    image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(dataset.samples[0].mask)
    assert dataset.read_mask(dataset.samples[0].mask).tolist() == [[0, 15], [20, -1]]


def test_class_lists_are_whole():
    assert datasets.class_list("ade847")[1] == ("building, edifice",)
    assert datasets.class_list("voc21")[0][:2] == ("sky", "wall")
    for name, tree in TREES.items():
        assert len(datasets.class_list(name)) == tree[5]
        assert all(text.strip() == text != "" for c in datasets.class_list(name) for text in c)
    for name, count in (("voc21", 21), ("voc20", 20), ("coco_object", 81)):
        assert len(datasets.class_list(f"{name}-sclip")) == count
    # The same classes in the same order, whichever names they go by.
    assert datasets.class_list("voc20") == datasets.class_list("voc21")[1:]
    assert datasets.class_list("context59") == datasets.class_list("context60")[1:]


def test_check_says_what_is_missing(tmp_path):
    problem, origin, _ = datasets.check("voc21", tmp_path)
    assert "there is no JPEGImages/ and no SegmentationClass/" in problem
    assert "VOCtrainval_11-May-2012.tar" in origin
    make("voc21", tmp_path)
    (count,) = datasets.check("voc21", tmp_path)
    assert "there are 2 pictures, but the published split has 1449" in count
    mask = tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png"
    mask.unlink()
    missing, _ = datasets.check("voc21", tmp_path)
    assert missing == "1 of 2 masks are missing: SegmentationClass/2007_000033.png"
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    assert "val.txt: the list of pictures cannot be read" in datasets.check("voc21", tmp_path)[0]


def test_check_knows_masks_that_only_need_conversion(tmp_path):
    make("coco_object", tmp_path)
    folder = tmp_path / "annotations/val2017"
    for mask in list(folder.iterdir()):
        mask.rename(mask.with_name(mask.name.replace("_instanceTrainIds", "")))
    assert any("fsa data convert coco_object" in p for p in datasets.check("coco_object", tmp_path))
    make("cityscapes", tmp_path)
    for mask in list((tmp_path / "gtFine/val").rglob("*.png")):
        mask.rename(mask.with_name(mask.name.replace("labelTrainIds", "labelIds")))
    assert any("fsa data convert cityscapes" in p for p in datasets.check("cityscapes", tmp_path))


def test_any_folder(tmp_path):
    root = folder(tmp_path, pictures=3)
    write_picture(root / "images/more/p9.png", SIZE, 9)
    write_mask(root / "masks/more/p9.tif", np.full(SIZE, 2, np.uint8))
    dataset = datasets.open_dataset("folder", root)
    assert [sample.name for sample in dataset.samples] == ["more/p9", "p0", "p1", "p2"]
    assert dataset.classes == (("cat",), ("dog", "hound"), ("grass",))
    assert (dataset.read_mask(dataset.samples[0].mask) == 2).all()
    assert (dataset.read_mask(dataset.samples[1].mask)[:3] == -1).all()
    assert datasets.check("folder", root) == []


def test_values_that_a_folder_ignores(tmp_path):
    root = folder(tmp_path, pictures=1)
    write_mask(root / "masks/p0.png", np.array([[0, 2], [3, 255]], np.uint8))
    mask = root / "masks/p0.png"
    with pytest.raises(InputError, match=r"label 3.*--ignore 3"):
        datasets.open_dataset("folder", root).read_mask(mask)
    read = datasets.open_dataset("folder", root, ignore=[3]).read_mask(mask)
    assert read.tolist() == [[0, 2], [-1, -1]]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "classes.txt").unlink(), "there is no classes.txt"),
        (lambda root: (root / "masks").rename(root / "m"), "there is no masks/"),
        (lambda root: (root / "classes.txt").write_text("cat\ncat"), "classes.txt: .*'cat' twice"),
        (lambda root: write_picture(root / "images/p0.png", SIZE, 0), "share the name"),
        (lambda root: [p.unlink() for p in (root / "images").iterdir()], "holds no pictures"),
    ],
)
def test_folders_that_cannot_be_used(break_it, message, tmp_path):
    root = folder(tmp_path, pictures=2)
    break_it(root)
    with pytest.raises(InputError, match=message):
        datasets.open_dataset("folder", root)


def test_arguments_that_are_not_accepted(tmp_path):
    with pytest.raises(InputError, match="'voc' is not known: voc21"):
        datasets.open_dataset("voc", tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        datasets.open_dataset("voc21", tmp_path / "none")
    make("voc21", tmp_path)
    with pytest.raises(InputError, match="ignore is for 'folder'"):
        datasets.open_dataset("voc21", tmp_path, ignore=[3])
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="2 classes, but 'voc21' has 21"):
        datasets.open_dataset("voc21", tmp_path, classes_file=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b"\x89PNG broken"), "cannot be read"),
        (lambda p: Image.new("RGB", (6, 4)).save(p), "one number per pixel.*RGB"),
        (lambda p: p.unlink(), "no such mask"),
    ],
)
def test_masks_that_cannot_be_read(write, message, tmp_path):
    root = folder(tmp_path, pictures=1)
    write(root / "masks/p0.png")
    dataset = datasets.open_dataset("folder", root)
    with pytest.raises(InputError, match=rf"p0\.png: .*{message}"):
        dataset.read_mask(root / "masks/p0.png")


def test_coco_objects_are_made_from_coco_stuff(tmp_path):
    # person, the last of the objects, the first and the last kind of stuff, and unlabelled.
    stored = np.array([[0, 12, 89], [91, 181, 255]], np.uint8)
    for name in ("000000000139", "000000000285"):
        write_mask(tmp_path / f"annotations/val2017/{name}.png", stored)
        write_picture(tmp_path / f"images/val2017/{name}.jpg", (2, 3), 0)
    assert convert.convert("coco_object", tmp_path, workers=1) == 2
    assert convert.convert("coco_object", tmp_path, workers=1) == 0
    assert convert.convert("coco_stuff", tmp_path, workers=1) == 2
    objects = datasets.open_dataset("coco_object", tmp_path)
    assert objects.read_mask(objects.samples[1].mask).tolist() == [[1, 12, 80], [0, 0, 0]]
    stuff = datasets.open_dataset("coco_stuff", tmp_path)
    assert stuff.read_mask(stuff.samples[1].mask).tolist() == [[0, 11, 79], [80, 170, -1]]
    # COCO's own ids, from 1, on both sides of each gap.
    for identifier, name in COCO_CATEGORIES.items():
        assert datasets.class_list("coco_object")[convert.table("coco_object")[identifier - 1]] == (
            name,
        )
    # Every class is reached once, by the ids that COCO uses.
    assert sorted(set(convert.table("coco_stuff")) - {-1, 255}) == list(range(171))
    assert sorted(set(convert.table("coco_object")) - {-1}) == list(range(81))


def test_cityscapes_train_ids_are_made_from_label_ids(tmp_path):
    # unlabelled, road, sidewalk, sky, licence plate is -1 as 255 in 8 bits, bicycle.
    stored = np.array([[0, 7, 8], [23, 255, 33]], np.uint8)
    name = "frankfurt/frankfurt_000000_000294"
    write_mask(tmp_path / f"gtFine/val/{name}_gtFine_labelIds.png", stored)
    write_picture(tmp_path / f"leftImg8bit/val/{name}_leftImg8bit.png", (2, 3), 0)
    assert convert.convert("cityscapes", tmp_path, workers=1) == 1
    dataset = datasets.open_dataset("cityscapes", tmp_path)
    assert dataset.read_mask(dataset.samples[0].mask).tolist() == [[-1, 0, 1], [10, -1, 18]]
    assert sorted(set(convert.table("cityscapes")) - {255}) == list(range(19))


def test_conversions_that_cannot_be_done(tmp_path):
    with pytest.raises(InputError, match="'voc21' is not converted here"):
        convert.convert("voc21", tmp_path)
    with pytest.raises(InputError, match="there is no annotations/val2017/"):
        convert.convert("coco_object", tmp_path)
    (tmp_path / "annotations/val2017").mkdir(parents=True)
    with pytest.raises(InputError, match=r"there is no \*\.png to renumber"):
        convert.convert("coco_object", tmp_path)
    write_mask(tmp_path / "annotations/val2017/1.png", np.array([[0, 11]], np.uint8))
    with pytest.raises(InputError, match=r"1\.png: the id 11 cannot occur in coco_object's"):
        convert.convert("coco_object", tmp_path, workers=1)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((375, 500), 336, (336, 448)), ((500, 334), 336, (503, 336)), ((100, 1000), 336, (205, 2048))],
)
def test_pictures_are_resized_as_the_published_pipelines_do(size, short_side, expected):
    assert loading.working_size(*size, short_side) == expected
