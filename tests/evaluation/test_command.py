"""`fsa eval` and `fsa data` as a person types them; presets, the paper's cells, sweeps."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fsa import FSAConfig, InputError, hosts
from fsa.evaluation import datasets, paper, protocol, report, sweep
from fsa.evaluation.result import Result
from tests.support.evaluation_data import folder, write_mask, write_picture

ROOT = Path(__file__).parents[2]
SMALL = ["--short-side", "64", "--window", "48", "--stride", "24", "--workers", "0"]


def test_a_folder_to_a_number(run, tmp_path):
    root, out = folder(tmp_path / "data", pictures=3), tmp_path / "out"
    code, stdout, stderr = run("eval", "folder", "--root", root, "--out", out, *SMALL)
    assert code == 0
    record = json.loads((out / "result.json").read_text())
    assert f"mIoU {100 * record['miou']:.2f}  over 3 classes, 3 pictures" in stdout
    assert "preset       tiny/folder changed" in stdout
    assert "the paper has no number" in stdout
    assert "3/3" in stderr
    assert record["protocol"]["preset"]["window"] == 48
    assert record["protocol"]["feedback"]["beta"] == 3.0
    assert np.sum(record["confusion"]) == record["pixels"] > 0
    with (out / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["cat", "dog", "grass"]
    assert sum(int(row["true pixels"]) for row in rows) == record["pixels"]
    again = run("eval", "folder", "--root", root, "--out", out, *SMALL, "--quiet")
    assert again == (0, f"{100 * record['miou']:.2f}\n", "")


def test_every_option_reaches_the_protocol(run, tmp_path):
    root, out = folder(tmp_path / "data", 2, classes="cat\ndog\nbackground\n"), tmp_path / "out"
    (tmp_path / "names.txt").write_text("tiger\nwolf, hound\nbackground\n")
    options = ["--host", "proxyclip", "--vfm", "layer:2", "--preset", "sclip", "--prob-thd", "0.1"]
    options += ["--area-thd", "0.2", "--logit-scale", "50", "--antialias", "--beta", "1.5"]
    options += [
        "--confidence",
        "0.3",
        "--feedback-logit-scale",
        "21",
        "--uniform-logit-scale",
        "30",
    ]
    options += ["--pamr-steps", "2", "--propagation-grid", "9", "--whole"]
    options += ["--classes-file", tmp_path / "names.txt", "--ignore", "7", "--on-error", "skip"]
    options += ["--host-option", "shift=1", "--host-option", "gain=4"]
    options += ["--window-batch", "2", "--chunk", "1", "--backend", "torch", "--quiet"]
    code, _, stderr = run("eval", "folder", "--root", root, "--out", out, *SMALL, *options)
    assert (code, stderr) == (0, "")
    record = json.loads((out / "result.json").read_text())["protocol"]
    preset, feedback = record["preset"], record["feedback"]
    assert preset["name"] == "sclip/folder changed"
    sizes = [preset[name] for name in ("short_side", "window", "stride")]
    assert sizes == [64, 48, 24]
    assert (preset["prob_thd"], preset["area_thd"], preset["logit_scale"]) == (0.1, 0.2, 50)
    assert preset["antialias"] is True
    assert (preset["pamr_steps"], preset["propagation_grid"], preset["whole"]) == (2, 9, True)
    assert (feedback["beta"], feedback["confidence"]) == (1.5, 0.3)
    assert (feedback["logit_scale"], feedback["uniform_logit_scale"]) == (21, 30)
    assert record["classes"] == [["tiger"], ["wolf", "hound"], ["background"]]
    assert (record["ignore"], record["background"]) == ([255, 7], 2)
    assert (record["host"], record["vfm"], record["backend"]) == ("proxyclip", "layer:2", "torch")
    assert record["host_options"] == {"shift": 1.0, "gain": 4.0}
    assert (record["window_batch"], record["chunk"]) == (2, 1)


def test_a_benchmark_with_its_own_classes(run, tmp_path):
    """VOC20, whose labels start at 1, on a tree of two pictures."""
    home = tmp_path / "VOCdevkit/VOC2012"
    for number in range(2):
        write_picture(home / f"JPEGImages/p{number}.jpg", (40, 50), number)
        mask = np.zeros((40, 50), np.uint8)
        mask[:, 10:] = 20
        mask[0] = 255
        write_mask(home / f"SegmentationClass/p{number}.png", mask)
    (home / "ImageSets/Segmentation").mkdir(parents=True)
    (home / "ImageSets/Segmentation/val.txt").write_text("p0\np1\n")
    out = tmp_path / "out"
    options = [*SMALL, "--no-feedback", "--out", out]
    code, stdout, _ = run("eval", "voc20", "--root", tmp_path, *options)
    assert code == 0
    record = json.loads((out / "result.json").read_text())
    assert record["protocol"]["feedback"] is None
    confusion = np.array(record["confusion"])
    assert confusion[19].sum() == confusion.sum() == 2 * 39 * 40
    assert record["iou"]["tvmonitor"] is not None
    assert "tvmonitor" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["voc21"], "name a dataset and where it lies"),
        (["voc22", "--root", "."], "dataset 'voc22' is not known"),
        (["voc21", "--root", "nowhere"], "nowhere: no such folder"),
        (["voc21", "--root", ".", "--preset", "mine"], "preset='mine' is not known: fsa, proxy"),
        (["voc21", "--root", ".", "--window", "0"], "window=0 is not accepted"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run("eval", *arguments)
    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"fsa: {message}")
    assert stderr.count("\n") == 1


def test_mistakes_that_need_the_model(run, tmp_path):
    root = folder(tmp_path / "data", pictures=1)
    arguments = ["eval", "folder", "--root", root, "--out", tmp_path / "out", *SMALL]
    stderr = run(*arguments, "--no-feedback", "--beta", "2")[2]
    assert "--no-feedback turns feedback off, and with it beta" in stderr
    assert "--no-feedback turns off" in run(*arguments, "--no-feedback", "--sweep", "pruning")[2]
    assert "sweep size is not known: scaling" in run(*arguments, "--sweep", "size")[2]
    write_mask(root / "masks/p0.png", np.full((40, 50), 5, np.uint8))
    code, _, stderr = run(*arguments, "--quiet")
    assert code == 1
    assert "p0.png: the mask holds the label 5" in stderr


def test_the_data_commands(run, tmp_path):
    code, stdout, _ = run("data", "list")
    assert code == 0
    assert all(f"{name}: " in stdout for name in datasets.names())
    code, stdout, _ = run("data", "check", "cityscapes", tmp_path)
    assert code == 1
    assert "no leftImg8bit/val/ and no gtFine/val/" in stdout
    root = folder(tmp_path / "data", pictures=2)
    code, stdout, _ = run("data", "check", "folder", root)
    assert code == 0
    assert "all there, 2 pictures with masks, 3 classes" in stdout
    write_mask(tmp_path / "annotations/val2017/000000000139.png", np.array([[0, 91]], np.uint8))
    code, stdout, _ = run("data", "convert", "coco_object", tmp_path, "--workers", "1")
    assert (code, stdout) == (0, "1 masks written\n")


def test_the_list_has_every_cell_and_its_command(run):
    code, stdout, _ = run("eval", "--list")
    assert code == 0
    cells = list(paper.cells())
    assert len(cells) == 33 * 8
    for cell in cells:
        assert cell.command() in stdout
        assert cell.without > 0
        assert cell.host in hosts.names()
        assert paper.find(cell.host, cell.model, cell.vfm, cell.dataset) == cell
    stdout = run("eval", "voc21", "--list", "--host", "proxyclip", "--model", "ViT-H-14")[1]
    commands = [line for line in stdout.splitlines() if line.startswith("table")]
    assert len(commands) == 4
    assert commands[0].split() == [
        *["table", "2", "65.0", "->", "67.9"],
        *shlex.split("fsa eval voc21 --root DIR --host proxyclip --model ViT-H-14"),
        *shlex.split("--pretrained laion2b_s32b_b79k --vfm dino"),
    ]


def test_lists_and_mistakes_do_not_wait_for_torch():
    probe = (
        "import sys; from fsa import cli; from fsa.evaluation import datasets, paper, "
        "protocol; protocol.table(); datasets.check('voc21', '.'); print('torch' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["False"]


def test_the_papers_averages_are_those_of_its_cells():
    for row in paper._data()["rows"]:
        for column in ("without", "with"):
            values = dict(row[column])
            average = values.pop("average")
            assert set(values) == set(datasets.LAYOUTS) - {"ade847", "context459"}
            # The paper rounds, and cuts some.
            assert abs(sum(values.values()) / 8 - average) < 0.07, row
    cell = paper.find("maskclip", "ViT-B-16", None, "cityscapes")
    assert (cell.table, cell.without, cell.with_fsa) == (2, 12.6, 28.4)
    assert paper.find("proxyclip", "ViT-L-14", "mae", "voc20").with_fsa == 80.2
    assert paper.find("vv", "ViT-H-14", None, "ade20k").without == 19.7
    assert paper.find("clearclip", "tiny", None, "voc21") is None
    assert paper.ablation("isolation", "off", "sclip", "ViT-L-14") == 33.2


def test_presets_are_the_published_ones():
    def sizes(name, dataset):
        p = protocol.preset(name, dataset)
        return (p.short_side, p.window, p.stride, p.prob_thd)

    assert sizes("fsa", "voc21") == (336, 336, 112, 0.2)
    assert sizes("fsa", "context60") == (336, 336, 112, 0.14)
    assert sizes("fsa", "coco_object") == (336, 336, 112, 0.3)
    assert sizes("fsa", "coco_stuff") == (336, 336, 112, 0)
    assert sizes("fsa", "cityscapes") == (448, 224, 80, 0)
    for dataset in ("ade20k", "ade847", "context459"):
        assert sizes("fsa", dataset) == (448, 336, 112, 0)
    assert sizes("proxyclip", "context60") == (336, 336, 112, 0.15)
    assert sizes("proxyclip", "coco_object") == (336, 336, 112, 0.25)
    assert sizes("proxyclip", "cityscapes") == (448, 224, 112, 0)
    assert sizes("proxyclip", "voc21") == sizes("fsa", "voc21")
    assert protocol.family_of("proxyclip", "ViT-B-16") == "fsa"
    # The paper's baselines of ProxyCLIP are ProxyCLIP's own numbers.
    assert protocol.family_of("proxyclip", "ViT-B-16", feedback=False) == "proxyclip"
    assert protocol.family_of("qq", "ViT-B-16", feedback=False) == "fsa"
    assert sizes("sclip", "cityscapes") == (560, 224, 112, 0)
    assert sizes("sclip", "context59") == (336, 224, 112, 0)
    for dataset in ("ade20k", "voc20", "coco_stuff"):
        assert sizes("clearclip", dataset) == (448, 448, 224, 0)
    assert sizes("clearclip", "voc21") == (448, 448, 224, 0.5)
    assert sizes("clearclip", "cityscapes") == (448, 224, 224, 0)
    assert sizes("clearclip-224", "voc21") == (448, 224, 112, 0.5)
    assert sizes("tiny", "voc21") == (224, 112, 56, 0.2)
    assert protocol.preset("sclip", "voc21").class_list == "voc21-sclip"
    for dataset in datasets.names():
        naclip = protocol.preset("naclip", dataset)
        assert (naclip.logit_scale, naclip.area_thd, naclip.pamr_steps) == (40, 0, 10)
        assert naclip.whole == (dataset in ("voc20", "voc21"))
        assert naclip.prob_thd == (0.1 if protocol.preset("sclip", dataset).prob_thd else 0)
    assert sizes("naclip", "coco_stuff") == (336, 224, 112, 0)
    assert sizes("naclip", "cityscapes") == (560, 224, 112, 0)
    assert protocol.preset("naclip", "coco_object").class_list == "coco_object-sclip"
    # PEARL's are NACLIP's, but for what refines the labels.
    for dataset in datasets.names():
        pearl, naclip = (protocol.preset(family, dataset) for family in ("pearl", "naclip"))
        assert (naclip.propagation_grid, pearl.pamr_steps) == (0, 0)
        assert pearl.propagation_grid == (224 if dataset == "cityscapes" else 80)
        assert replace(pearl, name=naclip.name, pamr_steps=10, propagation_grid=0) == naclip
    for name in hosts.names():
        family = protocol.family_of(name, "ViT-B-16")
        for dataset in datasets.names():
            preset = protocol.preset(family, dataset)
            assert preset.antialias is False
            # Only a class list that is there can be asked for, and only background is uncertain.
            if preset.class_list:
                assert datasets.class_list(preset.class_list)
            if preset.prob_thd:
                assert datasets.LAYOUTS[dataset].background == 0
    assert protocol.family_of("sclip", "tiny") == "tiny"
    with pytest.raises(InputError, match="host 'clop' is not known: clip, maskclip"):
        protocol.family_of("clop", "ViT-B-16")


def test_pearls_key_weight_follows_the_benchmark():
    for dataset in datasets.names():
        weight = {"key_weight": 0.3} if dataset in ("ade20k", "cityscapes") else {}
        assert protocol.host_options("pearl", dataset, "pearl") == weight
        assert protocol.host_options("pearl", dataset, "clearclip") == {}
        for family in protocol.FAMILIES.keys() - {"pearl"}:
            assert protocol.host_options(family, dataset, "pearl") == {}


def ade20k(root):
    for number in range(2):
        write_picture(root / f"images/validation/p{number}.jpg", (40, 50), number)
        mask = np.full((40, 50), 1 + number, np.uint8)
        write_mask(root / f"annotations/validation/p{number}.png", mask)


def test_a_preset_sets_its_hosts_options_and_the_command_line_changes_them(run, tmp_path):
    home = tmp_path / "ade/ADEChallengeData2016"
    ade20k(home)
    out = tmp_path / "out"
    asked = ["eval", "ade20k", "--root", home.parent, "--host", "pearl", "--preset", "pearl"]
    asked += [*SMALL, "--propagation-grid", "0", "--quiet", "--out", out]
    assert run(*asked)[::2] == (0, "")
    options = json.loads((out / "result.json").read_text())["protocol"]["host_options"]
    assert options == {"steps": 5, "key_weight": 0.3, "residual": False}
    # A folder that was counted with other options is not gone on with.
    code, _, stderr = run(*asked, "--host-option", "key_weight=0.08")
    assert code == 1
    assert "host_options.key_weight: 0.3, now 0.08" in stderr
    assert run(*asked, "--host-option", "key_weight=0.08", "--restart")[0] == 0
    options = json.loads((out / "result.json").read_text())["protocol"]["host_options"]
    assert options["key_weight"] == 0.08
    stderr = run(*asked, "--host-option", "weight=0.08")[2]
    assert "host 'pearl' has no option 'weight'; those it has" in stderr


def result_of(**changes):
    record = {
        "host": "proxyclip",
        "model": "ViT-B-16",
        "pretrained": "openai",
        "vfm": "dino",
        "dataset": "voc21",
        "feedback": None,
        "preset": {"name": "proxyclip/voc21"},
        **changes,
    }
    record.setdefault("host_options", hosts.host_class(record["host"]).default_options())
    names = ("background", "cat", "dog")
    counts = np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    return Result(counts, names, 2, {}, 1.0, record)


def test_the_report_compares_with_the_paper():
    text = report.text(result_of())
    # 6/8 and 2/4; dog is nowhere.
    assert "mIoU 62.50  over 2 classes, 2 pictures, 10 pixels" in text
    assert "absent" in text
    assert "table 2: 61.3 without FSA (+1.20), 63.7 with FSA (-1.20); this run is without" in text
    assert "not comparable" not in text
    text = report.text(result_of(preset={"name": "tiny/voc21"}, pretrained="mine.pt"))
    assert "not comparable: preset tiny/voc21 instead of proxyclip/voc21" in text
    assert "not comparable: weights mine.pt instead of openai" in text
    text = report.text(result_of(host_options={"shift": 1.0, "gain": 3.0}))
    assert "not comparable: host option shift=1.0 instead of 1.2" in text
    assert "no number" in report.text(result_of(dataset="folder"))


def test_numbers_are_compared_under_the_settings_they_were_made_with():
    with_fsa = {"feedback": {"beta": 3.0}, "dataset": "context60"}
    text = report.text(result_of(**with_fsa, preset={"name": "fsa/context60"}))
    assert "not comparable" not in text
    text = report.text(result_of(**with_fsa, preset={"name": "proxyclip/context60"}))
    assert "not comparable: preset proxyclip/context60 instead of fsa/context60" in text
    text = report.text(result_of(dataset="context60", preset={"name": "fsa/context60"}))
    assert "not comparable: preset fsa/context60 instead of proxyclip/context60" in text


def test_what_is_odd_about_published_numbers_is_said_beside_them():
    for dataset in ("ade847", "context459"):
        text = report.text(result_of(dataset=dataset, preset={"name": f"proxyclip/{dataset}"}))
        number, note = text.splitlines()[5:7]
        assert number.startswith("mIoU")
        assert "mmsegmentation's metric, which leaves out class 255" in note
    assert "mmsegmentation" not in report.text(result_of())
    for model, exchanged in (("ViT-B-16", True), ("ViT-L-14", False), ("ViT-H-14", True)):
        for dataset in ("context60", "context59", "voc21"):
            changes = {"host": "clearclip", "vfm": None, "model": model, "dataset": dataset}
            text = report.text(result_of(**changes, preset={"name": f"clearclip/{dataset}"}))
            expected = exchanged and dataset != "voc21"
            assert ("look exchanged" in text) == expected
    cell = paper.find("clearclip", "ViT-B-16", None, "context60")
    assert "prints 36.6 for Context60 and 33.8 for Context59" in cell.note


def test_the_rows_of_the_papers_ablations():
    base = FSAConfig()
    rows = sweep.rows(["scaling", "pruning", "isolation", "adaptations", "similarity"], base)
    told = [(row.table, row.row) for row in rows]
    assert told == [
        *[("pruning", n) for n in ("none", "ratio", "threshold", "confidence", "scaled")],
        *[("isolation", n) for n in ("host", "off", "on")],
        *[("adaptations", n) for n in ("host", "after", "before", "only", "ensemble")],
        *[("similarity", n) for n in ("cosine", "kl")],
    ]
    of = {(row.table, row.row): row.config for row in rows}
    assert of["pruning", "none"] == base.replace(scaling=False, pruning=None)
    assert of["pruning", "ratio"] == base.replace(scaling=False, pruning="ratio")
    assert of["pruning", "threshold"] == base.replace(scaling=False, pruning="threshold")
    assert of["pruning", "confidence"] == base.replace(scaling=False)
    assert of["isolation", "host"] is None
    assert of["isolation", "off"] == base.replace(isolation=False)
    assert of["adaptations", "before"] == base.replace(adaptations=("before",))
    assert of["similarity", "cosine"] == base.replace(similarity="cosine")
    for table, row in (("pruning", "scaled"), ("isolation", "on"), ("adaptations", "ensemble")):
        assert of[table, row] == base
    for name in ("confidence", "beta"):
        baseline, *swept = sweep.rows([name], base)
        assert baseline.config is None
        assert base in [row.config for row in swept]
        assert len({getattr(row.config, name) for row in swept}) == len(swept) >= 7
    assert len(sweep.rows(["scaling"], base)) == 2
    with pytest.raises(InputError, match="sweep size is not known"):
        sweep.rows(["size", "beta"], base)


def test_a_sweep_writes_the_papers_table(run, tmp_path):
    root, out = folder(tmp_path / "data", pictures=2), tmp_path / "out"
    arguments = ["eval", "folder", "--root", root, "--out", out, *SMALL, "--quiet"]
    code, stdout, _ = run(*arguments, "--sweep", "isolation,similarity")
    assert code == 0
    table = (out / "sweep.md").read_text()
    assert table in stdout
    assert "| Attention isolation | mIoU |\n| --- | ---: |\n| w/o FSA (baseline) | " in table
    record = json.loads((out / "sweep.json").read_text())
    rows = {(row["table"], row["row"]): row for row in record["rows"]}
    assert rows["isolation", "host"]["feedback"] is None
    assert rows["isolation", "off"]["feedback"]["isolation"] is False
    assert rows["isolation", "on"]["miou"] == rows["similarity", "kl"]["miou"]
    with (out / "sweep.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["miou"]) for row in written] == [row["miou"] for row in record["rows"]]
    # A configuration that two tables name is run once.
    assert (out / "isolation-on").is_dir()
    assert not (out / "similarity-kl").exists()
    single = json.loads((out / "isolation-off/result.json").read_text())
    assert round(100 * single["miou"], 4) == rows["isolation", "off"]["miou"]


def swept_over_beta():
    rows = sweep.rows(["beta"], FSAConfig())
    return sweep.Swept(tuple(rows), tuple(result_of() for _ in rows))


def test_the_papers_column_is_there_where_it_has_numbers():
    rows = sweep.rows(["similarity"], FSAConfig())
    table = sweep.Swept(tuple(rows), (result_of(), result_of())).markdown()
    assert "| Cosine | 62.50 | 43.2 |\n| KL divergence | 62.50 | 43.3 |" in table
    other = sweep.Swept(tuple(rows), (result_of(host="vv"), result_of(host="vv"))).markdown()
    assert "| Cosine | 62.50 |\n" in other


def test_the_sensitivity_is_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    files = swept_over_beta().save(tmp_path)
    assert files[-1] == tmp_path / "sensitivity.png"
    assert files[-1].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_only_the_plot_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = swept_over_beta().save(tmp_path)
    assert [file.name for file in files] == ["sweep.json", "sweep.csv", "sweep.md"]
