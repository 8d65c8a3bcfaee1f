"""N processes learn what one does, and what they decide they decide together. Several processes on gloo."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from learning import make_state
from processes import run_ranks
from runs import load, shrink

from detbb.config.schema import Config
from detbb.core.errors import ProcessLost, Stopped, UserError
from detbb.core.folder_lock import FolderLock
from detbb.data.formats import read_split
from detbb.data.loader import train_loader
from detbb.detector import build_detector
from detbb.distributed.collectives import all_gather_objects, raise_on_all_ranks, rank, world_size
from detbb.distributed.lost_process import Members, is_lost_process
from detbb.distributed.processes import processes
from detbb.freeze import digest
from detbb.heads.fcos import FcosConfig, FcosHead
from detbb.heads.loading import load_config
from detbb.training import optim, start
from detbb.training import step as step_module
from detbb.training.loop import train
from detbb.training.signals import StopSignals
from detbb.training.step import TrainState, read_losses, train_step

pytestmark = pytest.mark.slow

training = importlib.import_module("detbb.training.loop")  # the package's attribute of this name is the function

HEADS = {
    "fcos": "{type: fcos, data: shapes, levels: [p3, p4], num_convs: 1}",
    "rcnn": "{type: faster_rcnn, data: shapes, levels: [p2, p3, p4], roi_levels: [p2, p3, p4], box_channels: 32,"
    " anchor_sizes: [[12.0], [24.0], [48.0]], rpn_samples: 32, rpn_pre_nms_train: 60, rpn_post_nms_train: 30,"
    " box_samples: 24, box_resolution: 4}",
}
CASES = [f"{head}-{norm}" for head in HEADS for norm in ("frozen_bn", "sync_bn", "gn")]
STEPS = 20
RESUMED = ["fcos-sync_bn", "rcnn-gn"]  # in these, a whole run goes on with two processes where one stopped
SHORT = ("train.steps=4", "checkpoint.every=2")


def write_case(folder: Path, case: str) -> None:
    """Four images of 64 pixels a step, in fp64."""
    head, _, norm = case.partition("-")
    (folder / f"{case}.yaml").write_text(
        f"""
device: cpu
output_dir: {folder / case}
backbone: {{arch: resnet18, norm: {norm}, allow_random: true}}
neck: {{channels: 32, allow_random: true}}
data:
  shapes:
    format: shapes
    train: {{images: {folder / "shapes"}, size: 24}}
    val: null
    image_size: [48, 64]
heads:
  objects: {HEADS[head]}
train: {{steps: {STEPS}, batch_size: 4, workers: 0, precision: fp64, grad_clip: 5.0}}
optimizer: {{lr: 0.005}}
ema: null
log: {{every: 1, images: 0}}
"""
    )


def case_config(folder: Path, case: str, *overrides: str) -> Config:
    return load_config(folder / f"{case}.yaml", list(overrides))


def learn_case(folder: Path, case: str, precision: str, steps: int) -> tuple[list[Any], list[dict[str, float]], Any]:
    """Of each step, this rank's images and the losses; the gradients of the last step and the weights after it."""
    config = case_config(folder, case, f"train.precision={precision}")
    data = {"shapes": read_split(config.data["shapes"], "train", "shapes")}
    torch.manual_seed(config.seed)
    state = make_state(config, build_detector(config, {"objects": data["shapes"].classes}), [])
    needs = {"shapes": frozenset[str]()}
    share = {"rank": rank(), "world_size": world_size()}
    images, losses = [], []
    for step, batch in enumerate(train_loader(data, config, needs=needs, start_step=0, end_step=steps, **share)):
        pairs = zip(batch.targets, batch.images, strict=True)
        images.append([(t.image_id, digest(image), digest(t.boxes), t.seed) for t, image in pairs])
        losses.append(read_losses(train_step(state, [batch], lr=0.005, stop=lambda: 0, folder=folder, step=step)))
    gradients = {n: p.grad for n, p in state.detector.named_parameters() if p.grad is not None}
    return images, losses, {"gradients": gradients, "weights": state.detector.state_dict()}


