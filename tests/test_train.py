"""Whole runs: what they leave, that they go on where they stopped, and what they refuse."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from learning import learn, make_state, small_config, small_detector
from runs import flat, learned, lines, load, tiny_config

from detbb.checkpoint.content import KEYS, load_detector, stored_config
from detbb.checkpoint.folder import CheckpointFolder
from detbb.config.loading import config_to_dict
from detbb.config.phases import Phase
from detbb.core.errors import Stopped, UserError
from detbb.core.folder_lock import LOCK_FILE, FolderLock
from detbb.freeze import FrozenTensorChanged
from detbb.heads.fcos import FcosHead
from detbb.inference.evaluate import evaluate
from detbb.report.freeze_report import FreezeJournal
from detbb.training import evaluation as run_evaluation
from detbb.training import start
from detbb.training.loop import train
from detbb.training.start import ResumePoint, claim_run_folder
from detbb.training.step import NonFinite

pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")

# The package's attributes of these names are the functions.
training = importlib.import_module("detbb.training.loop")
evaluation = importlib.import_module("detbb.inference.evaluate")

SHORT = ("data.shapes.val=null", "schedule.warmup_steps=0")
PHASES = "phases=[{steps: 3, freeze: [backbone, neck]}, {steps: 4, freeze: [backbone.stem]}, {freeze: [neck]}]"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """An undisturbed run over three phases, with accumulation, clipping and evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(folder, PHASES, "train.accumulate=2", "train.grad_clip=1.0", "eval.every=5", data=images)
    train(config)
    return folder / "run"


def stop_at(monkeypatch, step):
    """A SIGTERM to this very process while step number `step` is learned."""
    learn = training.train_step

    def interrupted(*args, **kwargs):
        if kwargs["step"] + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("stops", "workers"), [((1,), 0), ((2, 3), 2), ((4, 7, 9), 0), ((6,), 2)])
def test_stopped_and_resumed_runs_end_with_the_same_bits(monkeypatch, tmp_path, images, whole, stops, workers):
    """In a phase, at a switch, just before and after; with other worker counts; several times."""
    options = (PHASES, "train.accumulate=2", "train.grad_clip=1.0", "eval.every=5", f"train.workers={workers}")
    for step in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped) as stopped:
                train(tiny_config(tmp_path, *options, data=images), resume="auto")
        assert stopped.value.signal == signal.SIGTERM and load(tmp_path / "run")["step"] == step
    train(tiny_config(tmp_path, *options, data=images), resume="auto")
    assert learned(tmp_path / "run") == learned(whole)
    assert lines(tmp_path / "run", "train") == lines(whole, "train")
    assert lines(tmp_path / "run", "val") == lines(whole, "val")
    assert [line["step"] for line in lines(whole, "train")] == list(range(1, 11))


def test_an_interrupted_evaluation_is_made_up_for(monkeypatch, tmp_path, images, whole):
    config = tiny_config(tmp_path, PHASES, "train.accumulate=2", "train.grad_clip=1.0", "eval.every=5", data=images)
    run_source = evaluation._run
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_run", lambda *a: os.kill(os.getpid(), signal.SIGINT) or run_source(*a))
        with pytest.raises(Stopped) as stopped:
            train(config)
    assert stopped.value.signal == signal.SIGINT and not lines(tmp_path / "run", "val")
    last = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    assert "  stopped by SIGINT after step 5; checkpoint " in last and last.endswith("; go on with --resume")
    train(config, resume=str(tmp_path / "run"))
    train(config, resume="auto")
    assert "complete: step 10 of 10; raise train.steps" in (tmp_path / "run" / "log.txt").read_text()
    assert learned(tmp_path / "run") == learned(whole) and lines(tmp_path / "run", "val") == lines(whole, "val")


