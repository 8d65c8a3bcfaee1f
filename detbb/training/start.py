"""How a run starts: find the checkpoint, read the data, build, refuse what cannot work; open the folder."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from detbb.checkpoint import content as checkpoints
from detbb.checkpoint.folder import CheckpointFolder
from detbb.config.checks import check_schedule
from detbb.config.loading import config_to_dict, save_config
from detbb.config.phases import Phase, plan_phases
from detbb.config.schema import Config
from detbb.core.errors import UserError, some
from detbb.core.files import check_folder, remove_leftovers, writing
from detbb.core.folder_lock import FolderLock
from detbb.core.machine import cores
from detbb.data.doctor.examine import examine
from detbb.data.loader import train_loader
from detbb.data.workers import shared_memory_warning
from detbb.detector import Detector, build_detector, view
from detbb.distributed.collectives import all_gather_objects, error_on_all_ranks, raise_on_all_ranks, rank, world_size
from detbb.feature_cache import setup as cache_setup
from detbb.freeze import digest, tensors_of
from detbb.heads import find_head
from detbb.inference.evaluate import try_evaluation
from detbb.modeling.norm import FrozenBatchNorm2d, SyncBatchNorm
from detbb.modeling.weights import load_backbone_weights
from detbb.report import overview
from detbb.report.freeze_report import FreezeJournal
from detbb.report.log import RunLog
from detbb.report.writers import find_writers
from detbb.structures.annotations import Annotations
from detbb.structures.class_list import ClassList
from detbb.training import optim
from detbb.training.ema import Ema
from detbb.training.signals import StopSignals
from detbb.training.state import Run, restore
from detbb.training.step import TrainState

Data = dict[str, Annotations]  # by name of the data source


@dataclass
class ResumePoint:
    """The checkpoint a run goes on from (None: a fresh start), and lines for the log."""

    checkpoint: dict[str, Any] | None = None
    path: Path | None = None
    step: int | None = None  # what the logs hold of later steps is dropped; None: there is nothing to drop
    notes: list[str] = field(default_factory=list)


def start_run(config: Config, resume: str | None, device: torch.device, stop: StopSignals, lock: FolderLock) -> Run:
    """The run at its first step, with the weights that it starts from. Nothing is written before all is checked.

    resume: as in `train`. Raises: UserError: it cannot start.
    """
    find_writers(config.log.to)
    optim.find_schedule(config.schedule.type)
    optim.find_optimizer(config.optimizer.type)
    start = find_start(config, resume, lock)
    train_data, val_data = read_sources(config)
    detector, random = start_detector(config, start, train_data)
    phases = plan_sources(plan_phases(config, total_steps(config, train_data)), detector)
    optim.lr_by_name(detector, config.optimizer.lr_mult)  # refuses unknown names
    cache_setup.check(config, detector, phases, train_data)
    start.notes += [*repairs(train_data, val_data), *refuse_random(config, phases, detector, random)]
    check_data(detector, config, [train_data, val_data])
    if start.checkpoint is not None:
        optim.check_state(detector, start.checkpoint["optimizer"]["state"])
        start.notes += check_resume(config, start.checkpoint, train_data, steps=phases[-1].end)
    detector.to(device)
    with raise_on_all_ranks():
        if rank() == 0:
            splits = {name: val_data[head.data] for name, head in config.own_heads.items() if head.data in val_data}
            start.notes += try_evaluation(view(detector), splits, config=config)
    folder = Path(config.output_dir)
    checkpoint_folder = CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
    with raise_on_all_ranks():
        journal = FreezeJournal(folder / "freeze.json", resumed=start.checkpoint is not None)
        if rank() == 0:
            start.notes += claim_run_folder(config, start, checkpoint_folder, lock)
    ema = Ema(detector, decay=config.ema.decay, warmup_steps=config.ema.warmup_steps) if config.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    state = TrainState(detector, ema, config.train, device, scaler)
    epoch_steps = overview.images_per_epoch(config, train_data) / config.train.batch_size
    log = RunLog(folder, config.log.to, resume_step=start.step, epoch_steps=epoch_steps, rank=rank())
    run = Run(config, folder, phases, train_data, val_data, state, checkpoint_folder, log, journal, stop)
    if start.checkpoint is not None:
        restore(run, start.checkpoint)
    best = run.best_metric()
    log.info(*overview.opening(config, train_data, val_data, steps=run.steps, device=device, best=best))
    log.info(*start.notes, *advice(config, detector))
    return run


# ---- the checkpoint ----


def find_start(config: Config, resume: str | None, lock: FolderLock) -> ResumePoint:
    """Where the run starts. resume: as in `train`.

    Raises: UserError: the folder holds a run and `resume` is None, another process trains in it, or it cannot be
    written; or a checkpoint cannot be used.
    """
    folder, notes = Path(config.output_dir), []
    with raise_on_all_ranks():
        check_folder(folder)
        if resume is not None and rank() == 0 and folder.is_dir():
            notes = lock.take(folder)  # first, as another run may still change what is read next
    with raise_on_all_ranks():
        start = _find_start(config, resume)
    start.notes += notes
    if len(steps := set(all_gather_objects(start.step))) > 1:
        raise error_on_all_ranks(
            f"output_dir: the processes find checkpoints of steps {sorted(steps)} in {config.output_dir!r}; "
            "it must be one folder that all of them share"
        )
    return start


def _find_start(config: Config, resume: str | None) -> ResumePoint:
    folder = CheckpointFolder(Path(config.output_dir) / "checkpoints", config.checkpoint.keep)
    passed: list[str] = []
    if resume is None:
        if (Path(config.output_dir) / "config.yaml").exists() or folder.steps():
            raise _holds_a_run(config)
        return ResumePoint()
    named = None if resume == "auto" else Path(resume)
    if named is not None and named.is_dir():
        inside = named / "checkpoints"
        folder = CheckpointFolder(inside if inside.is_dir() else named, config.checkpoint.keep)
    if named is not None and not named.is_dir():
        path, checkpoint = named, checkpoints.open_checkpoint(named, key="--resume")
    elif (found := folder.newest()) is not None:
        path, checkpoint, passed = found
    elif named is not None:
        raise UserError(f"--resume {resume}: is a folder without a checkpoint; name a run folder or a file")
    else:
        note = f"--resume: no checkpoint in {folder.folder} yet, so this is a fresh start"
        return ResumePoint(step=0, notes=[note])
    notes = [f"WARNING: passed over an unusable checkpoint: {line}" for line in passed]
    notes.append(f"resuming from {path} at step {checkpoint['step']}")
    return ResumePoint(checkpoint, path, checkpoint["step"], notes)


def _holds_a_run(config: Config) -> UserError:
    return UserError(
        f"output_dir: {config.output_dir!r} already holds a run; go on with --resume, "
        "or give another output_dir (nothing was changed)"
    )


def check_resume(config: Config, checkpoint: dict[str, Any], train: Data, *, steps: int) -> list[str]:
    """Lines about what differs from the checkpoint's training. steps: of the whole run.

    Raises: UserError: it cannot go on with this config.
    """
    if (was := checkpoint["optimizer"]["type"]) != (optimizer := config.optimizer.type):
        raise UserError(
            f"--resume: optimizer.type is {optimizer!r}, the checkpoint's is {was!r}; use init_from to change it"
        )
    if (step := checkpoint["step"]) > steps:
        epochs = config.train.epochs
        length = f"train.steps: {steps}" if epochs is None else f"train.epochs: {epochs:g} ({steps} steps)"
        raise UserError(f"{length}, but the checkpoint is of step {step}; valid is {step} or more")
    model, known = checkpoint["model"], checkpoint["frozen"]["digests"]
    if wrong := [name for name in known if name not in model or digest(model[name]) != known[name]]:
        raise UserError(f"--resume: the checkpoint contradicts its own digests: {some(wrong)}")
    lines = [f"complete: step {step} of {steps}; raise train.steps to go on"] if step == steps else []
    data = checkpoint["data"]
    order = {f"data.{n}.train": (data["images"].get(n), len(a)) for n, a in train.items()}
    order["train.batch_size"] = (data["batch_size"], config.train.batch_size)
    if other := [f"{key} {a} before, {b} now" for key, (a, b) in order.items() if a not in (None, b)]:
        lines.append(f"WARNING: images come in another order from here on: {'; '.join(other)}")
    # What an older version stored lacks the keys that are new: they had the values that are the defaults now.
    now, then = (_flat(config_to_dict(c)) for c in (config, checkpoints.stored_config(checkpoint)))
    for key in dict.fromkeys([*now, *then]):
        if now.get(key) != then.get(key) and key != "output_dir":
            lines.append(f"WARNING: resuming with another {key}: {then.get(key)!r} before, {now.get(key)!r} now")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}


# ---- the data ----


def needs_by_source(config: Config, heads: Collection[str]) -> dict[str, frozenset[str]]:
    """Which annotations these heads learn from, by data source."""
    needs: dict[str, frozenset[str]] = {}
    for name in heads:
        head = config.heads[name]
        needs[head.data] = needs.get(head.data, frozenset()) | {find_head(head.type).needs}
    return needs


def read_sources(config: Config) -> tuple[Data, Data]:
    """The train and val annotations of every data source in use.

    Rank 0 reads first: it alone writes generated sets and looks at the image files. Raises: UserError: all faults that
    are refused in the data, or a head needs what its source does not hold.
    """
    heads = config.own_heads
    with raise_on_all_ranks(rank0_first=True):
        sources = {head.data: config.data[head.data] for head in heads.values()}
        report = examine(sources, files=rank() == 0, max_detections=config.eval.max_detections)
        report.check()
        train, val = report.annotations("train"), report.annotations("val")
        for name, head in heads.items():
            need = find_head(head.type).needs
            if head.data not in train:
                where = f"data.{head.data}.train"
                raise UserError(f"{where}: names no images and annotations, so there is nothing to train on")
            for split, data in (("train", train), ("val", val)):
                if head.data in data and not data[head.data].has(need):
                    raise UserError(f"heads.{name}: needs {need}, which data.{head.data}.{split} does not hold")
    return train, val


def check_data(detector: Detector, config: Config, splits: list[Data]) -> None:
    """Build every reader and let every head look at its data, before step 0. Raises: UserError."""
    train_loader(splits[0], config, needs=needs_by_source(config, config.own_heads), start_step=0, end_step=0)
    for name, source in detector.sources.items():
        for split in splits:
            if source in split:
                try:
                    detector.head(name).check_data(split[source])
                except UserError as error:
                    raise UserError(f"heads.{name}: {error}") from None


def repairs(train: Data, val: Data) -> list[str]:
    """Lines about faults of the data that were repaired, and what is good to know about it."""
    splits = {f"data.{n}.{split}": a for split, data in (("train", train), ("val", val)) for n, a in data.items()}
    lines = [f"WARNING: {where}: {fault}" for where, annotations in splits.items() for fault in annotations.faults]
    return lines + [f"{where}: {note}" for where, annotations in splits.items() for note in annotations.notes]


def total_steps(config: Config, train: Data) -> int:
    """Optimizer steps of the run; `epochs` counts passes over every data source, the slowest one included.

    Raises: UserError: the schedule is longer.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    steps = math.ceil(config.train.epochs * overview.images_per_epoch(config, train) / config.train.batch_size)
    length = f"the {steps} steps of train.epochs {config.train.epochs:g}"
    if wrong := [f"{key} {message}" for key, message in check_schedule(config.schedule, steps, length)]:
        raise UserError("; ".join(wrong))
    return steps


