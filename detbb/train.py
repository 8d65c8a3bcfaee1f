"""Training, top to bottom: phase -> freeze -> wrap -> for each batch: learn -> log, save, evaluate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from detbb import freeze, optim, report, setup
from detbb.checkpoint import FORMAT_VERSION, CheckpointFolder, frozen_entry, versions
from detbb.config import Config
from detbb.config_loading import config_to_dict, save_config
from detbb.data import train_loader
from detbb.data.annotations import Annotations
from detbb.data.batch import Batch
from detbb.distributed import all_gather_objects, from_rank0, processes, rank, world_size, wrap
from detbb.ema import Ema, view
from detbb.errors import Stopped, UserError
from detbb.evaluate import evaluate_detector
from detbb.heads import find_head
from detbb.log import RunLog, read_evaluations, summary_table
from detbb.phases import Phase, phase_at, plan_phases
from detbb.step import Learner, Outcome, read_losses, train_step
from detbb.stopping import StopSignals


@dataclass
class Run:
    """What the loop holds besides the learner."""

    config: Config
    folder: Path
    phases: list[Phase]
    train_data: dict[str, Annotations]
    val_data: dict[str, Annotations]
    learner: Learner
    checkpoints: CheckpointFolder
    log: RunLog
    journal: report.FreezeJournal
    stop: StopSignals
    step: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    best: float = float("-inf")
    losses: dict[str, float] = field(default_factory=dict)  # as last logged
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated: set[tuple[int, str]] = field(default_factory=set)  # step and weights of what metrics.jsonl holds
    bad_images: set[str] = field(default_factory=set)

    @property
    def steps(self) -> int:
        return self.phases[-1].end


def train(config: Config, *, resume: str | None = None) -> Path:
    """Train as `config` says and return the path of the last checkpoint; every rank calls it.

    resume: None for a fresh run, `auto` for the newest valid checkpoint of the run folder, or a checkpoint file.
    Raises: UserError: config, data or checkpoint cannot work; Stopped: a signal came, and a checkpoint is safe.
    """
    with processes(config) as device, StopSignals() as stop:
        with setup.agreed():
            start = setup.open_run_folder(config, resume)
        run = prepare(config, start, device, stop)
        try:
            if start.checkpoint is not None and due(run, config.eval.every):
                evaluate_now(run)  # only if the interruption came before it was done
            while run.step < run.steps:
                train_phase(run, phase_at(run.phases, run.step), start)
            finish(run)
        finally:
            run.log.close()
        return run.checkpoints.folder / "last.pt"


def prepare(config: Config, start: setup.Start, device: torch.device, stop: StopSignals) -> Run:
    """Read the data, build the detector, and open the run folder."""
    checkpoint = start.checkpoint
    train_data, val_data = setup.read_sources(config)
    detector, lines = setup.start_detector(config, start, train_data)
    phases = plan_phases(config, setup.total_steps(config, train_data))
    for phase in phases:  # a misspelt name in a late phase is an error now, not then
        if not detector.freeze(phase.freeze).learning():
            raise UserError(f"freeze: phase {phase.index} freezes everything ({', '.join(phase.freeze)}); nothing would learn")
    lines += setup.refuse_random(config, phases, detector, setup.random_tensors(config, start, detector))
    detector.to(device)
    ema = Ema(config.ema) if config.ema is not None else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    learner = Learner(detector, ema, config.train, device, scaler)
    folder = Path(config.output_dir)
    run = Run(
        config,
        folder,
        phases,
        train_data,
        val_data,
        learner,
        CheckpointFolder(folder / "checkpoints", config.checkpoint.keep),
        RunLog(folder, resume_step=start.step, rank=rank()),
        report.FreezeJournal(folder / "freeze.json", resumed=checkpoint is not None),
        stop,
    )
    if rank() == 0:
        save_config(config, folder / "config.yaml")
    if checkpoint is not None:
        lines += setup.config_changes(config, checkpoint)
        restore(run, checkpoint)
    for line in [*start.notes, *lines, setup.count_parameters(detector)]:
        run.log.info(line)
    return run


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Everything of a checkpoint but the model's tensors, which the detector started from."""
    run.step = checkpoint["step"]
    run.learner.skipped_in_row = checkpoint["data"]["skipped_in_row"]
    if run.learner.ema is not None and checkpoint["ema"] is not None:
        run.learner.ema.load_state_dict(checkpoint["ema"])
    if checkpoint["scaler"]:
        run.learner.scaler.load_state_dict(checkpoint["scaler"])
    lines = from_rank0(read_evaluations(run.folder / "metrics.jsonl"))
    run.evaluated = {(line["step"], line["weights"]) for line in lines}
    run.best = max((v for line in lines if (v := line.get(best_metric(run))) is not None), default=run.best)
    if changed := freeze.changed(run.learner.detector, checkpoint["frozen"]["digests"]):
        raise freeze.FrozenTensorChanged(freeze.explain(run.learner.detector, changed))


