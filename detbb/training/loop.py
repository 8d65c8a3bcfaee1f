"""Training, top to bottom: phase -> freeze -> wrap -> for each batch: learn -> log, save, evaluate."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detbb.checkpoint.folder import CheckpointFolder
from detbb.config.phases import Phase, phase_at, plan_phases
from detbb.config.schema import Config
from detbb.core.errors import Stopped, UserError
from detbb.core.folder_lock import FolderLock
from detbb.data.loader import train_loader
from detbb.data.sampler import hash_seed
from detbb.distributed.collectives import from_rank0, raise_on_all_ranks, rank, world_size
from detbb.distributed.processes import processes, wrap
from detbb.feature_cache import setup as cache_setup
from detbb.feature_cache.cache import FeatureCache
from detbb.feature_cache.frozen_prefix import FrozenPrefix, compiled, last_frozen
from detbb.freeze import digests
from detbb.report import freeze_report as report
from detbb.report.log import RunLog
from detbb.report.tables import summary_table
from detbb.report.writers import find_writers, read_evaluations
from detbb.structures.batch import Batch
from detbb.training import optim, resuming, setup
from detbb.training.ema import Ema
from detbb.training.run import (
    Run,
    after_step,
    best_metric,
    check_gradients,
    due,
    evaluate_now,
    evaluated_weights,
    missing_evaluations,
    save,
)
from detbb.training.signals import StopSignals
from detbb.training.step import TrainState, train_step


def train(config: Config, *, resume: str | None = None) -> Path:
    """Train as `config` says and return the path of the last checkpoint; every rank calls it.

        last = detbb.train(detbb.load_config("mine.yaml"), resume="auto")

    resume: None for a fresh run, `auto` for the newest valid checkpoint of the run folder, or a checkpoint file.
    Raises: UserError: config, data or checkpoint cannot work; Stopped: a signal came, and a checkpoint is safe.
    """
    with processes(config) as device, StopSignals() as stop, FolderLock() as lock:
        run = prepare(config, resume, device, stop, lock)
        try:
            if run.saved == run.step and due(run, config.eval.every) and missing_evaluations(run):
                start_phase(run, phase_at(run.phases, run.step - 1))  # the interruption came before evaluating
                evaluate_now(run)
            while run.step < run.steps:
                train_phase(run, phase_at(run.phases, run.step))
            finish(run)
        finally:
            run.log.close()
        return run.checkpoints.folder / "last.pt"


def prepare(config: Config, resume: str | None, device: torch.device, stop: StopSignals, lock: FolderLock) -> Run:
    """Read the data, build the detector, refuse what cannot work, and only then open the run folder."""
    find_writers(config.log.to)  # a misspelt name is an error now
    start = resuming.open_run_folder(config, resume, lock)
    checkpoint = start.checkpoint
    train_data, val_data = setup.read_sources(config)
    detector, lines, random = setup.start_detector(config, start, train_data)
    phases = plan_phases(config, setup.total_steps(config, train_data))
    for index, phase in enumerate(phases):  # a misspelt name in a late phase is an error now, not then
        learning = detector.active_heads(frozen=phase.freeze)
        phases[index] = replace(phase, sources=tuple(dict.fromkeys(detector.sources[name] for name in learning)))
        if not learning:
            names = ", ".join(phase.freeze)
            raise UserError(f"freeze: phase {phase.index} freezes everything ({names}); nothing would learn")
    optim.lr_by_name(detector, config.optimizer.lr_mult)  # refuses unknown names
    lines += setup.repairs(train_data, val_data)
    cache_setup.check(config, detector, phases, train_data)
    lines += setup.refuse_random(config, phases, detector, random)
    setup.check_data(detector, config, [train_data, val_data])
    if checkpoint is not None:
        lines += resuming.check(config, checkpoint, detector, train_data, steps=phases[-1].end)
    folder = Path(config.output_dir)
    with raise_on_all_ranks():
        journal = report.FreezeJournal(folder / "freeze.json", resumed=checkpoint is not None)
    checkpoint_folder = CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
    with raise_on_all_ranks():
        if rank() == 0:
            start.notes += resuming.claim_run_folder(config, start, checkpoint_folder, lock)
    detector.to(device)
    ema = None
    if config.ema is not None:
        ema = Ema(detector, decay=config.ema.decay, warmup_steps=config.ema.warmup_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    run = Run(
        config,
        folder,
        phases,
        train_data,
        val_data,
        TrainState(detector, ema, config.train, device, scaler),
        checkpoint_folder,
        RunLog(folder, config.log.to, resume_step=start.step, rank=rank()),
        journal,
        stop,
    )
    if checkpoint is not None:
        restore(run, checkpoint)
    for line in [*start.notes, *lines, *setup.advice(config, detector)]:
        run.log.info(line)
    return run


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Everything of a checkpoint but the model's tensors, which the detector started from."""
    run.step = run.saved = checkpoint["step"]
    run.optimizer_state = checkpoint["optimizer"]["state"]
    run.learner.skipped_in_row = checkpoint["data"]["skipped_in_row"]
    if run.learner.ema is not None and checkpoint["ema"] is not None:
        run.learner.ema.load_state_dict(checkpoint["ema"])
    if checkpoint["scaler"]:
        run.learner.scaler.load_state_dict(checkpoint["scaler"])
    lines = from_rank0(read_evaluations(run.folder / "metrics.jsonl"))
    run.evaluated = {(line["step"], line["weights"]) for line in lines}
    if from_rank0((run.checkpoints.folder / "best.pt").exists()):
        followed = [line.get(best_metric(run)) for line in lines if line["weights"] == evaluated_weights(run)[0]]
        run.best = max((value for value in followed if value is not None), default=run.best)