# ---- the detector ----


def start_detector(config: Config, start: ResumePoint, train: Data) -> tuple[Detector, set[str]]:
    """The detector as `config` says, and the names of the tensors that are random.

    A resumed run's tensors come later, by `restore`; here they are checked. Inherited heads are entered into `config`.
    Raises: UserError: weights or inherited heads do not fit.
    """
    torch.manual_seed(config.seed)
    given, source = start.checkpoint, None
    if given is None and config.init_from is not None:
        source = checkpoints.checkpoint_file(config.init_from, key="init_from")
        given = checkpoints.open_checkpoint(source, key="init_from")
    classes = {name: ClassList.of_data(train[head.data]) for name, head in config.own_heads.items()}
    if given is not None:  # what a resumed run did not inherit is no head of it: `_check_fit` refuses it
        only = None if start.checkpoint is None else given["config"]["inherited_heads"]
        classes |= checkpoints.add_inherited_heads(config, given, only=only)
    if unknown := [name for name in config.inherited_heads if name not in classes]:
        raise UserError(f"inherited_heads: {unknown[0]!r} is no head of what the run starts from; leave it out")
    detector = build_detector(config, classes)
    if start.checkpoint is not None:
        _check_fit(detector, start.checkpoint)
        return detector, set()
    random = set(detector.state_dict())
    parts = [f"heads.{n}.{p}." for n, h in detector.heads.items() for p in getattr(h, "backbone_parts", ())]
    pretrained = {name for name in random if name.startswith(("backbone.", *parts))}
    if config.backbone.weights is not None and (given is None or pretrained - set(given["model"])):
        with raise_on_all_ranks(rank0_first=True):  # one process fetches a file
            coverage = load_backbone_weights(detector.backbone, config.backbone.weights)
            for name in detector.heads:
                detector.head(name).load_backbone_weights(coverage.state)
        start.notes += [coverage.table(), *coverage.notes]
        random -= pretrained
    if given is not None:  # after the weights: these go into what the checkpoint lacks
        report = checkpoints.init_from(detector, given, str(source))
        report.inherited_heads = list(config.inherited_heads)
        start.notes += report.lines()
        random = random - set(report.loaded) | set(report.reset)
    return detector, random