def train_phase(run: Run, phase: Phase, start: setup.Start) -> None:
    """Freeze, wrap, report, and train from the run's step to the phase's end."""
    learner, config = run.learner, run.config
    enter(run, phase, start)
    batches = step_batches(run, phase)
    missing = {n for n, p in learner.detector.named_parameters() if p.requires_grad}
    clock = time.perf_counter()
    while run.step < phase.end:
        batch, data_s = next(batches)
        lr = config.optimizer.lr * optim.lr_factor(run.step, config.schedule, run.steps)
        torch.manual_seed(config.seed * 1_000_003 + run.step)  # dropout: a function of (seed, step), not of the past
        outcome = train_step(learner, batch, lr=lr, stop=run.stop.received, folder=run.folder, step=run.step)
        run.step += 1
        missing = check_gradients(run, phase, missing)
        step_s = time.perf_counter() - clock
        clock += step_s
        after_step(run, outcome, lr=lr, step_s=step_s, data_s=data_s)
        if run.step == phase.end or due(run, config.checkpoint.every) or outcome.stop:
            save(run)
        if outcome.stop:
            raise Stopped(outcome.stop)
        if due(run, config.eval.every):
            evaluate_now(run)
            clock = time.perf_counter()  # a step's time is the step's


def enter(run: Run, phase: Phase, start: setup.Start) -> None:
    """Make the phase's freezing true everywhere: gradients, optimizer, average, DDP, digests, report."""
    learner, config, detector = run.learner, run.config, run.learner.detector
    detector.freeze(phase.freeze).train()
    before = start.checkpoint["optimizer"]["state"] if start.checkpoint is not None else {}
    if hasattr(learner, "optimizer"):
        before = optim.state_by_name(learner.optimizer)
    learner.optimizer = optim.build_optimizer(detector, config.optimizer, fused=config.train.precision != "fp16")
    optim.load_state_by_name(learner.optimizer, before)
    if learner.ema is not None:
        learner.ema.follow(detector)
    learner.model = wrap(detector)
    run.digests = freeze.digests(detector.state_dict(), freeze.frozen_names(detector))
    lr = config.optimizer.lr * optim.lr_factor(run.step, config.schedule, run.steps)
    rows = report.rows(detector, learner.optimizer, lr=lr, averaged=list(learner.ema.tensors) if learner.ema else [])
    notes = report.findings(detector, phase)
    run.log.table(report.table(phase, rows))
    for note in notes:
        run.log.info(f"WARNING: {note}")
    run.log.text("freeze", report.markdown(phase, rows, notes), run.step)
    if rank() == 0:
        run.journal.begin(phase, rows, notes, run.digests)


def step_batches(run: Run, phase: Phase) -> Iterator[tuple[list[Batch], float]]:
    """This rank's share of each step as `accumulate` batches, and the seconds spent waiting for them."""
    learning = run.learner.detector.learning()
    used = {run.config.heads[name].data for name in learning}
    loader = train_loader(
        {name: a for name, a in run.train_data.items() if name in used},
        run.config,
        needs=setup.needs_by_source(run.config, learning),
        start_step=run.step,
        end_step=phase.end,
        rank=rank(),
        world_size=world_size(),
    )
    iterator = iter(loader)
    while True:
        began = time.perf_counter()
        batches = [next(iterator) for _ in range(run.config.train.accumulate)]
        yield batches, time.perf_counter() - began


def check_gradients(run: Run, phase: Phase, missing: set[str]) -> set[str]:
    """The trained parameters that had no gradient so far; says so once, ten steps (of each source) into the phase."""
    if missing:
        missing = {n for n, p in run.learner.detector.named_parameters() if n in missing and p.grad is None}
        if missing and run.step == phase.start + 10 * len(run.train_data):
            note = f"trained but without a gradient in the first {run.step - phase.start} steps: {', '.join(sorted(missing))}"
            run.log.info(f"WARNING: {note}")
            if rank() == 0:
                run.journal.find(note)
    return missing


