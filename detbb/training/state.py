"""A run, what a checkpoint saves of it, and how it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from detbb.checkpoint.content import FORMAT_VERSION, versions
from detbb.checkpoint.folder import CheckpointFolder
from detbb.config.loading import config_to_dict
from detbb.config.phases import Phase, phase_at
from detbb.config.schema import Config
from detbb.core.errors import Stopped, StoppedWaiting, some
from detbb.distributed.collectives import all_gather_objects, from_rank0, raise_on_all_ranks, rank, world_size
from detbb.freeze import FrozenTensorChanged, averaged_names, changed, explain, frozen_in_train_mode
from detbb.report.freeze_report import FreezeJournal
from detbb.report.log import RunLog
from detbb.report.writers import read_evaluations
from detbb.structures.annotations import Annotations
from detbb.training import optim
from detbb.training.signals import StopSignals
from detbb.training.step import CURES, NonFinite, TrainState


@dataclass
class Run:
    """A run as the loop holds it: the training state, and everything around it."""

    config: Config
    folder: Path
    phases: list[Phase]
    train_data: dict[str, Annotations]
    val_data: dict[str, Annotations]
    state: TrainState
    checkpoints: CheckpointFolder
    log: RunLog
    journal: FreezeJournal
    stop: StopSignals
    step: int = 0
    saved: int = -1  # the step of the newest checkpoint
    digests: dict[str, str] = field(default_factory=dict)  # of what this phase freezes
    no_gradient: set[str] = field(default_factory=set)  # parameters of this phase that had none so far
    source_steps: dict[str, int] = field(default_factory=dict)  # steps of this phase by data source
    losses: dict[str, float] = field(default_factory=dict)  # as last logged
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated: set[tuple[int, str]] = field(default_factory=set)  # step and weights of what metrics.jsonl holds
    best: float = float("-inf")
    bad_images: set[str] = field(default_factory=set)

    @property
    def steps(self) -> int:
        return self.phases[-1].end

    def due(self, every: int | None) -> bool:
        return self.step == self.steps or (every is not None and self.step > 0 and self.step % every == 0)

    def lr(self, step: int) -> float:
        """The learning rate of step number `step` (from 0)."""
        return self.config.optimizer.lr * optim.lr_factor(step, self.config.schedule, self.steps)

    def evaluated_heads(self) -> dict[str, Annotations]:
        """The heads that this run evaluates, with their val split: its own ones that have one."""
        heads = self.config.own_heads
        return {name: self.val_data[head.data] for name, head in heads.items() if head.data in self.val_data}

    def evaluated_weights(self) -> list[str]:
        """The weights (`ema`, `model`) to evaluate with; best.pt follows the first."""
        chosen = self.config.eval.weights or "model"
        return ["ema", "model"] if chosen == "both" else [chosen]

    def missing_evaluations(self) -> list[str]:
        """The weights that this step is to be evaluated with and that are not in metrics.jsonl yet."""
        kinds = self.evaluated_weights() if self.evaluated_heads() else []
        return [kind for kind in kinds if (self.step, kind) not in self.evaluated]

    def best_metric(self) -> str:
        """The metric that best.pt follows."""
        if self.config.eval.best is not None:
            return self.config.eval.best
        heads = self.evaluated_heads()
        trained = [n for n in heads if any(f"heads.{n}" not in phase.freeze for phase in self.phases)]
        for name in [*trained, *heads]:  # a branch that is frozen all run long has no best moment
            return f"{name}/{self.state.detector.head(name).main_metric}"
        return ""

    def stopped(self, signal: int) -> Stopped:
        """What to raise when all is saved after a signal; says how to go on."""
        stopped = Stopped(signal)
        last = self.checkpoints.folder / "last.pt"
        self.log.info(f"{stopped} after step {self.step}; checkpoint {last}; go on with --resume")
        return stopped


@contextmanager
def saved_while_waiting(run: Run) -> Iterator[None]:
    """Save before a signal ends a run that waits for data: a process alone is at a step boundary then."""
    try:
        yield
    except StoppedWaiting as stopped:
        if world_size() == 1 and run.step > 0:
            save_checkpoint(run)
        raise run.stopped(stopped.signal) from None


def capture(run: Run) -> dict[str, Any]:
    """The checkpoint of this moment; its tensors are the live ones."""
    state, detector = run.state, run.state.detector
    return {
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(run.config),
        "step": run.step,
        "phase": phase_at(run.phases, max(run.step - 1, 0)).index,
        "model": {name: tensor.detach() for name, tensor in detector.state_dict().items()},
        "ema": state.ema.state_dict() if state.ema is not None else None,
        "optimizer": {"type": run.config.optimizer.type, "state": optim.state_by_name(state.optimizer)},
        "scaler": state.scaler.state_dict(),
        "rng": {"seed": run.config.seed, "torch": torch.get_rng_state()},
        "data": {
            "images": {name: len(a) for name, a in run.train_data.items()},
            "batch_size": run.config.train.batch_size,
            "skipped_in_row": state.skipped_in_row,
        },
        "frozen": {"names": list(detector.frozen), "digests": dict(run.digests)},
        "classes": {name: classes.to_dict() for name, classes in detector.classes.items()},
        "versions": versions(),
    }


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Bring back what `capture` saved. The rest follows from config, data and step, or is in metrics.jsonl."""
    state = run.state
    run.step = run.saved = checkpoint["step"]
    state.detector.load_state_dict(checkpoint["model"])
    if state.ema is not None:
        state.ema.load_state_dict(checkpoint["ema"] or {"updates": 0, "tensors": {}})
    state.optimizer_state = checkpoint["optimizer"]["state"]
    if checkpoint["scaler"]:
        state.scaler.load_state_dict(checkpoint["scaler"])
    state.skipped_in_row = checkpoint["data"]["skipped_in_row"]
    lines = from_rank0(read_evaluations(run.folder / "metrics.jsonl"))
    run.evaluated = {(line["step"], line["weights"]) for line in lines}
    if from_rank0((run.checkpoints.folder / "best.pt").exists()):
        followed = [line.get(run.best_metric()) for line in lines if line["weights"] == run.evaluated_weights()[0]]
        run.best = max((value for value in followed if value is not None), default=run.best)


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint of this step, if there is none, once what is frozen is verified and all is finite.

    Every rank calls it; rank 0 writes, and its UserError is raised on all.
    """
    if run.saved == run.step:
        return
    if (difference := run.state.statistics_difference()) > 0:
        run.log.info(f"running statistics are averaged over ranks; their largest difference was {difference:.3g}")
    verify(run)
    refuse_nonfinite(run)
    with raise_on_all_ranks():
        if rank() == 0:
            run.log.sync()  # a resumed run trusts the log up to the checkpoint's step
            run.log.info(*run.checkpoints.save(capture(run)))
    run.saved = run.step


def verify(run: Run) -> None:
    """Compare every frozen tensor with its digest, on every rank; all ranks stop together if one differs.

    A frozen norm in train mode is a fault before it has moved a tensor: the folded copies would hide it.
    """
    detector = run.state.detector
    fault = ""
    if names := changed(detector, run.digests):
        fault = explain(detector, names)
    elif norms := frozen_in_train_mode(detector):
        fault = f"frozen but in train mode: {some(norms)}; something called .train() on it"
    for number, found in enumerate(all_gather_objects(fault)):
        if found:
            where = "" if world_size() == 1 else f"rank {number}: "
            raise FrozenTensorChanged(f"step {run.step}: {where}{found}")
    if rank() == 0:
        run.journal.verified(run.step)


def refuse_nonfinite(run: Run) -> None:
    """Raise NonFinite if a trained weight, statistic or average is not finite: finite gradients can overflow one."""
    tensors = run.state.detector.state_dict()
    tensors = {name: tensors[name] for name in averaged_names(run.state.detector)}
    if run.state.ema is not None:
        tensors |= {f"ema of {name}": tensor for name, tensor in run.state.ema.tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise NonFinite(
            f"step {run.step}: NaN or infinite values in {some(broken)}; "
            f"not saved, the newest checkpoint is of step {max(run.saved, 0)}; {CURES}"
        )
