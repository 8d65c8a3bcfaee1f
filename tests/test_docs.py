"""The pages under docs/ agree with the code: their YAML loads, their links lead somewhere, their names exist."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import detbb
from detbb.config.schema import DataConfig
from detbb.data import images
from detbb.data.formats import FORMATS, read_split
from detbb.heads import HEADS
from detbb.heads.loading import load_config
from detbb.structures.predictions import Predictions
from detbb.training.start import repairs

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
# What the pieces of YAML go on top of; one with a `base` of its own, or that opens with `# complete`, stands alone.
BASE = """
output_dir: runs/mine
init_from: runs/base/checkpoints/best.pt
data:
  coco:
    format: coco
    train: {images: coco/train, annotations: coco/train.json}
    val: {images: coco/val, annotations: coco/val.json}
  coco_stuff:
    format: semantic
    train: {images: coco/train, annotations: coco/stuff}
    classes: coco/stuff.json
heads:
  objects: {type: fcos, data: coco}
train: {steps: 9000}
"""


def page(name: str) -> str:
    return (REPOSITORY / "docs" / f"{name}.md").read_text()


@pytest.mark.parametrize("block", BLOCKS)
def test_yaml_on_a_page_loads(block: str, tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    (tmp_path / "base.yaml").write_text(BASE)
    if "base" in (values := yaml.safe_load(block)):
        (tmp_path / "base.yaml").write_text((REPOSITORY / "docs" / values["base"]).read_text())
        block = re.sub(r"^base: .*", "base: base.yaml", block, flags=re.MULTILINE)
    elif not block.startswith("# complete"):
        block = f"base: base.yaml\n{block}"
    (tmp_path / "mine.yaml").write_text(block)
    load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_of_a_page_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w.]+)", (REPOSITORY / "README.md").read_text()))
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} <= linked


def test_example_of_a_page_is_the_example_file():
    written = yaml.safe_load((REPOSITORY / "examples" / "counting.yaml").read_text())
    assert any(yaml.safe_load(block.values[0]) == written for block in BLOCKS)


def test_data_page_names_every_format_and_every_repair():
    text = " ".join(page("data").split())
    assert all(f"`{name}`" in text for name in FORMATS)
    assert all(name.replace("JPEG2000", "JPEG 2000").lower() in text.lower() for name in images.FORMATS)
    readers = [
        REPOSITORY / "detbb" / "data" / "formats" / f"{name}.py"
        for name in ("coco", "faults", "semantic", "voc", "yolo")
    ]
    code = "\n".join(path.read_text() for path in readers)
    kinds = re.findall(r"faults\.repair\(\s*\"(.*?)(?: \(.*?\))?(?:, \w+ ids|:)?\"", code)
    assert len(kinds) >= 5
    assert [kind for kind in kinds if kind not in text] == []


def test_evaluation_page_names_every_metric_and_every_head():
    text = page("evaluation")
    code = (REPOSITORY / "detbb" / "metrics" / "evaluators.py").read_text()
    sem = re.findall(r'"(sem/\w+)"', code)
    box = [f"{kind}/AP{tail}" for kind in ("bbox", "segm") for tail in ("", "50", "75", "s", "m", "l", "-<class>")]
    points = [f"keypoints/AP{tail}" for tail in ("", "50", "75", "m", "l", "-<class>")]
    labels = ["cls/accuracy", "cls/accuracy-<class>", "cls/mAP", "cls/AP-<class>"]
    assert len(sem) == 4
    for name in (*sem, "sem/IoU-<class>", *box, *points, *labels):
        assert f"`{name}`" in text, name
    assert all(f"`{name}`" in text for name in HEADS)


def test_export_page_names_every_output():
    assert all(f"`{field.name}`" in page("export") for field in fields(Predictions))


def test_what_was_repaired_is_said_with_the_first_ids(tmp_path: Path):
    images = [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}]
    boxes = {7: [1, 1, 0, 5], 8: [1, 1, 5, 5], 9: [30, 1, 5, 5]}
    objects = [{"id": i, "image_id": 1, "category_id": 1, "bbox": b, "area": 1, "iscrowd": 0} for i, b in boxes.items()]
    coco = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "car"}]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    source = DataConfig(format="coco")
    source.train.images, source.train.annotations = str(tmp_path), str(tmp_path / "a.json")
    annotations = read_split(source, "train", "mine")
    assert repairs({"mine": annotations}, {}) == [
        "WARNING: data.mine.train: 1 x box of no area (dropped), annotation ids 7",
        "WARNING: data.mine.train: 1 x box outside its image (dropped), annotation ids 9",
    ]


@pytest.mark.parametrize("name", detbb.__all__)
def test_docstring_of_a_public_name_shows_a_call(name: str):
    value = getattr(detbb, name)
    assert isinstance(value, dict) or re.search(rf"^ {{8}}.*detbb\.{name}\b", value.__doc__ or "", re.MULTILINE)
