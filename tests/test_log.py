"""What a run leaves in its folder to be read later."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detbb.config.phases import Phase
from detbb.report.freeze_report import PhaseTable, Row
from detbb.report.log import RunLog
from detbb.report.tables import summary_table
from detbb.report.writers import read_evaluations

pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")


def lines_of(folder: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_have_the_documented_form_and_are_whole_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.train(20, {"loss": 1.5, "objects/loss_cls": 1.0, "lr": 0.01, "data_s": 0.1, "step_s": 0.4})
    Image.new("RGB", (5, 4)).save(tmp_path / "samples.png")
    log.evaluation(20, "ema", {"objects/bbox/AP": 37.9}, images={"objects": tmp_path / "samples.png"})
    train, evaluation = lines_of(tmp_path)  # before close: each line is flushed
    assert list(train) == ["step", "split", "loss", "objects/loss_cls", "lr", "data_s", "step_s"]
    assert evaluation == {"step": 20, "split": "val", "weights": "ema", "objects/bbox/AP": 37.9}
    log.text("freeze", "| a |", 0)
    log.close()
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [s.value for s in board.Scalars("val/ema/objects/bbox/AP")] == [pytest.approx(37.9)]
    assert board.Tags()["images"] == ["val/ema/objects"] and board.Tags()["tensors"] == ["freeze/text_summary"]


def test_log_txt_holds_what_the_terminal_showed_with_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, epoch_steps=2.5)
    log.info("loaded [brackets] and ünïcode 細胞")
    for step in (1, 2, 3):
        log.progress(step, 10, losses={"loss": 3.0}, images=8, step_s=2.0, data_s=0.5)
    losses = {"loss_cls": 0.256, "loss_box_reg": 0.33, "loss_centerness": 0.61}
    losses = {"loss": 1.196, **{f"a_long_name/{name}": value for name, value in losses.items()}, "grad_norm": 3.14}
    log.train(3, {**losses, "lr": 0.001, "step_s": 2.0})
    log.train(3, {"loss": 3.25, "a/loss_cls": 1, "b/loss_sem": 2.25})
    log.info(summary_table({"objects/bbox/AP": 37.94})[0])
    log.close()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", text, flags=re.MULTILINE) == shown != text
    assert "loaded [brackets] and ünïcode 細胞" in text and "37.9" in text and "\x1b" not in text
    one, two = (line for line in shown.splitlines() if "epoch" in line)
    assert re.sub(r"[\d.]+ GiB", "1.4 GiB", one) == (
        "epoch 2/4  step 3/10  eta 0:00:14  4.0 images/s  data wait 25%  mem 1.4 GiB  "
        "loss 1.20 (cls 0.26 box 0.33 ctr 0.61)  grad 3.14  lr 0.001"
    )
    assert len(one) <= 140 and two.endswith("loss 3.25 (a: cls 1.00, b: sem 2.25)")


def test_resume_keeps_every_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (10, 20, 30, 40):
        log.train(step, {"loss": step})
        log.evaluation(step, "ema", {"objects/bbox/AP": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "tr')  # killed while writing
    time.sleep(1)  # TensorBoard reads event files in the order of their names, which begin with the second
    log = RunLog(tmp_path, resume_step=20)
    assert [line["step"] for line in read_evaluations(tmp_path / "metrics.jsonl")] == [10, 20]
    for step in (30, 40):
        log.train(step, {"loss": -step})
    log.evaluation(30, "model", {"objects/bbox/AP": 3})
    last = {"step": 30, "split": "val", "weights": "model", "objects/bbox/AP": 3}
    assert read_evaluations(tmp_path / "metrics.jsonl")[2:] == [last]
    log.close()
    losses = [(line["step"], line["loss"]) for line in lines_of(tmp_path) if line["split"] == "train"]
    assert losses == [(10, 10), (20, 20), (30, -30), (40, -40)]
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == losses


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.train(1, {"loss": float("nan"), "lr": float("inf")})
    log.close()
    assert lines_of(tmp_path) == [{"step": 1, "split": "train", "loss": None, "lr": None}]


def test_an_evaluation_that_was_stopped_is_not_recorded(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.evaluation(1, "ema", {})
    log.close()
    assert lines_of(tmp_path) == []


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", rank=1)
    log.info("hello")
    log.train(1, {"loss": 1.0})
    log.evaluation(1, "ema", {"a/b/c": 1.0})
    log.progress(1, 2, losses={}, images=1, step_s=1.0, data_s=0.0)
    log.text("tag", "text", 1)
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_summary_shows_each_branch_and_each_class() -> None:
    metrics = {"objects/bbox/AP": 50.0, "objects/bbox/AP50": 80.04, "objects/bbox/AP-red-cell": 12.34}
    metrics |= {"scene/sem/mIoU": 61.0, "scene/sem/IoU-sky/blue": 99.0, "count/mae": 3.0}
    console = Console(file=io.StringIO(), width=100)
    for made in summary_table(metrics, title="step 9"):
        console.print(made)
    rows = [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]
    assert "step 9 metrics" in rows and "objects/bbox 50.0 80.0" in rows and "scene/sem 61.0" in rows
    assert "count 3.0" in rows
    assert "objects · red-cell 12.3" in rows and "scene · sky/blue 99.0" in rows


def test_freeze_table_is_whole_at_80_columns() -> None:
    module, rates = "backbone.layer4", [0.0, 0.05]
    row = Row(module, 14_964_736, 14_964_736, "FrozenBatchNorm2d", "moving", "trained", 1e-6, rates, "yes")
    shown = {}
    for width in (80, 140):
        console = Console(file=io.StringIO(), width=width)
        console.print(PhaseTable(Phase(0, 0, 160, ("backbone.stem",)), [row]))
        shown[width] = console.file.getvalue()
        assert max(map(len, shown[width].splitlines())) <= width and "…" not in shown[width]
        texts = ["phase 0: steps 0 to 160, frozen: backbone.stem", module, "14,964,736", "FrozenBN", "moving", "1e-06"]
        assert [text for text in texts if text not in shown[width]] == []
    assert "0, 0.05" in shown[140] and "0, 0.05" not in shown[80]


def test_many_classes_in_columns_very_many_by_best_and_worst() -> None:
    for count in (80, 1203):
        metrics = {"objects/bbox/AP": 50.0} | {f"objects/bbox/AP-thing {i}": i / 13 for i in range(count)}
        console = Console(file=io.StringIO(), width=100)
        for made in summary_table(metrics):
            console.print(made)
        text = console.file.getvalue()
        assert text.count("\n") < 50 and max(map(len, text.splitlines())) <= 100
        named = {int(i) for i in re.findall(r"thing (\d+)", text)}
        assert named == (set(range(80)) if count == 80 else {*range(10), *range(1193, 1203)})
        assert ("the 10 worst of 1203 (all: metrics.json)" in text) == (count == 1203)
