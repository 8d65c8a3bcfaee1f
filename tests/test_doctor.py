"""The dataset doctor: everything at once, before training and as a command, and fast the second time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from planted import DataSet, semantic, voc, yolo
from runs import TINY, tiny_config

from detbb.core import cache
from detbb.core.cli import run
from detbb.core.errors import UserError
from detbb.data.doctor import image_files
from detbb.data.doctor.examine import examine
from detbb.data.doctor.repair import check
from detbb.training.loop import train
from detbb.training.start import read_sources

REPOSITORY = Path(__file__).resolve().parents[1]


def faulty(folder: Path) -> DataSet:
    """Six faults of five kinds in two files and three images."""
    data = DataSet(folder)
    data.set("train/annotations/0/bbox", [float("nan"), 0, 3, 3])
    data.set("train/annotations/1/image_id", 77)
    data.set("train/annotations/2/id", 0)
    data.set("val/annotations/0/category_id", 9)
    data.file("train", 1).unlink()
    data.file("val", 1).write_bytes(b"text")
    return data


def config_of(folder: Path, data: DataSet):
    config = tiny_config(folder)
    config.data = {"shapes": data.source()}
    return config


def test_training_names_everything_that_is_refused_in_one_line(tmp_path):
    config = config_of(tmp_path, faulty(tmp_path / "data"))
    with pytest.raises(UserError) as refused:
        train(config)
    for part in (
        "data.shapes.train", "not finite or beyond 1e9, annotation ids 1", "unknown image, annotation ids 2",
        "not there: 12.png",
        "data.shapes.val", "unknown category, annotation ids 50", "4.png (is not an image",
    ):  # fmt: skip
        assert part in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_training_says_what_it_repaired(tmp_path):
    data = DataSet(tmp_path / "data")
    data.set("train/annotations/2/id", 0)
    data.set("train/annotations/1/bbox", [1, 1, 0, 0])
    found, _ = read_sources(config_of(tmp_path, data))
    assert [fault.kind.split(",")[0] for fault in found["shapes"].faults] == [
        "box of no area (dropped)",
        "annotation id missing",
    ]


def test_the_command_shows_a_table_writes_json_and_exits_with_2(tmp_path, monkeypatch, capsys):
    data = faulty(tmp_path / "data").source()
    file = tmp_path / "mine.yaml"
    values = yaml.safe_load(TINY.format(out=tmp_path / "run", data="x"))
    values["data"] = {"shapes": {"train": vars(data.train), "val": vars(data.val)}}
    file.write_text(yaml.safe_dump(values))
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import check_data

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["check_data.py", *arguments])
        with pytest.raises(SystemExit) as left:
            run(check_data.main)
        return int(left.value.code or 0)

    assert call("--config", str(file), "--json", str(tmp_path / "report.json")) == 2
    out, err = capsys.readouterr()
    assert "unknown category" in out and "refused" in out and err.startswith("error: 5 kinds of fault are refused")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["refused"], report["repaired"]) == (5, 1)
    faults = report["splits"]["data.shapes.train"]["faults"]
    assert any({"outcome": "repaired", "count": 1, "first": [0]}.items() <= fault.items() for fault in faults)
    assert call("--config", str(file), "--fix", str(tmp_path / "fixed")) == 0
    assert call("--config", str(tmp_path / "fixed" / "config.yaml")) == 0
    assert call("--config", str(file), "--fix", str(tmp_path / "fixed")) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda d: None, lambda d: voc(d), lambda d: yolo(d, "1 0.5 0.5 0.2 0.2"), semantic])
def test_a_repaired_copy_of_sound_data_holds_the_same(tmp_path, change):
    data = DataSet(tmp_path / "data")
    change(data)
    config = config_of(tmp_path, data)
    before = examine(config.data).annotations("train")["shapes"]
    after = check(config, fix=tmp_path / "fixed").annotations("train")["shapes"]
    assert before.classes == after.classes and list(before.file_names) == list(after.file_names)
    for name in ("image_ids", "sizes", "first", "boxes_xywh", "labels", "areas", "object_ids", "category_ids"):
        assert getattr(before, name).tolist() == getattr(after, name).tolist(), name


def test_images_that_share_a_mask_are_copied_and_not_linked(tmp_path):
    data = DataSet(tmp_path / "data")
    semantic(data)
    shutil.copyfile(data.images() / "7.png", data.images() / "7.jpg")
    check(config_of(tmp_path, data), fix=tmp_path / "fixed")
    copies = sorted(p for p in (tmp_path / "fixed").rglob("*.*g"))
    assert [p.name for p in copies].count("7.png") == 2 and all(p.stat().st_nlink == 1 for p in copies)


def test_what_masks_and_keypoints_lack_is_said(tmp_path):
    data = DataSet(tmp_path / "data")
    for category in data.json["train"]["categories"]:
        category["keypoints"] = ["head", "tail"]
    config = config_of(tmp_path, data)
    for row, segmentation in enumerate([[[1, 1, 9, 1, 9, 9]], {"size": [30, 40], "counts": [1200]}, []]):
        data.set(f"train/annotations/{row}/segmentation", segmentation)
        data.set(f"train/annotations/{row}/keypoints", [2, 2, 2, 5, 5, 2])
    unmasked = "object without a mask (not trained for segm), annotation ids"
    for augment, count in (("default", 2), ("none", 0), ([{"type": "Blur"}], 0), ([{"type": "VerticalFlip"}], 2)):
        data.options["augment"] = augment
        config.data = {"shapes": data.source()}
        rows = {f.kind: f for _, _, f in examine(config.data).rows()}
        assert rows[unmasked].first[0] == data.json["train"]["annotations"][2]["id"]
        assert sum(f.count for kind, f in rows.items() if kind.startswith("keypoint name without")) == count


def test_a_second_pass_looks_at_no_file_until_one_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SLOW_S", 0.0)
    data = DataSet(tmp_path / "data")
    data.file("val").write_bytes(b"text")
    source = {"shapes": data.source()}
    first = examine(source).to_dict()
    (entry,) = (tmp_path / "cache" / "detbb" / "data").iterdir()
    looked = []
    monkeypatch.setattr(image_files, "image_header", lambda path: looked.append(path) or (30, 40))
    assert examine(source).to_dict() == first and first["refused"] == 1 and looked == []
    content = entry.read_bytes()
    entry.write_bytes(content[:-70] + bytes([content[-70] ^ 1]) + content[-69:])
    assert examine(source).to_dict()["refused"] == 0 and len(looked) == 5  # by the planted reader all is well
    looked.clear()
    data.draw("train", "7.png", seed=1)
    examine(source)
    assert len(looked) == 5


def test_real_data_passes(tmp_path, data_folder):
    root = data_folder("coco-tiny")
    config = tiny_config(tmp_path)
    files = {
        s: {"images": str(root / s), "annotations": str(root / f"annotations/instances_{s}.json")}
        for s in ("train", "val")
    }
    from detbb.config.schema import DataConfig, SplitConfig

    config.data = {"coco": DataConfig(train=SplitConfig(**files["train"]), val=SplitConfig(**files["val"]))}
    report = check(config)
    assert {row[1] for row in report.rows()} <= {"repaired", "noted"}
    assert any("gaps" in fault.kind for _, _, fault in report.rows())


def test_a_repaired_copy_joins_both_ids_of_a_class_named_twice(tmp_path):
    data = DataSet(tmp_path / "data")
    data.again("train/categories", id=3)
    data.set("train/annotations/2/category_id", 3)
    report = examine({"mine": data.source()})
    assert [str(f) for _, outcome, f in report.rows() if outcome == "refused"] == [
        "1 x class name used twice (--fix makes it one class): car (ids 1, 3)"
    ]
    fixed = check(config_of(tmp_path, data), fix=tmp_path / "fixed").annotations("train")["shapes"]
    assert fixed.classes == ("car", "zebra") and fixed.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_fault_of_train_is_not_told_again_under_val(tmp_path):
    data = DataSet(tmp_path / "data")
    voc(data)
    shutil.rmtree(data.folder / "Annotations")
    data.options["val"] = data.options["train"]
    rows = examine({"mine": data.source()}).rows()
    assert [(place, outcome) for place, outcome, _ in rows] == [("data.mine.train", "refused")]


def test_a_copy_that_would_lose_every_object_is_not_written(tmp_path):
    data = DataSet(tmp_path / "data")
    yolo(data, "0 0.5 0.5 0.2 0.2 0.9", "0 0.5 0.5 0.2 0.2 0.9")
    with pytest.raises(UserError, match=r"--fix: .*train: nothing would be left: 3 x line that is a box and a conf"):
        check(config_of(tmp_path, data), fix=tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()
