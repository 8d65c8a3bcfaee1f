"""What a run starts from: its data and weights, and what it refuses to start with."""

from __future__ import annotations

import math
import os
from collections.abc import Collection

import torch

from detbb.checkpoint import content as checkpoints
from detbb.config.checks import check_schedule
from detbb.config.phases import Phase
from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.data.doctor.examine import examine
from detbb.data.loader import train_loader
from detbb.detector import Detector, build_detector
from detbb.distributed.collectives import raise_on_all_ranks, rank, world_size
from detbb.freeze import resolve
from detbb.heads import find_head
from detbb.modeling.norm import FrozenBatchNorm2d, SyncBatchNorm
from detbb.modeling.weights import load_backbone_weights
from detbb.structures.annotations import Annotations
from detbb.structures.class_list import ClassList
from detbb.training import resuming
from detbb.training.resuming import ResumePoint


def needs_by_source(config: Config, heads: Collection[str] | None = None) -> dict[str, frozenset[str]]:
    """Which annotations these heads (default: all but the inherited ones) learn from, by data source."""
    needs: dict[str, set[str]] = {}
    for name, head in config.heads.items():
        if name in heads if heads is not None else name not in config.inherited_heads:
            needs.setdefault(head.data, set()).add(find_head(head.type).needs)
    return {source: frozenset(kinds) for source, kinds in needs.items()}


def read_sources(config: Config) -> tuple[dict[str, Annotations], dict[str, Annotations]]:
    """The train and val annotations of every data source in use, by its name.

    Rank 0 reads first: generated sets are written once, and one process looks at the files. Raises: UserError: all that
    is refused in the data, or a head needs what its source does not hold.
    """
    with raise_on_all_ranks(rank0_first=True):
        needed = needs_by_source(config)
        report = examine(
            {name: config.data[name] for name in needed}, files=rank() == 0, max_detections=config.eval.max_detections
        )
        report.check()
        train, val = report.annotations("train"), report.annotations("val")
        for name, needs in needed.items():
            if name not in train:
                raise UserError(f"data.{name}.train: names no images and annotations, so there is nothing to train on")
            for split, annotations in (("train", train[name]), ("val", val.get(name))):
                for need in sorted(needs):
                    if annotations is not None and not annotations.has(need):
                        heads = [
                            h for h, c in config.heads.items() if c.data == name and find_head(c.type).needs == need
                        ]
                        raise UserError(f"heads.{heads[0]}: needs {need}, which data.{name}.{split} does not hold")
    return train, val


def check_data(detector: Detector, config: Config, splits: list[dict[str, Annotations]]) -> None:
    """Let every reader be built, and every head look at its data, before step 0. Raises: UserError."""
    train_loader(splits[0], config, needs=needs_by_source(config), start_step=0, end_step=0)
    for name, source in detector.sources.items():
        for split in splits:
            if source in split:
                try:
                    detector.head(name).check_data(split[source])
                except UserError as error:
                    raise UserError(f"heads.{name}: {error}") from None


def repairs(train: dict[str, Annotations], val: dict[str, Annotations]) -> list[str]:
    """Lines about faults of the data that were repaired, and what is good to know about it."""
    splits = [*((f"data.{n}.train", a) for n, a in train.items()), *((f"data.{n}.val", a) for n, a in val.items())]
    lines = [f"WARNING: {where}: {fault}" for where, annotations in splits for fault in annotations.faults]
    return lines + [f"{where}: {note}" for where, annotations in splits for note in annotations.notes]