def alone(folder: Path, case: str) -> tuple[list[Any], list[dict[str, float]], list[dict[str, float]]]:
    torch.set_num_threads(1)
    images, losses, state = learn_case(folder, case, "fp64", STEPS)
    _, first_losses, first = learn_case(folder, case, "fp32", 1)
    torch.save({"weights": state["weights"], "gradients": first["gradients"]}, folder / f"{case}.pt")
    if case in RESUMED:
        train(case_config(folder, case, *SHORT))
    return images, losses, first_losses


def together(folder: Path) -> dict[str, Any]:
    shrink()
    found: dict[str, Any] = {}
    for case in CASES:
        images, losses, state = learn_case(folder, case, "fp64", STEPS)
        _, first_losses, first = learn_case(folder, case, "fp32", 1)
        theirs = torch.load(folder / f"{case}.pt")
        distances = distance(theirs["gradients"], first["gradients"]), distance(theirs["weights"], state["weights"])
        found[case] = images, losses, first_losses, distances
    for case in RESUMED:
        config = case_config(folder, case, *SHORT, f"output_dir={folder / case}-resumed")
        train(config, resume=str(folder / case / "checkpoints" / "step_0000002.pt"))
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest ‖a - b‖ / ‖a‖ over floating-point tensors."""
    assert set(a) == set(b)
    kept = [n for n in a if a[n].is_floating_point() and a[n].norm() > 0]
    assert len(kept) > 30
    return max(float((a[n] - b[n]).norm() / a[n].norm()) for n in kept)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """A folder, what one process did in each case, and what each of two did."""
    folder = tmp_path_factory.mktemp("both")
    for case in CASES:
        write_case(folder, case)
    read_split(case_config(folder, CASES[0]).data["shapes"], "train", "shapes")  # generates the images
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detbb.training.loop"])
    with ProcessPoolExecutor(2, mp_context=context, initializer=shrink) as pool:
        found = dict(zip(CASES, pool.map(alone, [folder] * len(CASES), CASES), strict=True))
    return folder, found, run_ranks(together, 2, folder, timeout_s=900)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(both: Any, case: str) -> None:
    _, one, two = both
    images, losses, first_losses = one[case]
    (first, found, found_first, (gradients, weights)), (second, *_) = (ranks[case] for ranks in two)
    assert [a + b for a, b in zip(first, second, strict=True)] == images and len(images) == STEPS
    for expected, shown, tolerance in ((losses, found, 1e-8), (first_losses, found_first, 1e-5)):
        assert shown == [{name: pytest.approx(v, rel=tolerance) for name, v in step.items()} for step in expected]
    assert losses[0]["loss"] > losses[-1]["loss"] + 0.1  # something is learned
    assert gradients <= 1e-5 and weights <= 1e-8
    print(f"{case}: fp64 weights after {STEPS} steps {weights:.1e}, fp32 gradients of the first {gradients:.1e}")


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(both: Any, case: str) -> None:
    folder, _, _ = both
    weights = distance(load(folder / case)["model"], load(f"{folder / case}-resumed")["model"])
    assert weights <= 1e-8
    print(f"{case}: from one process to two at step 2, fp64 weights after 4 {weights:.1e}")


# ---- several branches, phases, and ranks that have nothing for a branch ----


class CarelessHead(FcosHead):
    """Breaks the contract: without boxes its losses depend on no parameter."""

    Config = FcosConfig

    def loss(self, output: Any, batch: Any) -> dict[str, Any]:
        losses = super().loss(output, batch)
        return losses if any(len(t.boxes) for t in batch.targets) else {n: torch.zeros(()) for n in losses}


BRANCHES = """
device: cpu
output_dir: {out}
backbone: {{arch: resnet18, norm: bn, allow_random: true}}
neck: {{channels: 32, allow_random: true}}
data:
  shapes: {{format: shapes, train: {{images: {images}, size: 24}}, val: null, image_size: [48, 64]}}
  others: {{format: shapes, train: {{images: {images}, size: 24}}, val: null, image_size: [64, 64]}}
heads:
  objects: {fcos}
  twostage: {rcnn}
  careless: {{type: "test_distributed:CarelessHead", data: shapes, levels: [p3, p4], num_convs: 1, norm: null}}
  present: {{type: classify, data: others, levels: [p5], multi_label: true}}
phases:
  - {{steps: 6, freeze: [backbone]}}
  - {{freeze: [backbone.stem]}}
