"""Doors to code outside the package: the examples of docs/extend.md are these very files, and a run uses them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from planted import DataSet
from runs import lines, tiny_config

from detbb.checkpoint.content import load_detector
from detbb.config.schema import DataConfig, SplitConfig
from detbb.core.errors import UserError
from detbb.data.doctor.repair import check
from detbb.data.formats import read_split
from detbb.inference.evaluate import evaluate
from detbb.training.loop import train

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "extend.md").read_text()
CSV = "examples.csv_format:CSV"
OWN_WRITER = "log.to=[metrics, 'examples.csv_writer:CsvWriter']"


@pytest.mark.parametrize("name", ["csv_writer", "csv_format"])
def test_page_shows_the_example_as_it_is_in_under_40_lines(name: str):
    code = (REPOSITORY / "examples" / f"{name}.py").read_text()
    assert f"```python\n{code}```" in PAGE and code.count("\n") < 40


def test_a_writer_from_outside_holds_every_evaluation_once(tmp_path: Path, monkeypatch):
    """Also where a resumed run repeats one that metrics.jsonl, which is written last, does not hold."""
    monkeypatch.syspath_prepend(REPOSITORY)
    train(tiny_config(tmp_path, OWN_WRITER, "train.steps=4", "eval.every=2"))
    run = tmp_path / "run"
    file = run / "metrics.jsonl"
    kept = [line for line in file.read_text().splitlines(keepends=True) if '"step": 4, "split": "val"' not in line]
    file.write_text("".join(kept))
    train(tiny_config(tmp_path, OWN_WRITER, "train.steps=4", "eval.every=2"), resume="auto")
    rows = list(csv.reader((run / "metrics.csv").open()))
    expected = [(str(r["step"]), name, value) for r in lines(run, "val") for name, value in r.items() if "/" in name]
    assert [(step, name, float(value)) for step, _, _, name, value in rows] == expected
    assert {r["step"] for r in lines(run, "val")} == {2, 4} and not (run / "tb").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[metrics, csv]", r"log.to: 'csv' is not known; valid are metrics, tensorboard, package.module:Name"),
        ("[metrics, 'no_such_module:Csv']", "log.to 'no_such_module:Csv': cannot import 'no_such_module'"),
        ("[metrics, 'pathlib:Path']", "log.to 'pathlib:Path': 'Path' of 'pathlib' is no subclass of detbb.Writer"),
        ("[tensorboard]", "log.to: must name 'metrics', which a resumed run reads"),
    ],
)
def test_a_writer_that_cannot_be_used_is_an_error_at_start(tmp_path: Path, names: str, message: str):
    with pytest.raises(UserError, match=message):
        train(tiny_config(tmp_path, f"log.to={names}"))
    assert not (tmp_path / "run").exists()


def as_csv(data: DataSet, split: str) -> SplitConfig:
    """A split of `data` as the example's CSV file."""
    coco, path = data.json[split], data.folder / f"{split}.csv"
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    names = {category["id"]: category["name"] for category in coco["categories"]}
    rows = [(files[o["image_id"]], names[o["category_id"]], *o["bbox"]) for o in coco["annotations"]]
    lines = [f"{file},{name},{x},{y},{x + w},{y + h}" for file, name, x, y, w, h in rows]
    path.write_text("\n".join(["file,class,x1,y1,x2,y2", *lines]))
    return SplitConfig(images=str(data.images(split)), annotations=str(path))


def test_a_data_format_from_outside_is_examined_trained_and_repaired(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    data = DataSet(tmp_path / "data")
    coco = read_split(data.source(), "train", "shapes")
    source = DataConfig(format=CSV, train=as_csv(data, "train"), val=as_csv(data, "val"), image_size=[32, 64])
    own = read_split(source, "train", "shapes")
    assert own is not None and coco is not None and list(own.file_names) == list(coco.file_names)
    for name in ("boxes_xywh", "labels", "first", "sizes"):
        assert getattr(own, name).tolist() == getattr(coco, name).tolist(), name
    config = tiny_config(tmp_path, "train.steps=4", "train.batch_size=2")
    config.data = {"shapes": source}
    check(config, fix=tmp_path / "fixed")
    train(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    assert load_detector(checkpoint).classes["shapes"].names == ("car", "zebra")
    assert "shapes/bbox/AP" in evaluate(checkpoint, output_dir=tmp_path / "eval")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("csv", r"data\.shapes\.format.*'csv' is not known; valid are coco, .*package\.module:Name"),
        ("'no_such_module:CSV'", "'no_such_module:CSV': cannot import 'no_such_module'"),
        ("'pathlib:Path'", "'pathlib:Path': 'Path' of 'pathlib' is no detbb.data.formats.Format"),
    ],
)
def test_a_data_format_that_is_none_is_an_error_at_start(tmp_path: Path, name: str, message: str):
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, f"data.shapes.format={name}")
