"""Stage two: a branch is added by a config, and what was there does not change in one bit."""

from __future__ import annotations

import importlib
import json
import os
import signal

import pytest
import torch
import yaml
from runs import learned, load
from stages import FIRST, SECOND, SMALL_FILES, THIRD, evaluated, results, stage

from detbb.core.errors import Stopped, UserError
from detbb.heads.loading import load_config
from detbb.inference.evaluate import evaluate
from detbb.training.loop import train

FROZEN = "freeze=[backbone, neck, heads.first]"
SHARED = ("backbone.", "neck.")
pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    """A trained detector with an average that is not its raw weights."""
    folder = tmp_path_factory.mktemp("base")
    return train(stage(folder, data, {"first": FIRST}, *SMALL_FILES))


@pytest.fixture(scope="module")
def second(tmp_path_factory, data, base):
    """Stage two as the manual says: the first head is listed and frozen."""
    folder = tmp_path_factory.mktemp("second")
    heads = {"first": FIRST, "second": SECOND}
    return train(stage(folder, data, heads, FROZEN, "checkpoint.every=2", base=base))


@pytest.fixture(scope="module")
def inheriting(tmp_path_factory, data, base):
    """Stage two that forgets the first head."""
    folder = tmp_path_factory.mktemp("inheriting")
    return train(stage(folder, data, {"second": SECOND}, "freeze=[backbone, neck]", base=base))


def test_the_first_branch_and_all_it_reads_keep_every_bit(base, second):
    before, after = load(base.parents[1]), load(second.parents[1])
    old = (*SHARED, "heads.first.")
    assert evaluated(before, *old) == evaluated(after, *old) and len(evaluated(before, *old)) > 100
    assert evaluated(before, *old) != evaluated(before | {"ema": None}, *old)  # else this would show nothing
    assert all(name.startswith("heads.second.") for name in after["ema"]["tensors"])
    assert set(after["frozen"]["digests"]) == set(evaluated(before, *old))


def test_the_second_branch_learned_in_every_tensor(second):
    first, last = load(second.parents[1], "step_0000002")["model"], load(second.parents[1])["model"]
    moved = {n for n in last if not torch.equal(first[n], last[n])}
    assert moved == {n for n in last if n.startswith("heads.second.")}


def test_results_of_the_first_branch_are_byte_identical(tmp_path, base, second):
    before, after = results(base, tmp_path / "before"), results(second, tmp_path / "after")
    assert set(before) == {"first"} and set(after) == {"first", "second"}
    assert before["first"] == after["first"] and json.loads(before["first"])


def test_the_run_prints_what_did_not_change(second):
    text = " ".join((second.parents[1] / "log.txt").read_text().split())
    assert "unchanged to the bit since the start (SHA-256, freeze.json): backbone (all 126 tensors), neck (all" in text
    assert "heads.first (all" in text and "heads.second (" not in text
    assert "so what it was at the start, in every prediction: first" in text
    assert "may change" not in text


def test_only_what_rested_in_every_phase_is_called_unchanged(tmp_path, data, base):
    phases = "phases=[{steps: 2, freeze: [backbone, heads.first]}, {freeze: [backbone.stem, neck, heads.first]}]"
    train(stage(tmp_path, data, {"first": FIRST, "second": SECOND}, phases, base=base))
    text = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "freeze.json): backbone (6 of 126 tensors), heads.first (all" in text and "in every prediction" not in text
    assert "heads.first: frozen while neck is trained, so its predictions may change" in text
    assert "heads.first: frozen while backbone is trained, so its predictions may change" in text


def test_best_follows_the_branch_that_learns(tmp_path, data, base):
    """The first head listed rests: its metric is the same at every evaluation, so the first one would be the best."""
    heads = {"first": FIRST, "second": SECOND}
    train(stage(tmp_path, data, heads, FROZEN, "eval.every=2", "train.steps=4", "optimizer.lr=0.01", base=base))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["second/sem/mIoU"] for r in records if r["split"] == "val"}
    assert load(tmp_path / "run", "best")["step"] == max(scores, key=scores.get) and len(set(scores.values())) > 1


def test_a_head_that_the_config_forgets_is_inherited(tmp_path, base, inheriting):
    run = inheriting.parents[1]
    before, after = load(base.parents[1]), load(run)
    assert evaluated(before, "") == {n: d for n, d in evaluated(after, "").items() if not n.startswith("heads.second")}
    assert after["config"]["inherited_heads"] == ["first"] and after["classes"]["first"] == before["classes"]["first"]
    assert "inherited untouched, not listed in this config: first" in (run / "log.txt").read_text()
    assert [p.name for p in (run / "eval" / "step_0000006").iterdir()] == ["second"]
    assert results(inheriting, tmp_path / "after")["first"] == results(base, tmp_path / "before")["first"]


def test_an_inherited_head_keeps_its_own_data_of_the_same_name(tmp_path, data, base):
    config = stage(
        tmp_path, data, {"third": THIRD}, "data.boxes.image_size=[96, 96]", "freeze=[backbone, neck]", base=base
    )
    config.data["first_boxes"] = config.data["pixels"]
    config.train.steps = 1
    content = load(train(config).parents[1])
    stored = content["config"]["data"]
    assert content["config"]["heads"]["first"]["data"] == "first_first_boxes"
    assert stored["first_first_boxes"]["image_size"] == [64, 64] and stored["boxes"]["image_size"] == [96, 96]
    assert results(tmp_path / "run" / "checkpoints" / "last.pt", tmp_path / "after", "first") == results(
        base, tmp_path / "b"
    )


