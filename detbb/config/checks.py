"""Combinations that cannot work. All of them are found at the start and reported together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from detbb.config.messages import Problem, show
from detbb.config.schema import BackboneConfig, Config, DataConfig, NeckConfig, ScheduleConfig, SplitConfig
from detbb.core.errors import nearest


def check_combinations(
    config: Config, classes: dict[str, Any], formats: dict[str, Any], world_size: int
) -> Iterator[Problem]:
    """Everything that keys, types and ranges alone do not say.

    classes: the head class of each entry of `config.heads`; formats: the `Format` of each entry of `config.data`.
    """
    yield from _check_names(config)
    for name, source in config.data.items():
        yield from _check_source(source, formats[name], f"data.{name}")
    yield from _check_heads(config, classes, formats)
    yield from _check_norms(config.backbone, "backbone", config.backbone.weights is None and config.init_from is None)
    yield from _check_norms(config.neck, "neck", config.init_from is None)
    yield from _check_length(config)
    yield from _check_freeze(config)
    yield from _check_optimizer(config)
    yield from _check_batch(config, world_size)
    yield from _check_evaluation(config)


def _check_names(config: Config) -> Iterator[Problem]:
    for section, entries in (("data", config.data), ("heads", config.heads)):
        if not entries:
            yield section, "is empty, must name at least one entry"
    for name in config.data:
        if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
            yield f"data.{name}", "is not a valid name: letters, digits, _ and - only, not starting with a digit"
    for name in config.heads:
        if not name.isidentifier():
            yield f"heads.{name}", "is not a valid name: letters, digits and _ only, not starting with a digit"
        if hasattr(nn.ModuleDict(), name):
            yield f"heads.{name}", f"is not a valid name: {name!r} is taken by torch.nn.ModuleDict; choose another"


def _check_source(source: DataConfig, data_format: Any, at: str) -> Iterator[Problem]:
    for name, split in (("train", source.train), ("val", source.val)):
        if split is not None:
            yield from _check_split(split, source.format, f"{at}.{name}", generated=data_format.generated)
    if source.classes is None and data_format.classes_from == "config":
        yield f"{at}.classes", f"is null, must be a list of names or a names file for format {source.format}"


def _check_split(split: SplitConfig, name: str, at: str, *, generated: bool) -> Iterator[Problem]:
    for key in ("images", "annotations"):
        if not generated and not getattr(split, key):
            yield f"{at}.{key}", f"is missing, must be given for format {name}"
    if generated and split.annotations is not None:
        yield f"{at}.annotations", f"is {show(split.annotations)}, but format {name} generates them; leave it out"
    if not generated and split.size is not None:
        yield f"{at}.size", f"is {show(split.size)}, but format {name} generates no images; leave it out"


def _check_heads(config: Config, classes: dict[str, Any], formats: dict[str, Any]) -> Iterator[Problem]:
    for name, head in config.heads.items():
        if name in config.inherited_heads:  # kept, not trained: its data may be elsewhere
            continue
        at, shown, needs = f"heads.{name}.data", show(head.data), classes[name].needs
        if head.data not in config.data:
            yield at, f"is {shown}, must be one of {', '.join(config.data)}{nearest(head.data, config.data)}"
        elif needs not in (gives := formats[head.data].gives):
            source = f"{shown} of format {config.data[head.data].format}, which gives {', '.join(gives)}"
            yield at, f"is {source}, but type {head.type} needs {needs}; name other data"
    for index, name in enumerate(config.inherited_heads):
        if name not in config.heads:
            yield f"inherited_heads[{index}]", f"is {show(name)}, must be one of {', '.join(config.heads)}"


def _check_norms(part: BackboneConfig | NeckConfig, at: str, random: bool) -> Iterator[Problem]:
    norm = None if isinstance(part, NeckConfig) and part.type == "none" else part.norm
    own = norm is None and isinstance(part, BackboneConfig)  # whatever norms it has
    if part.norm_eval and norm in ("gn", None) and not own:
        yield f"{at}.norm_eval", f"is true, but norm {show(norm)} has no running statistics; leave it out"
    if not random or part.allow_random:
        return
    others, source = "gn, or null", "init_from"
    if at == "backbone":
        others, source = "gn", "backbone.weights (imagenet or a file) or init_from"
    cures = {"norm": f"bn (or {others})", "norm_eval": f"false (or norm: {others})"}
    for key, stops in (("norm", norm == "frozen_bn"), ("norm_eval", part.norm_eval)):
        if stops:
            reason = "on random weights this is no normalisation at all (mean 0, variance 1 forever)"
            cure = f"write {at}.{key}: {cures[key]}, or give {source}, or set {at}.allow_random"
            yield f"{at}.{key}", f"is {show(getattr(part, key))}, but {reason}; {cure}"


def _check_length(config: Config) -> Iterator[Problem]:
    steps, epochs = config.train.steps, config.train.epochs
    if (steps is None) == (epochs is None):
        both = "and train.epochs are both given" if steps else "is missing, and so is train.epochs"
        yield "train.steps", f"{both}; give one of them"
    if config.freeze and config.phases:
        yield "freeze", "and phases are both given; write freeze inside each phase"
    for index, phase in enumerate(config.phases[:-1]):
        if phase.steps is None:
            yield f"phases[{index}].steps", "is missing; only the last phase may leave it out"
    lengths = [phase.steps for phase in config.phases if phase.steps is not None]
    if steps is None or not config.phases:
        return
    is_open = len(lengths) < len(config.phases)
    if (sum(lengths) >= steps) if is_open else (sum(lengths) != steps):
        must = f"less than train.steps {steps}" if is_open else f"train.steps {steps} (or the last leave out steps)"
        yield "phases", f"are {sum(lengths)} steps long{' before the last' * is_open}, must be {must}"


def _check_freeze(config: Config) -> Iterator[Problem]:
    lists = [("freeze", config.freeze), *((f"phases[{i}].freeze", p.freeze) for i, p in enumerate(config.phases))]
    for at, names in lists:
        for index, name in enumerate(names):
            yield from _check_part(name, config, f"{at}[{index}]")
    cache = config.train.cache_features
    if cache in ("memory", "disk") and not any(n.startswith("backbone") for _, names in lists for n in names):
        yield "train.cache_features", f"is {cache}, but no part of the backbone is frozen; freeze it, or write off"


def _check_part(name: str, config: Config, at: str) -> Iterator[Problem]:
    """`backbone…`, `neck…` or `heads.<name>…`; the rest can only be checked against the built model."""
    first, _, rest = name.partition(".")
    if first == "heads" and rest:
        head = rest.partition(".")[0]
        if head not in config.heads:
            yield at, f"is {show(name)}, but the heads are {', '.join(config.heads)}{nearest(head, config.heads)}"
    elif first not in ("backbone", "neck", "heads"):
        near = nearest(first, ("backbone", "neck", "heads"))
        yield at, f"is {show(name)}, must start with backbone, neck or heads.<name>{near}"


def _check_optimizer(config: Config) -> Iterator[Problem]:
    for name in config.optimizer.lr_mult:
        yield from _check_part(name, config, f"optimizer.lr_mult.{name}")
    if config.train.steps is not None:
        yield from check_schedule(config.schedule, config.train.steps, f"train.steps {config.train.steps}")


def check_schedule(schedule: ScheduleConfig, steps: int, length: str) -> Iterator[Problem]:
    """Everything of the schedule must be over before the run is; `length` says where its `steps` come from."""
    if schedule.type == "multistep" and schedule.milestones and schedule.milestones[-1] >= steps:
        yield "schedule.milestones", f"is {show(schedule.milestones)}, must be below {length}"
    if schedule.warmup_steps >= steps and schedule.warmup_steps:
        yield "schedule.warmup_steps", f"is {schedule.warmup_steps}, must be below {length}"


def _check_batch(config: Config, world_size: int) -> Iterator[Problem]:
    size, parts = config.train.batch_size, config.train.accumulate * world_size
    if size % parts:
        low, high = size // parts * parts, (size // parts + 1) * parts
        near = " or ".join(str(n) for n in (low, high) if n)
        why = f"train.accumulate {config.train.accumulate} x {world_size} processes"
        yield "train.batch_size", f"is {size}, must be divisible by {why}: {near}"


def _check_evaluation(config: Config) -> Iterator[Problem]:
    if config.ema is None and config.eval.weights in ("ema", "both"):
        yield "eval.weights", f"is {config.eval.weights}, but ema is null; write model, or give ema"
    best = config.eval.best
    if best is None:
        return
    head, _, metric = best.partition("/")
    if head not in config.heads or not metric:
        valid = f"<head>/<metric> with a head of {', '.join(config.heads)}{nearest(head, config.heads)}"
        yield "eval.best", f"is {show(best)}, must be {valid}"
        return
    source = config.data.get(config.heads[head].data)
    if source is None or source.val is None:
        yield "eval.best", f"is {show(best)}, but data.{config.heads[head].data} has no val split"
