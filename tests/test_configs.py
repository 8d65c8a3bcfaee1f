"""Every file in configs/ and examples/ is a run that could start: it loads, its detector builds, its phases fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from detbb.config.messages import node_at
from detbb.config.phases import plan_phases
from detbb.detector import build_detector
from detbb.freeze import frozen_names
from detbb.heads.loading import load_config
from detbb.training.start import refuse_random

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted(p for folder in ("configs", "examples") for p in (REPOSITORY / folder).rglob("*.yaml"))
SCHEMA = REPOSITORY / "docs" / "config.schema.json"
BASES = [p for p in FILES if p.stem.endswith("_base")]
RUNS = [p for p in FILES if p not in BASES]
each_run = pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
CLASSES = {"names": ["a", "b", "c"], "category_ids": [1, 2, 3], "keypoints": ["left", "right"]}


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("DETBB_DATA", raising=False)
    monkeypatch.syspath_prepend(REPOSITORY)


@each_run
def test_it_is_valid_and_opens_with_its_command_time_and_result(path: Path):
    load_config(path)
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# yaml-language-server: $schema=" + os.path.relpath(SCHEMA, path.parent) + "\n# ")
    assert "tools/train.py --config " + path.relative_to(REPOSITORY).as_posix() in header
    assert "Time:" in header or "minutes" in header
    assert any(word in header for word in ("Aims at", "easured"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_schema_for_editors_knows_its_keys(path: Path):
    schema, values = json.loads(SCHEMA.read_text()), yaml.safe_load(path.read_text())
    for name, head in values.pop("heads", {}).items():
        known = schema["$defs"].get(f"{head.get('type')} head", {"properties": head})
        assert set(head) <= set(known["properties"]), name
    places = [((), values)]
    for keys, section in places:
        node = node_at(schema, keys)
        assert set(section) <= set(node.get("properties", section)), keys
        places += [((*keys, key), item) for key, item in section.items() if isinstance(item, dict)]
    assert node_at(schema, ("data", "any", "train"))["additionalProperties"] is False


@each_run
def test_each_config_builds_and_its_phases_freeze_as_said(path: Path):
    config = load_config(path)
    with torch.device("meta"):  # shapes alone: no memory, no time
        detector = build_detector(config, dict.fromkeys(config.heads, CLASSES))
    phases = plan_phases(config, config.train.steps or 1000)
    for phase in phases:
        detector.freeze(phase.freeze)
        assert detector.active_heads()
        frozen = set(frozen_names(detector))
        for name in phase.freeze:
            prefixes = ("backbone.conv1.", "backbone.bn1.") if name == "backbone.stem" else (f"{name}.",)
            inside = {n for n in detector.state_dict() if n.startswith(prefixes)}
            assert inside and inside <= frozen
    given = {n for n in detector.state_dict() if n.startswith("backbone.")} if config.backbone.weights else set()
    if config.init_from is None:
        assert refuse_random(config, phases, detector, set(detector.state_dict()) - given) == []


@each_run
def test_data_roots_come_from_the_environment(path: Path, monkeypatch):
    monkeypatch.setenv("DETBB_DATA", "/elsewhere")
    for source in load_config(path).data.values():
        for split in filter(None, (source.train, source.val)):
            places = [p for p in (split.images, split.annotations) if p]
            assert all(p.startswith("/elsewhere/") or p.startswith("data/shapes") for p in places)


def test_no_recipe_is_twice_and_every_base_has_several_users():
    loaded = {path: load_config(path) for path in RUNS}
    outputs = [config.output_dir for config in loaded.values()]
    assert len(set(outputs)) == len(outputs)
    users = [(p.parent / base).resolve() for p in RUNS if (base := yaml.safe_load(p.read_text()).get("base"))]
    assert all(users.count(base) > 1 for base in BASES)


def test_there_is_a_full_size_recipe_for_every_kind_of_box_head():
    types = {head.type for path in RUNS if path.name.startswith("coco_") for head in load_config(path).heads.values()}
    assert {"faster_rcnn", "mask_rcnn", "retinanet", "fcos", "faster_rcnn_c4", "keypoint_rcnn"} <= types
