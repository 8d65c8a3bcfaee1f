"""Doors to code outside the package: the examples of docs/extend.md are these very files, and a run uses them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from runs import lines, tiny_config

from detbb.core.errors import UserError
from detbb.training.loop import train

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "extend.md").read_text()
OWN_WRITER = "log.to=[metrics, 'examples.csv_writer:CsvWriter']"


@pytest.mark.parametrize("name", ["csv_writer"])
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