def test_a_run_leaves_what_the_contract_names(whole):
    for name in (
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "freeze.json",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
    ):
        assert (whole / name).is_file(), name
    for name in ("results.json", "metrics.json", "pr_curves.png", "samples.png"):
        assert (whole / "eval" / "step_0000010" / "shapes" / name).is_file(), name
    assert list((whole / "tb").glob("events.*"))
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {
        "best.pt", "last.pt", "step_0000007.pt", "step_0000008.pt", "step_0000010.pt"
    }  # fmt: skip
    content = load(whole)
    assert tuple(content) == KEYS and content["step"] == 10 and content["phase"] == 2
    assert all(name.split(".")[0] in ("backbone", "neck", "heads") for name in content["model"])
    assert "backbone.layer1.0.bn1.running_mean" in content["model"]
    assert not set(content["ema"]["tensors"]) & set(content["frozen"]["digests"])
    assert content["frozen"]["names"] == ["neck"]


def test_a_run_says_what_it_is_first_and_what_to_do_next_last(whole):
    text = re.sub(r"^[\d-]+ [\d:]+  ", "", (whole / "log.txt").read_text(), flags=re.MULTILINE)
    opening, closing = text.split("phase 0")[0], text.rsplit("unchanged to the bit")[-1]
    for line in (
        r"detbb [\d.]+, torch \S+, torchvision \S+, python [\d.]+; cpu \(\d+ cores\)",
        r"command: \S+",
        r"data.shapes.train: 24 images \(\d+ without objects\), \d+ objects, 3 classes",
        r"data.shapes.val: 6 images \(",
        r"24 images / batch 4 = 6 steps an epoch; 10 steps with sgd, lr 0.01, after 3 steps of warm-up, cosine",
        rf"output: {whole}; best.pt follows shapes/bbox/AP, evaluated every 5 steps",
    ):
        assert re.search(f"^{line}", opening, re.MULTILINE), line
    best = max(lines(whole, "val"), key=lambda record: record["shapes/bbox/AP"])
    assert f"; best: step {best['step']}, shapes/bbox/AP {best['shapes/bbox/AP']:.1f} (ema weights)" in closing
    assert re.search(r"^10 steps; this took 0:0\d:\d\d", closing, re.MULTILINE)
    commands = [shlex.split(line.split(":", 1)[1]) for line in closing.splitlines() if "python tools/" in line]
    assert [Path(words[1]).stem for words in commands] == ["eval", "predict", "train"]
    assert all(Path(word).exists() for words in commands for word in words if word.endswith((".pt", ".py", ".yaml")))


def test_the_freeze_journal_has_every_phase_with_its_digests(whole):
    phases = json.loads((whole / "freeze.json").read_text())["phases"]
    assert [(p["start"], p["end"], p["freeze"]) for p in phases] == [
        (0, 3, ["backbone", "neck"]), (3, 7, ["backbone.stem"]), (7, 10, ["neck"])
    ]  # fmt: skip
    assert [p["verified"] for p in phases] == [[2, 3], [4, 5, 6, 7], [8, 10]]  # 5: evaluated, and the best so far
    assert all(len(value) == 64 for p in phases for value in p["digests"].values())
    modules = {row["module"]: row for row in phases[0]["modules"]}
    assert modules["backbone.layer1"]["trained"] == 0 and modules["backbone.layer1"]["statistics"] == "fixed"
    assert modules["heads.shapes"]["ema"] == "yes" and modules["neck"]["ema"] == "no"
    assert modules["heads.shapes"]["lr"] == pytest.approx(0.01) and modules["neck"]["lr"] is None


def test_eval_of_best_gives_exactly_the_logged_numbers(whole, tmp_path):
    logged = max(lines(whole, "val"), key=lambda line: line["shapes/bbox/AP"])
    found = evaluate(whole / "checkpoints" / "best.pt", output_dir=tmp_path)
    assert found == {k: v for k, v in logged.items() if "/" in k}
    step = whole / "eval" / f"step_{logged['step']:07d}" / "shapes" / "results.json"
    assert (tmp_path / "shapes" / "results.json").read_bytes() == step.read_bytes()


def test_evaluation_on_or_off_learns_the_same_bits(tmp_path, images):
    for name, options in (("off", ["data.shapes.val=null"]), ("on", ["eval.every=2", "eval.weights=both"])):
        train(tiny_config(tmp_path, *options, name=name, data=images))
    assert learned(tmp_path / "on") == learned(tmp_path / "off")


