"""Training, top to bottom.

    python tools/train.py --config configs/shapes_fcos.yaml [--resume] [key=value ...]
    torchrun --nproc-per-node=4 tools/train.py --config configs/shapes_fcos.yaml [--resume] [key=value ...]

What a run starts from, in this order; the first that has a tensor gives it (detbb/training/start.py):

    1. --resume: all of a checkpoint of this run, and the run goes on at its step
    2. init_from: the weights that another run's checkpoint is evaluated with
    3. backbone.weights: a file, or torchvision's ImageNet weights
    4. random weights from the seed
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from detbb.config.phases import Phase, phase_at
from detbb.config.schema import Config
from detbb.core.folder_lock import FolderLock
from detbb.data.loader import train_loader
from detbb.data.sampler import hash_seed
from detbb.data.workers import worker_failures
from detbb.distributed.collectives import rank, world_size
from detbb.distributed.processes import processes
from detbb.feature_cache import setup as cache_setup
from detbb.feature_cache.cache import FeatureCache
from detbb.feature_cache.frozen_prefix import FrozenPrefix, compiled, last_frozen
from detbb.freeze import digests, trained_names
from detbb.heads.loading import load_config
from detbb.report import freeze_report as report
from detbb.report import overview
from detbb.report.tables import summary_table
from detbb.structures.batch import Batch
from detbb.training.evaluation import evaluate_run
from detbb.training.optim import find_schedule
from detbb.training.signals import StopSignals
from detbb.training.start import needs_by_source, start_run
from detbb.training.state import Run, save_checkpoint, saved_while_waiting
from detbb.training.step import StepResult, read_losses, train_step


def train(config: Config | str | Path | dict[str, Any], *, resume: str | None = None) -> Path:
    """Train as `config` says and return the path of the last checkpoint; every rank calls it.

        last = detbb.train("mine.yaml", resume="auto")

    resume: None for a fresh run, `auto` for the newest valid checkpoint of the run folder, or a file or run folder.
    Raises: UserError: config, data or checkpoint cannot work; Stopped: a signal came, and a checkpoint is safe.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    with processes(config) as device, StopSignals() as stop, FolderLock() as lock, worker_failures():
        run = start_run(config, resume, device, stop, lock)
        stop.started = True
        with closing(run.log), saved_while_waiting(run):
            if run.saved == run.step and run.due(config.eval.every) and run.missing_evaluations():
                start_phase(run, phase_at(run.phases, run.step - 1))  # the interruption came before evaluating
                evaluate_run(run)
            for phase in run.phases:
                if run.step < phase.end:
                    start_phase(run, phase)
                    train_phase(run, phase)
            finish(run)
        return run.checkpoints.folder / "last.pt"


def train_phase(run: Run, phase: Phase) -> None:
    """Train from the run's step to the phase's end."""
    config = run.config
    with closing(step_batches(run, phase)) as steps:  # ends the workers, however this is left
        for batches, data_s in steps:
            began = time.perf_counter() - data_s
            torch.manual_seed(hash_seed(config.seed, run.step, rank()))  # for dropout, whatever was drawn before
            lr = run.lr(run.step)
            result = train_step(run.state, batches, lr=lr, stop=run.stop, folder=run.folder, step=run.step)
            run.step += 1
            check_gradients(run, batches[0].source)
            log_step(run, result, lr=lr, step_s=time.perf_counter() - began, data_s=data_s)
            if run.step == phase.end or run.due(config.checkpoint.every) or result.stop:
                save_checkpoint(run)
            if result.stop:
                raise run.stopped(result.stop)
            if run.due(config.eval.every):
                evaluate_run(run)


