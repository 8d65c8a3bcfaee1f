"""A kill at any moment loses nothing: the resumed run ends with the bits of the undisturbed one, and so do its logs."""

from __future__ import annotations

import itertools
import os
import signal
import time
from importlib import import_module

import pytest
from crash import MOMENTS, Job, differences, newest_step, train_to_end
from runs import learned, lines, load

pytestmark = pytest.mark.slow

OPTIONS = (
    "phases=[{steps: 3, freeze: [backbone, neck]}, {steps: 4, freeze: [backbone.stem]}, {freeze: [neck]}]",
    "train.accumulate=2",
    "train.grad_clip=1.0",
    "eval.every=5",
    "eval.batch_size=2",
    "log.images=1",
)
# (moment, how often the process comes to it before it is killed, workers); each start goes on from the one before.
# Checkpoints are saved at steps 2, 3, 4, 6, 7, 8 and 10; steps 5 and 10 are evaluated; phases begin at 0, 3 and 7.
ONE_PROCESS = [
    ("between reading and learning", 2, 2),
    ("while saving: the temporary file is half written", 1, 0),
    ("while saving: before its fsync", 1, 0),
    ("while saving: before it is verified", 1, 2),
    ("while saving: before it is renamed", 1, 0),
    ("while saving: before the fsync of the folder", 1, 0),
    ("while saving: before last.pt", 1, 0),
    ("while saving: the link is there, last.pt is not renamed", 1, 0),
    ("while evaluating", 3, 2),
    ("evaluated, before best.pt", 1, 0),
    ("evaluated, before it is logged", 1, 0),
    ("evaluated, TensorBoard has it and metrics.jsonl not", 1, 0),
    ("between backward and optimizer", 2, 0),
    ("between optimizer and average", 1, 2),
    ("between learning and logging", 2, 0),
    ("while saving: before the temporary file", 1, 0),
    ("while saving: before old ones are deleted", 1, 0),
    ("between saving and evaluating", 1, 0),
]
# … and which process is killed.
TWO_PROCESSES = [
    ("between backward and optimizer", 2, 1, 0),
    ("while saving: the temporary file is half written", 1, 0, 2),
    ("while evaluating", 1, 1, 0),
    ("while saving: before last.pt", 1, 0, 0),
]
SHORT = ("train.steps=4", "data.shapes.val=null")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """An undisturbed run over three phases, with accumulation, clipping, averages in warm-up and evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    train_to_end(folder, OPTIONS, data=images)
    return folder / "run"


def test_a_run_killed_at_every_moment_ends_with_the_same_bits(tmp_path, images, whole):
    assert {moment for moment, *_ in ONE_PROCESS} == set(MOMENTS)
    newest = 0
    for moment, number, workers in ONE_PROCESS:
        job = Job(tmp_path, (*OPTIONS, f"train.workers={workers}"), data=images, faults=[(moment, number)])
        assert job.wait() == [-signal.SIGKILL], moment
        assert newest_step(tmp_path / "run") >= newest, moment
        newest = newest_step(tmp_path / "run")
    assert newest == 10  # all that is left is to evaluate it
    train_to_end(tmp_path, OPTIONS, data=images)
    assert differences(tmp_path / "run", whole) == []


def test_on_two_processes_too_whichever_is_killed(tmp_path_factory, images):
    folders = [tmp_path_factory.mktemp(name) for name in ("killed", "undisturbed")]
    for moment, number, victim, workers in TWO_PROCESSES:
        options = (*OPTIONS, f"train.workers={workers}")
        job = Job(folders[0], options, data=images, processes=2, victim=victim, faults=[(moment, number)])
        assert job.wait()[victim] == -signal.SIGKILL, moment
    for folder in folders:
        train_to_end(folder, OPTIONS, data=images, processes=2)
    assert differences(folders[0] / "run", folders[1] / "run") == []


def test_a_full_disk_is_named_and_costs_nothing_that_was_there(tmp_path, images, whole):
    job = Job(tmp_path, OPTIONS, data=images, faults=[("between reading and learning", 5)])
    assert job.wait() == [-signal.SIGKILL]
    before = {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}
    room = len(before["last.pt"]) // 2
    assert Job(tmp_path, OPTIONS, data=images, faults=[room]).wait() == [2]
    error = (tmp_path / "out.txt").read_text().splitlines()[-1]
    assert error.startswith("error: disk full: cannot write") and "run/checkpoints/step_0000005.pt" in error
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()} == before
    train_to_end(tmp_path, OPTIONS, data=images)
    assert differences(tmp_path / "run", whole) == []


def test_a_log_that_cannot_be_written_is_named_too(tmp_path, images):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    assert Job(tmp_path, SHORT, data=images).wait() == [2]
    assert "error: disk full: cannot write" in (error := (tmp_path / "out.txt").read_text()) and "run/log.txt" in error


def test_how_often_is_saved_does_not_change_what_is_learned(tmp_path_factory, images):
    runs = []
    for every in ("1", "4"):
        folder = tmp_path_factory.mktemp(f"every_{every}")
        train_to_end(folder, (*SHORT, f"checkpoint.every={every}"), data=images)
        runs.append(folder / "run")
    assert learned(runs[0]) == learned(runs[1]) and lines(runs[0], "train") == lines(runs[1], "train")


def overflow() -> None:
    """A weight becomes infinite in step 3, although loss and gradients were finite."""
    step = import_module("detbb.training.step")
    update, calls = step._update, itertools.count(1)

    def overflown(state, *args):
        update(state, *args)
        if next(calls) == 3:
            state.detector.backbone.conv1.weight.data[0] = float("inf")

    step._update = overflown


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, images):
    assert Job(tmp_path, (*SHORT, "checkpoint.every=1"), data=images, faults=[overflow]).wait() == [1]
    text = (tmp_path / "out.txt").read_text()
    assert (
        "step 3: NaN or infinite values in backbone.conv1.weight" in text and "newest checkpoint is of step 2" in text
    )
    assert "Traceback" not in text and newest_step(tmp_path / "run") == 2


def stop_the_group() -> None:
    """A scheduler that ends a job sends SIGTERM to all of its processes, DataLoader workers included."""
    training = import_module("detbb.training.loop")
    learn, calls = training.train_step, itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == 3:
            os.killpg(0, signal.SIGTERM)
            time.sleep(1)  # for workers that end on it to be missed
        return learn(*args, **kwargs)

    training.train_step = interrupted


def workers_that_heed_signals() -> None:
    import_module("detbb.data.loader").start_worker = lambda _: signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_signal_to_the_whole_group_leaves_a_checkpoint(tmp_path, images):
    options = (*SHORT, "train.workers=2", "checkpoint.every=100")
    assert Job(tmp_path, options, data=images, faults=[stop_the_group]).wait() == [128 + signal.SIGTERM]
    assert load(tmp_path / "run")["step"] == 3


def test_without_the_signal_mask_of_the_workers_it_does_not(tmp_path, images):
    options = (*SHORT, "train.workers=2", "checkpoint.every=100")
    codes = Job(tmp_path, options, data=images, faults=[workers_that_heed_signals, stop_the_group]).wait()
    assert codes != [128 + signal.SIGTERM] and newest_step(tmp_path / "run") == 0


def augmentation_from_a_stream() -> None:
    numbers = itertools.count(1)
    import_module("detbb.data.loader").SampleReader.stream = lambda *_: next(numbers)


def order_from_a_stream() -> None:
    sampler = import_module("detbb.data.sampler")
    make = sampler.SampleOrder.batch
    turns = itertools.count()
    sampler.SampleOrder.batch = lambda self, _: make(self, next(turns))


def updates_are_not_counted_on() -> None:
    average = import_module("detbb.training.ema").Ema
    load_state = average.load_state_dict
    average.load_state_dict = lambda self, state: load_state(self, {**state, "updates": 0})


def optimizer_starts_afresh() -> None:
    import_module("detbb.training.optim").load_state_by_name = lambda *_: None


@pytest.mark.parametrize(
    "mutant",
    [None, augmentation_from_a_stream, order_from_a_stream, updates_are_not_counted_on, optimizer_starts_afresh],
)
def test_state_that_is_not_brought_back_would_be_seen(tmp_path_factory, images, mutant):
    faults = [] if mutant is None else [mutant]
    folders = [tmp_path_factory.mktemp(name) for name in ("killed", "undisturbed")]
    Job(folders[0], SHORT, data=images, faults=[*faults, ("between reading and learning", 3)]).wait()
    for folder in folders:
        train_to_end(folder, SHORT, data=images, faults=faults)
    runs = [folder / "run" for folder in folders]
    same = lines(runs[0], "train") == lines(runs[1], "train") and differences(*runs) == []
    assert same == (mutant is None)