@pytest.mark.parametrize(
    ("fold", "says"),
    [
        ("off", r"backbone\.layer1\.0\.bn2\.running_mean.*is in train mode"),
        ("auto", r"frozen but in train mode: backbone\.layer1\.0\.bn2;"),
    ],
)
def test_one_planted_bn_train_stops_the_run_and_names_the_norm(monkeypatch, tmp_path, images, fold, says):
    learn = training.train_step

    def planted(state, *args, **kwargs):
        if kwargs["step"] == 4:
            state.detector.backbone.layer1[0].bn2.train()
        return learn(state, *args, **kwargs)

    monkeypatch.setattr(training, "train_step", planted)
    with pytest.raises(FrozenTensorChanged, match=f"step 6: .*{says}"):
        train(tiny_config(tmp_path, "freeze=[backbone]", f"train.fold_frozen={fold}", data=images))
    assert load(tmp_path / "run")["step"] == 4


def test_a_run_folder_is_never_overwritten(whole, images):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="already holds a run; go on with --resume"):
        train(tiny_config(whole.parent, data=images))
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}


def test_resume_without_a_checkpoint_is_a_fresh_start(tmp_path, images):
    config = tiny_config(tmp_path, "train.steps=4", "data.shapes.val=null", data=images)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.0}\n')
    train(config, resume="auto")
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["freeze=[backbone.stem]", "backbone.allow_random=false"], "backbone.stem has random weights"),
        (["freeze=[neck]", "neck.allow_random=false"], "neck has random weights.*neck.allow_random: true"),
        (["backbone.norm=frozen_bn", "backbone.allow_random=false"], "frozen_bn"),
        (["freeze=[backbone, neck, heads.shapes]", "heads.shapes.allow_random=true"], "nothing would learn"),
        (["freeze=[backbone.layer9]"], "not a submodule; valid are backbone"),
        (["phases=[{steps: 20, freeze: [neck]}, {freeze: []}]"], "phases"),
        (["optimizer.lr_mult={bakcbone: 0.1}"], "bakcbone"),
        (["optimizer.type=adam"], r"optimizer.type: 'adam' is not known; valid are adamw, sgd, .*did you mean 'adamw'"),
        (["schedule.type=math:pi"], "schedule.type 'math:pi': 'pi' of 'math' is no function"),
        (["optimizer.lr_mult={heads.shapes.towre: 0.1}"], r"lr_mult: 'heads.shapes.towre' is not.*did you mean"),
        (["train.steps=null", "train.epochs=0.1"], "warmup_steps is 3, must be below the 1 steps of train.epochs 0.1"),
        (["device=cuda"], "no CUDA device"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(tmp_path, images, options, message):
    with pytest.raises(UserError, match=message):
        train(tiny_config(tmp_path, *options, data=images))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_source_that_cannot_be_read_is_refused_at_the_start(tmp_path, images):
    """Not when its first turn comes."""
    source = f"data.more={{format: shapes, train: {{images: {images}, size: 24}}, augment: [{{type: NoSuchThing}}]}}"
    head = "heads.more={type: fcos, data: more, levels: [p3, p4, p5], num_convs: 1}"
    with pytest.raises(UserError, match=r"data\.more.*NoSuchThing"):
        train(tiny_config(tmp_path, source, head, "data.more.weight=0.1", data=images))
    assert not (tmp_path / "run").exists()


def test_two_starts_at_once_are_one_run(tmp_path):
    config = tiny_config(tmp_path)
    folder, start = CheckpointFolder(tmp_path / "run" / "checkpoints", 2), ResumePoint()
    with FolderLock() as lock:
        claim_run_folder(config, start, folder, lock)
    with FolderLock() as lock, pytest.raises(UserError, match="already holds a run"):
        claim_run_folder(config, start, folder, lock)
    folder.folder.mkdir()
    folder.path(
        2
    ).touch()  # of a run that came and went while the other, a `--resume` that found nothing, read its data
    with FolderLock() as lock, pytest.raises(UserError, match="already holds a run"):
        claim_run_folder(config, ResumePoint(step=0), folder, lock)


def test_a_refused_resume_leaves_the_folder_as_it_was(tmp_path, images):
    train(tiny_config(tmp_path, *SHORT, "freeze=[neck]", "train.steps=4", data=images))
    run, early = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_0000002.pt"
    content = torch.load(early, weights_only=True)
    content["optimizer"]["state"]["backbone.conv1.weight"]["momentum_buffer"] = torch.zeros(3)
    torch.save(content, tmp_path / "state.pt")
    content = torch.load(early, weights_only=True)
    content["model"]["neck.output.p3.0.weight"] += 1
    torch.save(content, tmp_path / "altered.pt")
    cases = [
        (early, "optimizer.type=adamw", "'adamw', the checkpoint's is 'sgd'"),
        ("auto", "train.steps=3", "train.steps: 3, but the checkpoint is of step 4; valid is 4 or more"),
        (tmp_path / "state.pt", "seed=0", r"state of backbone.conv1.weight has shape \(3,\)"),
        (tmp_path / "altered.pt", "seed=0", "contradicts its own digests: neck.output.p3.0.weight"),
        (early, "optimizer.lr_mult={neck.innr: 2.0}", "did you mean 'neck.inner'"),
    ]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != LOCK_FILE}
    for resume, option, message in cases:
        with pytest.raises(UserError, match=message):
            train(
                tiny_config(tmp_path, *SHORT, "freeze=[neck]", "train.steps=4", option, data=images), resume=str(resume)
            )
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != LOCK_FILE}
    for damage in (b"", b"[]", b'{"phases": [{"phase": "0"}]}'):
        (run / "freeze.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"freeze\.json: not a freeze journal .* move it away"):
            train(tiny_config(tmp_path, *SHORT, "freeze=[neck]", data=images), resume="auto")
        assert (run / "freeze.json").read_bytes() == damage


def proofs(folder):
    text = " ".join((folder / "log.txt").read_text().split())
    return re.findall(r"unchanged to the bit since (the start|step \d+) \(SHA-256, freeze.json\): (\w+) \(all", text)


def test_what_was_frozen_late_is_not_called_unchanged(tmp_path, images):
    frozen = "freeze=[backbone, neck]"
    train(tiny_config(tmp_path, *SHORT, "train.steps=2", data=images))
    train(tiny_config(tmp_path, *SHORT, "train.steps=4", frozen, data=images), resume="auto")
    assert proofs(tmp_path / "run") == [("step 2", "backbone")]
    train(tiny_config(tmp_path, *SHORT, "train.steps=2", frozen, name="rested", data=images))
    train(tiny_config(tmp_path, *SHORT, "train.steps=4", frozen, name="rested", data=images), resume="auto")
    assert proofs(tmp_path / "rested") == [("the start", "backbone")] * 2


def test_without_the_earlier_journal_the_proof_starts_at_resume(tmp_path, images):
    options = (*SHORT, "phases=[{steps: 2, freeze: []}, {freeze: [backbone, neck]}]", "train.steps=4")
    train(tiny_config(tmp_path, *options, "checkpoint.every=1", data=images))
    assert proofs(tmp_path / "run") == [("step 2", "backbone")]
    third = tmp_path / "run" / "checkpoints" / "step_0000003.pt"
    train(tiny_config(tmp_path, *options, name="other", data=images), resume=str(third))
    assert proofs(tmp_path / "other") == [("step 3", "backbone")]
    assert (tmp_path / "other" / "checkpoints" / "step_0000003.pt").samefile(third)  # a kill would not start afresh
    (tmp_path / "run" / "freeze.json").unlink()
    train(tiny_config(tmp_path, *options, data=images), resume=str(third))
    assert proofs(tmp_path / "run")[1:] == [("step 3", "backbone")]


def test_a_resume_forgets_the_checks_of_steps_it_repeats(tmp_path):
    phase, path = Phase(0, 0, 4, ("backbone",)), tmp_path / "freeze.json"
    journal = FreezeJournal(path, resumed=False)
    journal.begin(phase, [], [], digests={"backbone.a": "1"}, step=0)
    journal.verified(2)
    journal.verified(4)
    FreezeJournal(path, resumed=True).begin(phase, [], [], digests={"backbone.a": "1"}, step=2)
    (entry,) = json.loads(path.read_text())["phases"]
    assert entry["verified"] == [2] and entry["since"] == {"backbone.a": 0}


def test_another_order_of_images_is_warned_about_at_a_resume(tmp_path, images):
    train(tiny_config(tmp_path, *SHORT, "train.steps=2", data=images))
    other = ("train.steps=3", "data.shapes.train.size=16", "train.batch_size=2")
    train(tiny_config(tmp_path, *SHORT, *other, data=images), resume="auto")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "another order from here on: data.shapes.train 24 before, 16 now; train.batch_size 4 before, 2 now" in text


def test_train_takes_a_file_and_a_dict(tmp_path, images):
    values = config_to_dict(tiny_config(tmp_path, *SHORT, "train.steps=1", data=images))
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    one = train(values | {"output_dir": str(tmp_path / "one")})
    assert learned(one.parents[1]) == learned(train(tmp_path / "mine.yaml").parents[1])


def test_a_key_that_an_old_checkpoint_lacks_is_no_change(whole):
    checkpoint = load(whole)
    config = stored_config(checkpoint)
    del checkpoint["config"]["data"]["shapes"]["allow_links"]
    assert start.check_resume(config, checkpoint, {}, steps=10**6) == []
    config.data["shapes"].allow_links = True
    (line,) = start.check_resume(config, checkpoint, {}, steps=10**6)
    assert "data.shapes.allow_links: False before, True now" in line


def test_a_misspelt_best_metric_is_refused_at_the_start(tmp_path, images):
    config = tiny_config(tmp_path, "eval.best=shapes/bbox/ap", data=images)
    with pytest.raises(UserError, match=r"eval.best: 'shapes/bbox/ap' .* did you mean 'shapes/bbox/AP'"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["decode", "evaluator"])
def test_a_head_that_cannot_be_evaluated_ends_at_the_start(monkeypatch, tmp_path, images, method):
    def broken(self, *_, **__):
        return self.no_such_thing

    monkeypatch.setattr(FcosHead, method, broken)
    with pytest.raises(AttributeError, match="no_such_thing") as error:
        train(tiny_config(tmp_path, data=images))
    assert "tried on one image before the first step" in str(getattr(error.value, "__notes__", ""))
    assert not (tmp_path / "run").exists()


def test_best_keeps_to_one_kind_of_weights_over_a_resume(monkeypatch, tmp_path, images):
    def measured(*_, output_dir, weights, **__):
        return {"shapes/bbox/AP": 99.0 if weights == "model" else float(output_dir.name.split("_")[1])}

    monkeypatch.setattr(run_evaluation, "evaluate_detector", measured)
    options = ("eval.weights=both", "eval.every=1", "checkpoint.every=8", "schedule.warmup_steps=0", "freeze=[neck]")
    train(tiny_config(tmp_path, *options, "train.steps=2", data=images))
    train(tiny_config(tmp_path, *options, "train.steps=3", data=images), resume="auto")
    assert load(tmp_path / "run", "best")["step"] == 3
    phases = json.loads((tmp_path / "run" / "freeze.json").read_text())["phases"]
    assert [p["verified"] for p in phases] == [[1, 2, 3]]


def test_a_mask_of_infinities_is_no_fault_and_has_no_average(monkeypatch, tmp_path, images):
    build = start.build_detector

    def with_mask(*args):
        detector = build(*args)
        detector.heads["shapes"].register_buffer("mask", torch.full((2,), float("-inf")))
        return detector

    monkeypatch.setattr(start, "build_detector", with_mask)
    train(tiny_config(tmp_path, *SHORT, "train.steps=2", data=images))
    content = load(tmp_path / "run")
    assert "heads.shapes.mask" in content["model"] and "heads.shapes.mask" not in content["ema"]["tensors"]
    assert "backbone.bn1.running_mean" in content["ema"]["tensors"]


def test_a_source_that_seldom_has_its_turn_is_waited_for():
    said = []
    state = make_state(small_config(), small_detector(small_config()), [])
    run = SimpleNamespace(state=state, log=SimpleNamespace(info=said.append), journal=SimpleNamespace(add_finding=len))
    name = "backbone.conv1.weight"
    run.no_gradient, run.source_steps = {name}, {"often": 39, "seldom": 9}
    training.check_gradients(run, "often")
    assert run.no_gradient == {name} and not said
    run.source_steps["often"] = 41
    training.check_gradients(run, "seldom")
    assert run.no_gradient == set()
    assert said == [f"WARNING: trained but without a gradient in the first 51 steps: {name}"]


def test_a_random_part_that_is_trained_later_is_a_warning(tmp_path, images):
    phases = "phases=[{steps: 1, freeze: [backbone]}, {freeze: []}]"
    config = tiny_config(
        tmp_path, phases, "backbone.allow_random=false", "train.steps=2", "schedule.warmup_steps=0", data=images
    )
    train(config)
    assert "backbone starts frozen with random weights" in (tmp_path / "run" / "log.txt").read_text()


def test_the_report_names_what_does_not_fit_together(tmp_path, images):
    train(
        tiny_config(
            tmp_path, "freeze=[backbone, backbone.layer1]", "train.steps=2", "schedule.warmup_steps=0", data=images
        )
    )
    found = json.loads((tmp_path / "run" / "freeze.json").read_text())["phases"][0]["findings"]
    assert found == ["freeze backbone.layer1: matches nothing new, the other names cover it"]


def test_a_trained_parameter_without_gradient_is_reported_once(monkeypatch, tmp_path, images):
    build = start.build_detector

    def with_dead_weight(*args):
        detector = build(*args)
        detector.heads["shapes"].dead = torch.nn.Parameter(torch.ones(2, 2))
        return detector

    monkeypatch.setattr(start, "build_detector", with_dead_weight)
    train(tiny_config(tmp_path, "train.steps=11", "data.shapes.val=null", data=images))
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("without a gradient in the first 10 steps: heads.shapes.dead") == 1


def test_a_non_finite_loss_stops_the_run_and_keeps_the_batch(monkeypatch, tmp_path, images):
    from detbb.heads.fcos import FcosHead

    honest = FcosHead.loss
    calls = []

    def poisoned(self, output, batch):
        calls.append(1)
        return {k: v * (float("nan") if len(calls) == 4 else 1.0) for k, v in honest(self, output, batch).items()}

    monkeypatch.setattr(FcosHead, "loss", poisoned)
    with pytest.raises(RuntimeError, match=r"step 3: a loss or gradient is not finite \(rank 0: losses .*image ids"):
        train(tiny_config(tmp_path, data=images))
    assert load(tmp_path / "run")["step"] == 2
    saved = torch.load(tmp_path / "run" / "nonfinite_step_0000003_rank_0.pt", weights_only=True)
    assert len(saved["batches"][0]["targets"]) == 4


def test_skipping_leaves_no_trace_and_has_a_limit(monkeypatch, tmp_path, images):
    from detbb.heads.fcos import FcosHead

    honest = FcosHead.loss
    monkeypatch.setattr(FcosHead, "loss", lambda *a: {k: v * float("inf") for k, v in honest(*a).items()})
    config = tiny_config(tmp_path, "train.on_nonfinite=skip", "train.max_skipped=3", "checkpoint.every=1", data=images)
    with pytest.raises(RuntimeError, match="step 3"):
        train(config)
    content = flat(load(tmp_path / "run")["model"])
    assert load(tmp_path / "run")["step"] == 3
    first = flat(load(tmp_path / "run", "step_0000001")["model"])
    assert content == first


def test_fp16_ends_a_run_whose_gradients_stay_non_finite(tmp_path):
    """An overflow halves the scale and is no fault; with a scale below 1 it is one."""
    state = make_state(small_config(), small_detector(small_config()), [])
    state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    next(p for p in state.detector.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))
    learn(state, 2, folder=tmp_path)
    with pytest.raises(NonFinite, match="step 2: a loss or gradient is not finite"):
        learn(state, 1, first=2, folder=tmp_path)


def test_a_loaded_detector_predicts_alone(whole):
    detector = load_detector(whole / "checkpoints" / "last.pt")
    assert not detector.training and detector.classes["shapes"].names
