"""Every planted fault has the outcome that docs/reliability.md gives it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
from planted import DATA_FAULTS, DOCS, FILE_FAULTS, DataFault, DataSet, FileFault, Files, document
from runs import shrink, tiny_config

from detbb.checkpoint.content import FORMAT_VERSION, open_checkpoint, restore_detector, versions
from detbb.config.loading import config_to_dict
from detbb.core.errors import UserError
from detbb.data.doctor.examine import Report, examine
from detbb.data.doctor.repair import write_repaired
from detbb.data.formats.semantic import read_mask
from detbb.data.images import BadImage
from detbb.data.loader import eval_loader
from detbb.detector import Detector, build_detector
from detbb.modeling.backbones import Backbone
from detbb.modeling.backbones.resnet import build_resnet
from detbb.modeling.weights import load_backbone_weights

FEW = "noted: .* (class without any object|class of fewer than 10 objects):"  # sets this small always have some


def read_all(report: Report, data: DataSet) -> list[str]:
    """Decode every image with its target; the files that cannot be read."""
    bad = []
    for split in ("train", "val"):
        for found in report.annotations(split).values():
            for batch in eval_loader(found, data.source(), batch_size=2):
                bad += batch.bad_images
            if found.has("semantic"):
                for index in range(len(found)):
                    try:
                        read_mask(found, index)
                    except BadImage as error:
                        bad.append(str(error))
    return bad


@pytest.mark.parametrize("fault", DATA_FAULTS, ids=lambda f: f.title)
def test_a_fault_of_the_data_has_its_documented_outcome(tmp_path: Path, fault: DataFault) -> None:
    data = DataSet(tmp_path / "data")
    fault.plant(data)
    report = examine({"mine": data.source()})
    rows = [f"{outcome}: {f}" for _, outcome, f in report.rows()]
    if fault.outcome in ("refused", "repaired", "noted"):
        assert any(re.search(f"{fault.outcome}: .*{fault.says}", row) for row in rows), rows
    else:
        assert [row for row in rows if not re.search(FEW, row)] == []
    if fault.outcome == "refused":
        with pytest.raises(UserError, match=fault.says) as refused:
            report.check()
        assert "\n" not in str(refused.value)
    elif fault.outcome == "refused when read":
        with pytest.raises(UserError, match=fault.says):
            read_all(report, data)
    else:
        report.check()
        bad = read_all(report, data)
        assert bool(bad) == (fault.outcome == "left out when read" or "replaced" in " ".join(rows))
        assert not bad or re.search(fault.says, bad[0]) or fault.outcome == "repaired"


@pytest.mark.parametrize("fault", [f for f in DATA_FAULTS if f.outcome == "refused"], ids=lambda f: f.title)
def test_what_is_refused_is_gone_from_the_repaired_copy(tmp_path: Path, fault: DataFault) -> None:
    data = DataSet(tmp_path / "data")
    fault.plant(data)
    config = tiny_config(tmp_path)
    config.data = {"mine": data.source()}
    report = examine(config.data)
    before = {p: p.lstat().st_mtime_ns for p in data.folder.rglob("*")}
    if not fault.fixed:
        with pytest.raises(UserError, match=r"cannot be repaired|empty set"):
            examine(write_repaired(config, report, tmp_path / "fixed").data).check()
        return
    repaired = examine(write_repaired(config, report, tmp_path / "fixed").data)
    repaired.check()
    assert sum(map(len, repaired.annotations("train").values())) >= 1
    assert before == {p: p.lstat().st_mtime_ns for p in data.folder.rglob("*")}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A checkpoint and backbone weights without faults."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        return _sound(tmp_path_factory.mktemp("sound"))


def _sound(folder: Path) -> Files:
    config = tiny_config(folder)
    classes = {"shapes": {"names": ["a", "b"], "category_ids": [1, 2], "keypoints": []}}
    model = {n: t.detach().clone() for n, t in build_detector(config, classes).state_dict().items()}
    content = {
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(config),
        "step": 5,
        "phase": 0,
        "model": model,
        "ema": {"updates": 5, "tensors": {n: t.clone() for n, t in model.items() if t.is_floating_point()}},
        "optimizer": {"type": "sgd", "state": {}},
        "scaler": {},
        "rng": {"seed": 0, "torch": torch.get_rng_state()},
        "data": {"images": {"shapes": 24}, "batch_size": 4, "skipped_in_row": 0},
        "frozen": {"names": [], "digests": {}},
        "classes": classes,
        "versions": versions(),
    }
    return Files(folder, content, build_resnet("resnet18", out=("layer2",)).state_dict())


def use(kind: str, path: Path) -> Detector | Backbone:
    if kind == "checkpoint":
        return restore_detector(open_checkpoint(path))
    backbone = build_resnet("resnet18", out=("layer2",))
    load_backbone_weights(backbone, str(path))
    return backbone


@pytest.mark.parametrize("fault", FILE_FAULTS, ids=lambda f: f"{f.kind}: {f.title}")
def test_a_broken_file_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: Files, fault: FileFault
) -> None:
    shrink(monkeypatch.setattr)
    files = Files(tmp_path, sound.content, sound.weights)
    path = fault.make(files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=fault.says) as refused:
        use(fault.kind, path)
    assert str(tmp_path) in str(refused.value) or "its own config" in str(refused.value) or "config" in fault.title
    assert "\n" not in str(refused.value) and not files.sentinel.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_the_files_that_faults_are_planted_in_are_sound(tmp_path, monkeypatch, sound):
    shrink(monkeypatch.setattr)
    files = Files(tmp_path, sound.content, sound.weights)
    use("checkpoint", files.save(files.content))
    use("weights", files.save(files.weights, "x.pth"))


def test_the_page_on_reliability_lists_exactly_these_faults():
    assert len(DATA_FAULTS) >= 60 and len(FILE_FAULTS) >= 25
    assert DOCS.read_text() == document(DOCS.read_text()), "python tests/support/planted.py"