def _check_fit(detector: Detector, checkpoint: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint to resume has other classes or tensors."""
    for name, now in detector.classes.items():
        stored = checkpoint["classes"].get(name)
        if stored is not None and ClassList.of(stored).names != now.names:
            raise UserError(
                f"--resume: heads.{name} learned {list(stored['names'])[:8]}, the data now has {list(now.names)[:8]}; "
                "a changed class list is a new run: use init_from"
            )
    advice = "resume with the run's own config.yaml, or start another run with init_from"
    checkpoints.check_fit(detector, checkpoint["model"], f"--resume: this config does not fit ({advice})")


def plan_sources(phases: list[Phase], detector: Detector) -> list[Phase]:
    """The phases with the data sources of their active heads.

    Raises: UserError: a phase freezes what is no submodule, or everything.
    """
    planned = []
    for phase in phases:
        active = detector.active_heads(frozen=phase.freeze)
        if not active:
            names = ", ".join(phase.freeze)
            raise UserError(f"freeze: phase {phase.index} freezes everything ({names}); nothing would learn")
        planned.append(replace(phase, sources=tuple(dict.fromkeys(detector.sources[name] for name in active))))
    return planned


def refuse_random(config: Config, phases: list[Phase], detector: Detector, random: set[str]) -> list[str]:
    """Warnings about random parts that start frozen.

    random: names of tensors that no file gave. Raises: UserError: a random part would never be trained.
    """
    allowed = {"backbone": config.backbone.allow_random, "neck": config.neck.allow_random}
    allowed |= {f"heads.{name}": head.allow_random for name, head in config.heads.items()}
    warnings = []
    for name in dict.fromkeys(n for phase in phases for n in phase.freeze):
        part = ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
        if allowed.get(part, False) or not random & tensors_of(detector, name):
            continue
        if all(any(f"{name}.".startswith(f"{frozen}.") for frozen in phase.freeze) for phase in phases):
            raise UserError(
                f"freeze: {name} has random weights and would never be trained, so the rest would learn from noise; "
                f"give weights (backbone.weights or init_from), or say {part}.allow_random: true"
            )
        warnings.append(f"WARNING: {name} starts frozen with random weights; it is trained in a later phase")
    frozen_norms = [n for n, m in detector.backbone.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    if frozen_norms and not config.backbone.allow_random and f"backbone.{frozen_norms[0]}.running_mean" in random:
        raise UserError(
            "backbone.norm: 'frozen_bn' on random weights normalises nothing (mean 0, variance 1 for good); write "
            "backbone.norm: bn (or gn), or give backbone.weights (imagenet or a file), or set backbone.allow_random"
        )
    return warnings


def advice(config: Config, detector: Detector) -> list[str]:
    """Lines about what may not be meant: more workers than this machine has cores, `sync_bn` on one process."""
    lines = []
    if world_size() == 1 and any(isinstance(m, SyncBatchNorm) for m in detector.modules()):
        lines.append("norm sync_bn on one process is plain bn")
    workers = config.train.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if workers > cores():
        lines.append(f"train.workers: {workers} data workers on {cores()} cores take time from training; try fewer")
    return lines + shared_memory_warning(config, world_size=world_size())


# ---- the run folder ----


def claim_run_folder(config: Config, start: ResumePoint, folder: CheckpointFolder, lock: FolderLock) -> list[str]:
    """Make the folder this run's, on rank 0, and give lines about what was set aside.

    Nothing in it but the lock was changed before. Raises: UserError: another start was faster.
    """
    output_dir = Path(config.output_dir)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    lines = lock.take(output_dir)
    if start.path is None and folder.steps():  # another run came and went since `find_start` looked
        raise _holds_a_run(config)
    if start.step is None:
        try:
            (output_dir / "config.yaml").open("x").close()
        except FileExistsError:
            raise _holds_a_run(config) from None
    else:
        lines += remove_leftovers(output_dir)
        if start.path is not None:
            lines += folder.make_newest(start.path, start.step)
    save_config(config, output_dir / "config.yaml")
    return lines