def total_steps(config: Config, train: dict[str, Annotations]) -> int:
    """Optimizer steps of the run; `epochs` counts passes over every data source, the slowest one included.

    Raises: UserError: the schedule is longer.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    turns = sum(config.data[name].weight for name in train)
    longest = max(len(a) * turns / config.data[name].weight for name, a in train.items())
    steps = math.ceil(config.train.epochs * longest / config.train.batch_size)
    if wrong := list(
        check_schedule(config.schedule, steps, f"the {steps} steps of train.epochs {config.train.epochs:g}")
    ):
        raise UserError("; ".join(f"{key} {message}" for key, message in wrong))
    return steps


def start_detector(
    config: Config, start: ResumePoint, train: dict[str, Annotations]
) -> tuple[Detector, list[str], set[str]]:
    """The detector with the weights the run starts from, lines that say whence, and the tensors that no file gave.

    Inherited heads are entered into `config`. Raises: UserError: weights or inherited heads do not fit.
    """
    torch.manual_seed(config.seed)
    given = start.checkpoint
    if given is None and config.init_from is not None:
        given = checkpoints.open_checkpoint(config.init_from, key="init_from")
    classes = {n: ClassList.of_data(train[h.data]) for n, h in config.heads.items() if n not in config.inherited_heads}
    if given is not None:  # what a resumed run did not carry is no head of it: see resuming.load
        only = None if start.checkpoint is None else given["config"]["inherited_heads"]
        classes |= checkpoints.add_inherited_heads(config, given, only=only)
    if unknown := [name for name in config.inherited_heads if name not in classes]:
        raise UserError(f"inherited_heads: {unknown[0]!r} is no head of what the run starts from; leave it out")
    detector = build_detector(config, classes)
    if start.checkpoint is not None:
        resuming.load(detector, start.checkpoint, classes=classes)
        return detector, [], set()
    lines: list[str] = []
    random = set(detector.state_dict())
    parts = [f"heads.{n}.{p}." for n, h in detector.heads.items() for p in getattr(h, "backbone_parts", ())]
    pretrained = {name for name in random if name.startswith(("backbone.", *parts))}
    if config.backbone.weights is not None and (given is None or pretrained - set(given["model"])):
        lines += _load_weights(config, detector)
        random -= pretrained
    if given is not None:  # after the weights: these go into what the checkpoint lacks
        report = checkpoints.init_from(detector, given, str(config.init_from))
        report.inherited_heads = list(config.inherited_heads)
        lines += report.lines()
        random = random - set(report.loaded) | set(report.reset)
    return detector, lines, random


def refuse_random(config: Config, phases: list[Phase], detector: Detector, random: set[str]) -> list[str]:
    """Warnings about random parts that start frozen.

    random: names of tensors that no file gave. Raises: UserError: a random part would never be trained.
    """
    allowed = {"backbone": config.backbone.allow_random, "neck": config.neck.allow_random}
    allowed |= {f"heads.{name}": head.allow_random for name, head in config.heads.items()}
    warnings = []
    for name in dict.fromkeys(n for phase in phases for n in phase.freeze):
        part = ".".join(name.split(".")[:2]) if name.startswith("heads.") else name.split(".")[0]
        tensors = [f"{prefix}.{n}" for prefix, m in resolve(detector, name) for n, _ in m.named_parameters()]
        if allowed.get(part, False) or not random.intersection(tensors):
            continue
        if all(_covers(phase.freeze, name) for phase in phases):
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


def _covers(frozen: tuple[str, ...], name: str) -> bool:
    return any(name == f or name.startswith(f + ".") for f in frozen)


def _load_weights(config: Config, detector: Detector) -> list[str]:
    assert config.backbone.weights is not None
    with raise_on_all_ranks(rank0_first=True):  # one process fetches a file
        coverage = load_backbone_weights(detector.backbone, config.backbone.weights)
        for name in detector.heads:
            detector.head(name).load_backbone_weights(coverage.state)
    return [coverage.table(), *coverage.notes]


def advice(config: Config, detector: Detector) -> list[str]:
    """Lines about what may not be meant: more workers than this machine has cores, `sync_bn` on one process."""
    lines = []
    if world_size() == 1 and any(isinstance(m, SyncBatchNorm) for m in detector.modules()):
        lines.append("norm sync_bn on one process is plain bn")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.train.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if workers > cores:
        lines.append(f"train.workers: {workers} data workers on {cores} cores take time from training; try fewer")
    return lines