def train_phase(run: Run, phase: Phase) -> None:
    """Freeze, wrap, report, and train from the run's step to the phase's end."""
    learner, config, detector = run.learner, run.config, run.learner.detector
    start_phase(run, phase)
    missing = {n for n, p in detector.named_parameters() if p.requires_grad}
    turns = {detector.sources[name]: 0 for name in detector.active_heads()}
    with closing(step_batches(run, phase)) as batches:  # ends the workers, however this is left
        clock = time.perf_counter()
        for batch, data_s in batches:
            lr = config.optimizer.lr * optim.lr_factor(run.step, config.schedule, run.steps)
            torch.manual_seed(
                hash_seed(config.seed, run.step, rank())
            )  # for dropout, which no other state must influence
            result = train_step(learner, batch, lr=lr, stop=run.stop, folder=run.folder, step=run.step)
            run.step += 1
            turns[batch[0].source] += 1
            missing = check_gradients(run, missing, turns)
            step_s = time.perf_counter() - clock
            after_step(run, result, lr=lr, step_s=step_s, data_s=data_s)
            if run.step == phase.end or due(run, config.checkpoint.every) or result.stop:
                save(run)
            if result.stop:
                raise Stopped(result.stop)
            if due(run, config.eval.every):
                evaluate_now(run)
            clock = time.perf_counter()  # a step's time is the step's, not that of saving and evaluating
    run.optimizer_state = optim.state_by_name(learner.optimizer)


def start_phase(run: Run, phase: Phase) -> None:
    """Make the phase's freezing true everywhere: gradients, optimizer, average, DDP, digests, report."""
    learner, config, detector = run.learner, run.config, run.learner.detector
    detector.freeze(phase.freeze).train()
    learner.optimizer = optim.build_optimizer(detector, config.optimizer, fused=config.train.precision != "fp16")
    optim.load_state_by_name(learner.optimizer, run.optimizer_state)
    run.optimizer_state = optim.state_by_name(learner.optimizer)  # lets go of the tensors of before
    if learner.ema is not None:
        learner.ema.follow()
    learner.model = wrap(detector)
    if config.train.compile:
        torch._dynamo.reset()  # else what was compiled in earlier phases counts towards its limit
    prefix = FrozenPrefix(detector, config.train, log=run.log.info) if last_frozen(detector) else None
    steps = phase.end - run.step
    learner.prefix, lines = cache_setup.with_cache(prefix, config, detector, data=run.train_data, steps=steps)
    for line in lines:
        run.log.info(line)
    detector.compiled = (
        compiled(detector.forward_from, "what is trained", run.log.info) if config.train.compile else None
    )
    run.digests = digests(detector)
    lr = config.optimizer.lr * optim.lr_factor(phase.start, config.schedule, run.steps)
    rows = report.rows(detector, learner.optimizer, lr=lr, averaged=list(learner.ema.tensors) if learner.ema else [])
    notes = report.findings(detector, phase)
    run.log.table(report.PhaseTable(phase, rows))
    for note in notes:
        run.log.info(f"WARNING: {note}")
    if run.step == phase.start:  # not again where a phase is resumed
        run.log.text("freeze", report.markdown(phase, rows, notes), run.step)
    if rank() == 0:
        run.journal.begin(phase, rows, notes, digests=run.digests, step=run.step)


def step_batches(run: Run, phase: Phase) -> Generator[tuple[list[Batch], float]]:
    """This rank's share of each step as `accumulate` batches, and the seconds spent waiting for them."""
    loader = train_loader(
        {source: run.train_data[source] for source in phase.sources},
        run.config,
        needs=setup.needs_by_source(run.config, run.learner.detector.active_heads()),
        stores=run.learner.prefix.stores if isinstance(run.learner.prefix, FeatureCache) else None,
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


def finish(run: Run) -> None:
    """The table at the end, what the run left untouched, and where everything is."""
    for table in summary_table(run.metrics, title=f"step {run.step}"):
        run.log.table(table)
    for proof in run.journal.unchanged(run.learner.detector) if rank() == 0 else ():
        run.log.info(proof)
    checkpoints, evaluated = ("checkpoints/last.pt", "checkpoints/best.pt"), f"eval/step_{run.step:07d}"
    for name in (*checkpoints, evaluated, "freeze.json", "metrics.jsonl", "tb"):
        if (run.folder / name).exists():
            run.log.info(f"{run.folder / name}")