train: {{steps: 10, batch_size: 4, workers: 0}}
optimizer: {{lr: 0.01, weight_decay: 0.1, norm_weight_decay: 0.1}}
ema: {{decay: 0.9, warmup_steps: 0}}
log: {{every: 1, images: 0}}
"""


def everything(state: TrainState) -> dict[str, str]:
    tensors = dict(state.detector.state_dict())
    tensors |= {f"momentum {n}": s["momentum_buffer"] for n, s in optim.state_by_name(state.optimizer).items()}
    assert state.ema is not None
    return {n: digest(t) for n, t in (tensors | {f"ema {n}": t for n, t in state.ema.tensors.items()}).items()}


def branches(file: str, out: str, mutant: bool) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """Of each step on this rank: its source, and the digest of every tensor before and after it."""
    seen = []
    with_all = step_module._with_all

    def step(state: TrainState, batches: list[Any], **arguments: Any) -> Any:
        if arguments["step"] in (0, 2, 8) and rank() == 1:
            for target in batches[0].targets:
                target.boxes, target.labels = target.boxes[:0], target.labels[:0]
        before = everything(state)
        outcome = train_step(state, batches, **arguments)
        seen.append((batches[0].source, before, everything(state)))
        return outcome

    def uses_all(total: torch.Tensor, trained: list[Any]) -> Any:
        return with_all(total, trained)[0], [True] * len(trained)

    training.train_step = step
    if mutant:
        step_module._with_all = uses_all
    try:
        train(load_config(file, [f"output_dir={out}", *(["train.steps=7"] if mutant else [])]))
    finally:
        training.train_step, step_module._with_all = train_step, with_all
    return seen


def all_branches(file: str, out: str) -> Any:
    shrink()
    return branches(file, out, False), branches(file, f"{out}-mutant", True)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("branches")
    values = {"images": folder / "shapes", "out": folder / "run"} | HEADS
    (folder / "branches.yaml").write_text(BRANCHES.format(**values))
    return folder / "run", run_ranks(all_branches, 2, str(folder / "branches.yaml"), str(folder / "run"))


def moved_in(step: tuple[str, dict[str, str], dict[str, str]]) -> set[str]:
    return {name for name in step[1] if step[1][name] != step[2][name]}


def test_ranks_hold_the_same_bits_after_every_step(steps: Any) -> None:
    """Through a phase switch, with a rank that has no boxes, with plain BN whose statistics differ by rank."""
    run, ((first, _), (second, _)) = steps
    assert len(first) == 10
    for one, two in zip(first, second, strict=True):
        assert one == two
    assert "largest difference was" in (run / "log.txt").read_text()


def test_what_unfreezes_moves_and_what_is_frozen_does_not(steps: Any) -> None:
    _, ((seen, _), _) = steps
    for number, step in enumerate(seen):
        moved = {n for n in moved_in(step) if n.startswith("backbone")}
        assert any(n.startswith("backbone.layer2") for n in moved) is (number >= 6)
        assert not any(n.startswith(("backbone.conv1", "backbone.bn1")) for n in moved)


def heads_in(names: set[str]) -> set[str]:
    """The heads whose weights or momentum are among these tensors (averages always follow the weights)."""
    return {n.split("heads.")[1].split(".")[0] for n in names if "heads." in n and not n.startswith("ema")}


def test_absent_branches_are_not_moved_by_momentum_or_decay(steps: Any) -> None:
    _, ((seen, mutant), _) = steps
    turns = {"shapes": {"objects", "twostage", "careless"}, "others": {"present"}}
    assert [step[0] for step in seen] == ["shapes", "others"] * 5
    assert all(heads_in(moved_in(step)) == turns[step[0]] for step in seen)
    assert any(heads_in(moved_in(step)) != turns[step[0]] for step in mutant)


# ---- decisions and failures ----


def decide() -> dict[str, str]:
    found = {}
    for culprit in (0, 1):
        for first in (False, True):
            try:
                with raise_on_all_ranks(rank0_first=first):
                    if rank() == culprit:
                        raise UserError(f"rank {culprit} has no data")
            except UserError as error:
                found[f"{culprit} {first}"] = f"{error} {error.same_on_all_ranks}"
    with raise_on_all_ranks(rank0_first=True):
        began = time.monotonic()
        time.sleep(0.2 * (rank() == 0))
    first, second = all_gather_objects(began)
    found["good"] = str(second - first >= 0.2)
    for step in (world_size(), rank()):  # the same everywhere, and not
        start._find_start = lambda *_, step=step: start.ResumePoint(step=step)
        try:
            start.find_start(Config(), None, FolderLock())
        except UserError as error:
            found[f"start {step}"] = str(error)
    return found


def test_a_users_error_on_one_rank_is_every_ranks() -> None:
    first, second = run_ranks(decide, 2)
    expected = {f"{c} {f}": f"rank {c} has no data True" for c in (0, 1) for f in (False, True)} | {"good": "True"}
    assert {k: v for k, v in first.items() if "start" not in k} == expected
    assert {k: v for k, v in second.items() if "start" not in k} == expected
    assert "start 2" not in first and "steps [0, 1]" in first["start 0"] and "all of them share" in second["start 1"]


def in_threads(function: Any, numbers: tuple[int, ...]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: function(n)})) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_silent_process_is_named_also_after_a_restart() -> None:
    """torchrun's store still holds what the processes of the start before had written into it."""
    store = dist.HashStore()
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31130")

    def start(number: int, late: int) -> Members:
        time.sleep(0.3 * (number == late))
        return Members(store, number, 4, timeout_s=7)

    for lost, late in ((2, 0), (0, 3), (3, 1)):
        members = in_threads(lambda n, late=late: start(n, late), (0, 1, 2, 3))
        for number, one in members.items():
            one.store.set(f"said by {number}", str(late))
        assert all(one.store.get(f"said by {n}") == str(late).encode() for one in members.values() for n in members)
        waiting = tuple(n for n in members if n != lost)
        found = in_threads(lambda n, members=members: time.sleep(n * 0.2) or members[n].explain(broken), waiting)
        assert len(found) == 3 and all(isinstance(error, ProcessLost) for error in found.values())
        assert all(str(error).startswith(f"rank {lost} (pid {os.getpid()} on ") for error in found.values())