@pytest.mark.parametrize(
    "own", [False, True], ids=["the file without the inherited_heads head", "the run's config.yaml"]
)
def test_a_stage_that_carries_heads_resumes_to_the_same_bits(monkeypatch, tmp_path, data, base, inheriting, own):
    training = importlib.import_module("detbb.training.loop")  # the package's attribute is the function
    learn = training.train_step

    def interrupted(*args, **kwargs):
        if kwargs["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", interrupted)
        with pytest.raises(Stopped):
            train(stage(tmp_path, data, {"second": SECOND}, "freeze=[backbone, neck]", base=base))
    config = stage(tmp_path, data, {"second": SECOND}, "freeze=[backbone, neck]", base=base)
    train(load_config(tmp_path / "run" / "config.yaml") if own else config, resume="auto")
    assert learned(tmp_path / "run") == learned(inheriting.parents[1])
    assert "resuming with another" not in (tmp_path / "run" / "log.txt").read_text()


def test_the_config_of_a_run_with_inherited_heads_repeats_it(tmp_path, inheriting):
    config = load_config(inheriting.parents[1] / "config.yaml", [f"output_dir={tmp_path / 'run'}"])
    train(config)
    assert learned(tmp_path / "run") == learned(inheriting.parents[1])


def test_a_third_stage_leaves_both_branches_as_they_were(tmp_path, data, second):
    last = train(stage(tmp_path, data, {"third": THIRD}, "freeze=[backbone, neck]", base=second))
    assert load(last.parents[1])["config"]["inherited_heads"] == ["first", "second"]
    before, after = results(second, tmp_path / "before"), results(last, tmp_path / "after")
    assert set(after) == {"first", "second", "third"} and before == {n: after[n] for n in ("first", "second")}


def test_a_changed_class_list_starts_only_the_last_layer_afresh(tmp_path, data, base):
    config = stage(
        tmp_path, data, {"first": FIRST}, "data.boxes.classes=[circle, triangle]", "train.steps=1", base=base
    )
    config.optimizer.lr = 1e-30
    last = train(config)
    before, after = evaluated(load(base.parents[1]), ""), load(last.parents[1])
    differ = {n for n, d in evaluated(after | {"ema": None}, "").items() if d != before[n] and "running" not in n}
    fresh = {n for n in differ if n.startswith("heads.first.") and after["model"][n].shape[0] == 2}
    assert fresh and {n for n in differ if n.startswith("heads.")} == fresh
    assert (
        f"{len(fresh)} start fresh, the class count changed: heads.first" in (tmp_path / "run" / "log.txt").read_text()
    )


@pytest.mark.parametrize(
    ("heads", "overrides", "message"),
    [
        ({"first": FIRST, "second": SECOND}, [FROZEN, "data.boxes.classes=[circle]", "heads.second.data=pixels"],
         "heads.first has random weights and would never be trained"),
        ({"second": SECOND.replace("p3, p4", "p2, p3")}, ["freeze=[backbone, neck]", "neck.allow_random=false"],
         "neck has random weights"),
        ({"first": FIRST}, ["neck.channels=16"], "neck.* has shape"),
        ({"first": FIRST, "gone": FIRST}, ["inherited_heads=[gone]"], "'gone' is no head of what the run starts from"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_the_start(tmp_path, data, base, heads, overrides, message):
    with pytest.raises(UserError, match=message):
        train(stage(tmp_path, data, heads, *overrides, base=base))


def test_weights_fill_only_what_the_checkpoint_lacks(tmp_path, data, base):
    """A detector up to layer3 gets layer4 from the weight file, and keeps its own layers."""
    head = FIRST.replace("p3, p4, p5", "layer3")
    config = stage(tmp_path, data, {"short": head}, "neck.type=none", "train.steps=1", name="short")
    short = train(config)
    weights = tmp_path / "r18.pth"
    given = {
        n.removeprefix("backbone."): t for n, t in load(base.parents[1])["model"].items() if n.startswith("backbone")
    }
    torch.save(given, weights)
    options = ["neck.type=none", f"backbone.weights={weights}", "freeze=[backbone]", "backbone.allow_random=false"]
    last = train(stage(tmp_path, data, {"deep": THIRD.replace("}", ", levels: [layer4]}")}, *options, base=short))
    after = load(last.parents[1])["model"]
    assert torch.equal(after["backbone.layer4.1.conv2.weight"], given["layer4.1.conv2.weight"])
    before = evaluated(load(short.parents[1]), "backbone.")
    assert before.items() <= evaluated(load(last.parents[1]), "backbone.").items() and len(before) < 100


def test_a_file_config_evaluates_inherited_heads_too(tmp_path, base, inheriting):
    text = yaml.safe_load((base.parents[1] / "config.yaml").read_text())
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(text))
    found = evaluate(inheriting, config=tmp_path / "first.yaml")
    assert {name.split("/")[0] for name in found} == {"first", "second"}