def start_phase(run: Run, phase: Phase) -> None:
    """Make the phase's freezing true everywhere: gradients, optimizer, average, DDP, frozen prefix, digests, report."""
    state, config, detector = run.state, run.config, run.state.detector
    state.freeze(phase.freeze, config.optimizer)
    if config.train.compile:
        torch._dynamo.reset()  # else what was compiled in earlier phases counts towards its limit
    prefix = FrozenPrefix(detector, config.train, log=run.log.info) if last_frozen(detector) else None
    steps = phase.end - run.step
    state.prefix, lines = cache_setup.with_cache(prefix, config, detector, data=run.train_data, steps=steps)
    run.log.info(*lines)
    detector.compiled = None
    if config.train.compile:
        detector.compiled = compiled(detector.forward_from, "what is trained", run.log.info)
    run.digests = digests(detector)
    run.no_gradient = set(trained_names(detector))
    run.source_steps = dict.fromkeys(phase.sources, 0)
    averaged = list(state.ema.tensors) if state.ema is not None else []
    schedule = find_schedule(config.schedule.type)  # without warm-up: the rate that a person asked for
    lr = config.optimizer.lr * schedule(phase.start, config.schedule, run.steps)
    rows = report.rows(detector, state.optimizer, lr=lr, averaged=averaged)
    notes = report.findings(detector, phase)
    run.log.info(report.PhaseTable(phase, rows), *(f"WARNING: {note}" for note in notes))
    if run.step == phase.start:  # not again where a phase is resumed
        run.log.text("freeze", report.markdown(phase, rows, notes), run.step)
    if rank() == 0:
        run.journal.begin(phase, rows, notes, digests=run.digests, step=run.step)


def step_batches(run: Run, phase: Phase) -> Generator[tuple[list[Batch], float]]:
    """This rank's share of each step as `accumulate` batches, and the seconds spent waiting for them."""
    loader = train_loader(
        {source: run.train_data[source] for source in phase.sources},
        run.config,
        needs=needs_by_source(run.config, run.state.detector.active_heads()),
        stores=run.state.prefix.stores if isinstance(run.state.prefix, FeatureCache) else None,
        start_step=run.step,
        end_step=phase.end,
        phases=[(p.start, p.sources) for p in run.phases],
        rank=rank(),
        world_size=world_size(),
    )
    with closing(iter(loader)) as iterator:
        for _ in range(run.step, phase.end):
            began = time.perf_counter()
            batches = [next(iterator) for _ in range(run.config.train.accumulate)]
            yield batches, time.perf_counter() - began


def check_gradients(run: Run, source: str) -> None:
    """Say once which trained parameters had no gradient in the first steps, when each source had ten."""
    run.source_steps[source] += 1
    if run.no_gradient:
        parameters = run.state.detector.named_parameters()
        run.no_gradient = {n for n, p in parameters if n in run.no_gradient and p.grad is None}
    if run.no_gradient and min(run.source_steps.values()) >= 10:
        names = ", ".join(sorted(run.no_gradient))
        note = f"trained but without a gradient in the first {sum(run.source_steps.values())} steps: {names}"
        run.log.info(f"WARNING: {note}")
        if rank() == 0:
            run.journal.add_finding(note)
        run.no_gradient = set()


def log_step(run: Run, result: StepResult, *, lr: float, step_s: float, data_s: float) -> None:
    """Log what is due. Losses leave the device only then."""
    images = result.images * world_size()
    for path in sorted(set(result.bad_images) - run.bad_images):
        run.bad_images.add(path)
        run.log.info(f"WARNING: left out an image that cannot be read ({len(run.bad_images)} so far): {path}")
    if isinstance(run.state.prefix, FeatureCache):
        run.log.info(*run.state.prefix.new_messages())
    if result.skipped:
        run.log.info(f"WARNING: step {run.step} was skipped: a loss or gradient was not finite")
    if run.due(run.config.log.every):
        run.losses = read_losses(result)
        times = {"data_s": data_s, "step_s": step_s, "images_per_s": images / step_s}
        run.log.train(run.step, {**run.losses, "lr": lr, **times})
    run.log.progress(run.step, run.steps, losses=run.losses, images=images, step_s=step_s, data_s=data_s)


def finish(run: Run) -> None:
    """The table at the end, what the run left untouched, what to do next, and where everything is."""
    run.log.info(*summary_table(run.metrics, title=f"step {run.step}"))
    if rank() == 0:
        run.log.info(*run.journal.unchanged(run.state.detector))
        run.log.info(*overview.closing(run.config, run.steps, run.log.elapsed, best=run.best_metric()))
    checkpoints, evaluated = ("checkpoints/last.pt", "checkpoints/best.pt"), f"eval/step_{run.step:07d}"
    paths = [run.folder / name for name in (*checkpoints, evaluated, "freeze.json", "metrics.jsonl", "tb")]
    run.log.info(*(str(path) for path in paths if path.exists()))