def left_alone() -> list[tuple[str, bool]]:
    """What a rank gets whose peer takes part in nothing, and what it gets wrong by itself."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), process_group=group)
    tries: list[Any] = []
    if rank() == 0:
        tries = [lambda: net(torch.ones(1, 2)).sum().backward(), lambda: dist.all_reduce(torch.ones(1), group=group)]
    tries += [
        lambda text=text: (_ for _ in ()).throw(RuntimeError(text))
        for text in ("DataLoader timed out", "no file gloo/x")
    ]
    tries += [lambda: torch.ones(2) @ torch.ones(3), lambda: torch.load("timed out", weights_only=True)]
    found = []
    for one in tries:
        try:
            one()
        except Exception as error:
            found.append((str(error), is_lost_process(error)))
    dist.barrier()
    return found


def test_only_a_failed_collective_is_blamed_on_another_process() -> None:
    first, second = run_ranks(left_alone, 2)
    assert [lost for _, lost in first] == [True, True, False, False, False, False], first
    assert [lost for _, lost in second] == [False] * 4, second


def test_what_cannot_be_started_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"MASTER_ADDR .*; start several processes with torchrun"), processes(Config()):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc-per-node: 4 processes, but 2 GPUs"), processes(Config()):
        pass


def test_who_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detbb.distributed.lost_process.RENDEZVOUS_S", 0.3)
    store = dist.HashStore()
    with pytest.raises(ProcessLost, match="rank 1, 2 did not start within"):
        Members(store, 0, 3, timeout_s=0.1)
    with pytest.raises(ProcessLost, match="another rank did not start"):
        Members(store, 1, 3, timeout_s=0.1)


def test_a_second_signal_ends_it_unless_torchrun_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for under_torchrun in (True, False):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        if not under_torchrun:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        with StopSignals() as stop:
            stop.started = True
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert stop() == signal.SIGTERM
        assert ended == ([] if under_torchrun else [143])


def test_a_signal_before_the_first_step_ends_the_run_at_once() -> None:
    with StopSignals() as stop, pytest.raises(Stopped, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    assert stop() == signal.SIGTERM and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