def after_step(run: Run, outcome: Outcome, *, lr: float, step_s: float, data_s: float) -> None:
    """Log what is due. Losses leave the device only then."""
    images = outcome.images * world_size()
    for path in sorted(set(outcome.bad_images) - run.bad_images):
        run.bad_images.add(path)
        run.log.info(f"WARNING: left out an image that cannot be read ({len(run.bad_images)} so far): {path}")
    if outcome.skipped:
        run.log.info(f"WARNING: step {run.step} was skipped: a loss or gradient was not finite")
    if run.step % run.config.log.every == 0 or run.step == run.steps:
        values = read_losses(outcome)
        run.losses = values
        run.log.train(run.step, {**values, "lr": lr, "data_s": data_s, "step_s": step_s, "images_per_s": images / step_s})
    run.log.progress(run.step, run.steps, losses=run.losses, images=images, step_s=step_s, data_s=data_s)


def due(run: Run, every: int | None) -> bool:
    return run.step == run.steps or (every is not None and run.step > 0 and run.step % every == 0)


def verify(run: Run) -> None:
    """Compare every frozen tensor with its digest, on every rank; all ranks stop together if one differs."""
    detector = run.learner.detector
    changed = freeze.changed(detector, run.digests)
    found = [(r, names) for r, names in enumerate(all_gather_objects(changed)) if names]
    if found:
        where = "" if world_size() == 1 else f"rank {found[0][0]}: "
        raise freeze.FrozenTensorChanged(f"step {run.step}: {where}{freeze.explain(detector, found[0][1])}")
    if rank() == 0:
        run.journal.verified(run.step)


def save(run: Run) -> None:
    """Verify what is frozen, then write a checkpoint; rank 0 writes."""
    if (difference := run.learner.statistics_difference()) > 0:
        run.log.info(f"running statistics are averaged over ranks; their largest difference was {difference:.3g}")
    verify(run)
    if rank() == 0:
        run.checkpoints.save(content(run))


def content(run: Run) -> dict[str, Any]:
    """The checkpoint of this moment; its tensors are the live ones."""
    learner, detector = run.learner, run.learner.detector
    return {
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(run.config),
        "step": run.step,
        "phase": phase_at(run.phases, max(run.step - 1, 0)).index,
        "model": {name: tensor.detach() for name, tensor in detector.state_dict().items()},
        "ema": learner.ema.state_dict() if learner.ema is not None else None,
        "optimizer": {"type": run.config.optimizer.type, "state": optim.state_by_name(learner.optimizer)},
        "scaler": learner.scaler.state_dict(),
        "rng": {"seed": run.config.seed, "torch": torch.get_rng_state()},
        "data": {
            "images": {name: len(a) for name, a in run.train_data.items()},
            "batch_size": run.config.train.batch_size,
            "skipped_in_row": learner.skipped_in_row,
        },
        "frozen": frozen_entry(detector, run.digests),
        "classes": {name: classes.to_dict() for name, classes in detector.classes.items()},
        "versions": versions(),
    }


def best_metric(run: Run) -> str:
    """The metric that best.pt follows."""
    if run.config.eval.best is not None:
        return run.config.eval.best
    for name, head in run.config.heads.items():
        if head.data in run.val_data:
            return f"{name}/{find_head(head.type).main_metric}"
    return ""


def evaluate_now(run: Run) -> None:
    """Evaluate every branch that has a val split, log it, and move best.pt."""
    config, detector = run.config, run.learner.detector
    heads = {n: run.val_data[h.data] for n, h in config.heads.items() if n not in config.carried and h.data in run.val_data}
    kinds = ["ema", "model"] if config.eval.weights == "both" else [config.eval.weights or "model"]
    if not heads or all((run.step, weights) in run.evaluated for weights in kinds):
        return
    folder = run.folder / "eval" / f"step_{run.step:07d}"
    for weights in kinds:
        seen = run.learner.ema.view(detector) if weights == "ema" and run.learner.ema else view(detector)
        output = folder if weights == kinds[0] else folder.with_name(f"{folder.name}_{weights}")
        metrics = evaluate_detector(
            seen, heads, config=config, output_dir=output, weights=weights, stop=lambda: run.stop.received
        )
        if weights == kinds[0]:
            run.metrics = metrics
            if metrics.get(best_metric(run), float("-inf")) > run.best:
                run.best = metrics[best_metric(run)]
                if rank() == 0:
                    run.checkpoints.mark_best(run.step, lambda: content(run))
        pictures = {n: output / n / "samples.png" for n in heads if (output / n / "samples.png").exists()}
        run.log.evaluation(run.step, weights, metrics, images=pictures)
        run.evaluated.add((run.step, weights))


def finish(run: Run) -> None:
    """The table at the end, and where everything is."""
    for table in summary_table(run.metrics, title=f"step {run.step}"):
        run.log.table(table)
    for name in ("checkpoints/last.pt", "checkpoints/best.pt", f"eval/step_{run.step:07d}", "freeze.json", "metrics.jsonl", "tb"):
        if (run.folder / name).exists():
            run.log.info(f"{run.folder / name}")
