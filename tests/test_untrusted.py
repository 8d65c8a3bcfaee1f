"""What a stranger's checkpoint may do: be read, and nothing else."""

from __future__ import annotations

import copy
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import make_head
from planted import AUTHOR, STORED_WISHES, StoredWish
from rich.table import Table
from rich.text import Text
from runs import shrink, tiny_config

from detbb.checkpoint.content import FORMAT_VERSION, load_detector, restore_detector, versions
from detbb.checkpoint.untrusted import DRAWS, _WithoutDraws
from detbb.config.loading import config_to_dict
from detbb.core.console import SafeConsole
from detbb.core.errors import UserError, printable
from detbb.core.files import save_tensors
from detbb.data.formats.shapes import CLASSES, KEYPOINTS, generate_shapes
from detbb.detector import build_detector
from detbb.heads import HEADS
from detbb.inference.evaluate import evaluate
from detbb.report.tables import print_summary


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(A folder of generated images, a checkpoint of a detector for them)."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        generate_shapes(folder / "shapes", "val", 6)
        config = tiny_config(folder, "log.images=0", "eval.weights=model")
        classes = {"names": list(CLASSES), "category_ids": [1, 2, 3], "keypoints": list(KEYPOINTS)}
        model = {n: t.detach() for n, t in build_detector(config, {"shapes": classes}).state_dict().items()}
    content = {"format_version": FORMAT_VERSION, "config": config_to_dict(config), "step": 5, "phase": 0}
    content |= {"model": model, "ema": None, "optimizer": {"type": "sgd", "state": {}}, "scaler": {}}
    content |= {"rng": {"seed": 0, "torch": torch.get_rng_state()}, "classes": {"shapes": classes}}
    content |= {"data": {"images": {"shapes": 24}, "batch_size": 4, "skipped_in_row": 0}, "versions": versions()}
    return content | {"frozen": {"names": [], "digests": {}}}


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch.setattr)


def wishing(content: dict[str, Any], values: dict[str, Any], author: str) -> dict[str, Any]:
    content = {**content, "config": copy.deepcopy(content["config"])}
    for path, value in values.items():
        *parents, last = path.split("/")
        at = content["config"]
        for part in parents:
            at = at[part]
        at[last] = author if value == AUTHOR else value
    return content


@pytest.mark.parametrize("wish", STORED_WISHES, ids=lambda w: w.title)
def test_evaluating_a_strangers_checkpoint_only_reads(
    tmp_path: Path, monkeypatch, capsys, small, sound, wish: StoredWish
):
    author, started = tmp_path / "author" / "x", []
    path = tmp_path / "x.pt"
    save_tensors(path, wishing(sound, wish.values, str(author)))
    monkeypatch.setattr("detbb.inference.evaluate.cores", lambda: 2)
    honest = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda p: (started.append(p), honest(p)))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if wish.says is None:
        assert "shapes/bbox/AP" in evaluate(path)
    else:
        with pytest.raises(UserError) as refused:
            evaluate(path)
        assert re.search(wish.says, printable(refused.value)), str(refused.value)
        assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before and "antigravity" not in sys.modules
    assert len(started) == (2 if "train/workers" in wish.values else 0)


def test_stored_shapes_are_compared_before_memory_is_taken(tmp_path, small, sound):
    """Of the same file, the tensors alone say what is built."""
    larger = wishing(sound, {"heads/shapes/num_convs": 2000}, "")
    began, honest = time.monotonic(), torch.nn.Conv2d.reset_parameters
    drawn: list[torch.device] = []
    torch.nn.Conv2d.reset_parameters = lambda self: (drawn.append(self.weight.device.type), honest(self))[1]
    try:
        with pytest.raises(UserError, match="do not fit its own config"):
            restore_detector(larger)
        assert set(drawn) == {"meta"} and time.monotonic() - began < 30
    finally:
        torch.nn.Conv2d.reset_parameters = honest


@pytest.mark.parametrize("layer", [lambda: torch.nn.Conv2d(3, 4, 3), lambda: torch.nn.Linear(5, 2)])
def test_building_for_a_file_draws_nothing(layer: Callable[[], torch.nn.Module]):
    before = torch.get_rng_state()
    with _WithoutDraws():
        made = layer()
        for name in DRAWS:
            getattr(torch.nn.init, name)(next(made.parameters()))
        constant = torch.full((3,), 2.0)
    assert before.equal(torch.get_rng_state()) and constant.tolist() == [2, 2, 2]


def test_a_loaded_detector_has_every_bit_of_the_built_one(tmp_path, small, sound):
    config = tiny_config(tmp_path)
    honest = build_detector(config, sound["classes"])
    honest.load_state_dict(sound["model"])
    save_tensors(tmp_path / "x.pt", sound)
    loaded = load_detector(tmp_path / "x.pt")
    tensors = [{**dict(d.named_parameters()), **dict(d.named_buffers())} for d in (honest, loaded)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert tensor.equal(other) and tensor.stride() == other.stride() and tensor.dtype == other.dtype, name


def test_a_head_that_needs_values_when_built_can_be_loaded(tmp_path, small, sound, monkeypatch):
    from detbb.heads.fcos import FcosHead

    class Measured(FcosHead):
        def __init__(self, config, spec):
            super().__init__(config, spec)
            self.width = float(torch.linspace(0, 1, 3).sum().item())

    monkeypatch.setattr(sys.modules[__name__], "Measured", Measured, raising=False)
    content = wishing(sound, {"heads/shapes/type": f"{__name__}:Measured"}, "")
    assert restore_detector(content).head("shapes").width == 1.5


def test_control_characters_are_escaped_on_the_terminal(capsys):
    names = ("a\x1b[31m", "b\x07", "c\u202e", "d\x9b2J", "e\ud800", "f\r", "Größe 細胞 🎈\n\t")
    written = ["a\\x1b[31m", "b\\x07", "c\\u202e", "d\\x9b2J", "e\\ud800", "f\\r", names[-1]]
    assert [printable(name) for name in names] == written
    table = Table("class", "widest")
    table.add_row(Text(names[0]), Text("x" * 20))
    SafeConsole(width=60).print(Text(names[3]), table, "plain\x1b]0;title\x07")
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\x07"} & set(shown) and "d\\x9b2J" in shown and "\\x1b]0;title" in shown


def test_the_summary_of_an_evaluation_shows_a_class_name_whole(capsys):
    print_summary({"a/bbox/AP": 1.0, "a/bbox/AP-car\x1b[2J": 2.0})
    assert "a · car\\x1b[2J" in capsys.readouterr().out


@pytest.mark.parametrize("head_type", HEADS.values(), ids=list(HEADS))
def test_every_head_has_its_shapes_without_memory(head_type):
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in make_head(head_type).state_dict().items()}
    assert shapes == {name: t.shape for name, t in make_head(head_type).state_dict().items()}
