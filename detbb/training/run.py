"""A run as the loop holds it: what is due, logging, saving, and evaluating at a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from detbb.checkpoint.content import FORMAT_VERSION, frozen_entry, versions
from detbb.checkpoint.folder import CheckpointFolder
from detbb.config.loading import config_to_dict
from detbb.config.phases import Phase, phase_at
from detbb.config.schema import Config
from detbb.core.errors import Stopped, unknown_name
from detbb.detector import view
from detbb.distributed.collectives import all_gather_objects, raise_on_all_ranks, rank, world_size
from detbb.feature_cache.cache import FeatureCache
from detbb.freeze import FrozenTensorChanged, averaged_names, changed, explain, frozen_in_train_mode
from detbb.inference.evaluate import evaluate_detector
from detbb.report import freeze_report as report
from detbb.report.log import RunLog
from detbb.structures.annotations import Annotations
from detbb.training import optim
from detbb.training.signals import StopSignals
from detbb.training.step import NonFinite, StepResult, TrainState, read_losses


@dataclass
class Run:
    """What the loop holds besides the learner."""

    config: Config
    folder: Path
    phases: list[Phase]
    train_data: dict[str, Annotations]
    val_data: dict[str, Annotations]
    learner: TrainState
    checkpoints: CheckpointFolder
    log: RunLog
    journal: report.FreezeJournal
    stop: StopSignals
    step: int = 0
    saved: int = -1  # the step of the newest checkpoint
    digests: dict[str, str] = field(default_factory=dict)
    optimizer_state: dict[str, dict[str, Any]] = field(default_factory=dict)  # before this phase, by parameter name
    best: float = float("-inf")
    losses: dict[str, float] = field(default_factory=dict)  # as last logged
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated: set[tuple[int, str]] = field(default_factory=set)  # step and weights of what metrics.jsonl holds
    bad_images: set[str] = field(default_factory=set)

    @property
    def steps(self) -> int:
        return self.phases[-1].end


def due(run: Run, every: int | None) -> bool:
    return run.step == run.steps or (every is not None and run.step > 0 and run.step % every == 0)


def after_step(run: Run, result: StepResult, *, lr: float, step_s: float, data_s: float) -> None:
    """Log what is due. Losses leave the device only then."""
    images = result.images * world_size()
    for path in sorted(set(result.bad_images) - run.bad_images):
        run.bad_images.add(path)
        run.log.info(f"WARNING: left out an image that cannot be read ({len(run.bad_images)} so far): {path}")
    if isinstance(run.learner.prefix, FeatureCache):
        for line in run.learner.prefix.new_messages():
            run.log.info(line)
    if result.skipped:
        run.log.info(f"WARNING: step {run.step} was skipped: a loss or gradient was not finite")
    if run.step % run.config.log.every == 0 or run.step == run.steps:
        values = read_losses(result)
        run.losses = values
        times = {"data_s": data_s, "step_s": step_s, "images_per_s": images / step_s}
        run.log.train(run.step, {**values, "lr": lr, **times})
    run.log.progress(run.step, run.steps, losses=run.losses, images=images, step_s=step_s, data_s=data_s)


def check_gradients(run: Run, missing: set[str], turns: dict[str, int]) -> set[str]:
    """The trained parameters that had no gradient so far; says so once, when each source had ten `turns`."""
    if missing:
        missing = {n for n, p in run.learner.detector.named_parameters() if n in missing and p.grad is None}
    if not missing or min(turns.values()) < 10:
        return missing
    note = f"trained but without a gradient in the first {sum(turns.values())} steps: {', '.join(sorted(missing))}"
    run.log.info(f"WARNING: {note}")
    if rank() == 0:
        run.journal.add_finding(note)
    return set()


def verify(run: Run) -> None:
    """Compare every frozen tensor with its digest, on every rank; all ranks stop together if one differs.

    A frozen norm in train mode is a fault before it has moved a tensor: the folded copies would hide it.
    """
    detector = run.learner.detector
    fault = ""
    if names := changed(detector, run.digests):
        fault = explain(detector, names)
    elif norms := frozen_in_train_mode(detector):
        fault = f"frozen but awake: {', '.join(norms[:5])} is in train mode: something called .train() on it"
    found = [(r, text) for r, text in enumerate(all_gather_objects(fault)) if text]
    if found:
        where = "" if world_size() == 1 else f"rank {found[0][0]}: "
        raise FrozenTensorChanged(f"step {run.step}: {where}{found[0][1]}")
    if rank() == 0:
        run.journal.verified(run.step)


def save(run: Run) -> None:
    """Verify what is frozen and that all is finite; then rank 0 writes a checkpoint, and all know if it cannot."""
    if (difference := run.learner.statistics_difference()) > 0:
        run.log.info(f"running statistics are averaged over ranks; their largest difference was {difference:.3g}")
    verify(run)
    refuse_nonfinite(run)
    with raise_on_all_ranks():
        if rank() == 0:
            run.log.sync()  # a resumed run trusts the log up to the checkpoint's step
            for line in run.checkpoints.save(content(run)):
                run.log.info(line)
    run.saved = run.step


def refuse_nonfinite(run: Run) -> None:
    """Raise NonFinite if a trained weight, statistic or average is not finite: finite gradients can overflow one."""
    state = run.learner.detector.state_dict()
    averages = run.learner.ema.tensors if run.learner.ema is not None else {}
    tensors = [(name, state[name]) for name in averaged_names(run.learner.detector)]
    tensors += [(f"ema of {name}", tensor) for name, tensor in averages.items()]
    if broken := [name for name, tensor in tensors if not tensor.isfinite().all()]:
        raise NonFinite(
            f"step {run.step}: NaN or infinite values in {', '.join(broken[:5])} ({len(broken)} tensors); "
            f"not saved, the newest checkpoint is of step {max(run.saved, 0)}"
        )


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
    heads = evaluated_heads(run)
    trained = [n for n in heads if any(f"heads.{n}" not in phase.freeze for phase in run.phases)]
    for name in [*trained, *heads]:  # a branch that rests all run long has no best moment
        return f"{name}/{run.learner.detector.head(name).main_metric}"
    return ""


def evaluated_heads(run: Run) -> dict[str, Annotations]:
    """The heads that this run evaluates, with their val split; inherited ones are not its business."""
    heads = {name: head for name, head in run.config.heads.items() if name not in run.config.inherited_heads}
    return {name: run.val_data[head.data] for name, head in heads.items() if head.data in run.val_data}


def evaluated_weights(run: Run) -> list[str]:
    """The weights (`ema`, `model`) to evaluate with; best.pt follows the first."""
    chosen = run.config.eval.weights or "model"
    return ["ema", "model"] if chosen == "both" else [chosen]


def missing_evaluations(run: Run) -> list[str]:
    """The weights that this step is to be evaluated with and that are not in metrics.jsonl yet."""
    return [kind for kind in evaluated_weights(run) if evaluated_heads(run) and (run.step, kind) not in run.evaluated]


def evaluate_now(run: Run) -> None:
    """Evaluate every branch that has a val split, move best.pt, and log it."""
    detector, heads = run.learner.detector, evaluated_heads(run)
    for weights in missing_evaluations(run):
        seen = view(detector, run.learner.ema.tensors if weights == "ema" and run.learner.ema else {})
        second = weights != evaluated_weights(run)[0]
        output = run.folder / "eval" / f"step_{run.step:07d}{'_model' if second else ''}"
        metrics = evaluate_detector(
            seen, heads, config=run.config, output_dir=output, weights=weights, step=run.step, stop=run.stop
        )
        if signal := max(all_gather_objects(run.stop())):  # --resume makes up for this evaluation
            if run.saved != run.step:
                save(run)
            raise Stopped(signal)
        if not second:
            run.metrics = metrics
            follow_best(run)
        pictures = {n: output / n / "samples.png" for n in heads if (output / n / "samples.png").exists()}
        run.log.evaluation(run.step, weights, metrics, images=pictures)
        run.evaluated.add((run.step, weights))


def follow_best(run: Run) -> None:
    """Move best.pt if the metrics are the best so far. Raises: UserError: `eval.best` is none of them."""
    name, named = best_metric(run), run.config.eval.best is not None
    improved = run.metrics.get(name, float("-inf")) > run.best
    if (improved or (named and name not in run.metrics)) and run.saved != run.step:
        save(run)
    with raise_on_all_ranks():
        if named and name not in run.metrics:
            raise unknown_name("eval.best", name, run.metrics)
        if improved:
            run.best = run.metrics[name]
            if rank() == 0:
                run.checkpoints.mark_best(run.step)
