"""Values out of range, and combinations that cannot work: refused at the start, never at step 500."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from detbb.config.schema import BackboneConfig, Config, DataConfig, NeckConfig, ScheduleConfig, SplitConfig
from detbb.config.types import Fail, join, show
from detbb.core.errors import nearest

_RULES: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda v: v >= 0,
    "at least 1": lambda v: v >= 1,
    "at least 2": lambda v: v >= 2,
    "above 0": lambda v: v > 0,
    "at least 0 and below 1": lambda v: 0 <= v < 1,
    "above 0 and at most 1": lambda v: 0 < v <= 1,
    "above 0 and below 1": lambda v: 0 < v < 1,
    "between 0 and 1": lambda v: 0 <= v <= 1,
    "between 0 and 255": lambda v: 0 <= v <= 255,
}
_RANGES = {
    "at least 0": (
        "seed train.workers optimizer.weight_decay optimizer.norm_weight_decay schedule.warmup_steps ema.warmup_steps "
        "log.images heads.*.loss_weight heads.*.num_convs heads.*.focal_gamma "
        "heads.*.roi_sampling_ratio"
    ),
    "at least 1": (
        "train.steps train.batch_size train.accumulate train.max_skipped phases.*.steps eval.every eval.batch_size "
        "data.*.views checkpoint.every log.every neck.channels data.*.max_pixels data.*.train.size "
        "data.*.val.size data.*.image_size.* schedule.milestones.* heads.*.topk_candidates "
        "heads.*.detections_per_image heads.*.channels heads.*.box_resolution heads.*.box_samples heads.*.box_channels "
        "heads.*.mask_channels.* heads.*.keypoint_channels.* "
        "heads.*.mask_resolution heads.*.keypoint_resolution heads.*.rpn_samples heads.*.rpn_pre_nms_train "
        "heads.*.rpn_post_nms_train heads.*.rpn_pre_nms_test heads.*.rpn_post_nms_test"
    ),
    "at least 2": "checkpoint.keep",
    "above 0": (
        "train.epochs train.grad_clip train.timeout_s train.cache_limit_gb optimizer.lr optimizer.lr_mult.* "
        "data.*.weight heads.*.anchor_sizes.*.* heads.*.anchor_ratios.* heads.*.box_delta_weights.* "
        "heads.*.center_sampling_radius"
    ),
    "at least 0 and below 1": "optimizer.momentum optimizer.betas.* ema.decay heads.*.dropout",
    "above 0 and at most 1": "schedule.gamma",
    "above 0 and below 1": "heads.*.prior_probability",
    "between 0 and 1": (
        "heads.*.threshold heads.*.focal_alpha heads.*.score_threshold heads.*.nms_threshold "
        "heads.*.foreground_iou heads.*.background_iou heads.*.box_foreground_iou heads.*.box_background_iou "
        "heads.*.box_positive_fraction heads.*.rpn_nms_threshold heads.*.rpn_foreground_iou heads.*.rpn_background_iou "
        "heads.*.rpn_positive_fraction"
    ),
    "between 0 and 255": "data.*.ignore_index",
}


def check_combinations(
    config: Config, classes: dict[str, Any], formats: dict[str, Any], world_size: int, fail: Fail
) -> None:
    """Everything that keys and types alone do not say.

    classes: the head class of each entry of `config.heads`; formats: the `Format` of each entry of `config.data`.
    """
    _check_ranges(config, fail)
    _check_names(config, fail)
    for name, source in config.data.items():
        _check_source(source, formats[name], f"data.{name}", fail)
    _check_heads(config, classes, formats, fail)
    _check_head_numbers(config, fail)
    _check_norms(config.backbone, "backbone", config.backbone.weights is None and config.init_from is None, fail)
    _check_norms(config.neck, "neck", config.init_from is None, fail)
    _check_length(config, fail)
    _check_freeze(config, fail)
    _check_optimizer(config, fail)
    _check_batch(config, world_size, fail)
    _check_evaluation(config, fail)


def _check_ranges(config: Config, fail: Fail) -> None:
    for rule, patterns in _RANGES.items():
        for pattern in patterns.split():
            for at, value in _select(config, pattern.split(".")):
                if isinstance(value, int | float) and not _RULES[rule](value):
                    hint = "; to stop a part, freeze it" if at.startswith("optimizer.lr_mult") else ""
                    fail(at, f"is {show(value)}, must be {rule}{hint}")


def _select(node: Any, keys: list[str], at: str = "") -> Iterator[tuple[str, Any]]:
    """The key path and value of every number below `node` that `keys` (`*`: any) leads to."""
    if node is None:
        return
    if not keys:
        yield at, node
    elif keys[0] != "*":
        yield from _select(getattr(node, keys[0], None), keys[1:], join(at, keys[0]))
    elif isinstance(node, dict):
        for name, item in node.items():
            yield from _select(item, keys[1:], join(at, name))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _select(item, keys[1:], f"{at}[{index}]")


def _check_names(config: Config, fail: Fail) -> None:
    for section, entries in (("data", config.data), ("heads", config.heads)):
        if not entries:
            fail(section, "is empty, must name at least one entry")
    for name in config.data:
        if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
            fail(f"data.{name}", "is not a valid name: letters, digits, _ and - only, not starting with a digit")
    for name in config.heads:
        if not name.isidentifier():
            fail(f"heads.{name}", "is not a valid name: letters, digits and _ only, not starting with a digit")
        if hasattr(nn.ModuleDict(), name):
            fail(f"heads.{name}", f"is not a valid name: {name!r} is taken by torch.nn.ModuleDict; choose another")


def _check_source(source: DataConfig, data_format: Any, at: str, fail: Fail) -> None:
    short_long = source.image_size
    if len(short_long) != 2 or short_long[0] > short_long[1]:
        fail(f"{at}.image_size", f"is {show(short_long)}, must be [short side, longest side] with short <= longest")
    for name, split in (("train", source.train), ("val", source.val)):
        if split is not None:
            _check_split(split, source.format, f"{at}.{name}", fail, generated=data_format.generated)
    named = isinstance(source.classes, list) and all(isinstance(c, str) for c in source.classes)
    if not (source.classes is None or isinstance(source.classes, str) or named) or source.classes in ([], ""):
        fail(f"{at}.classes", f"is {show(source.classes)}, must be a list of names, a names file or null")
    if isinstance(source.classes, list) and len(set(source.classes)) < len(source.classes):
        fail(f"{at}.classes", f"is {show(source.classes)}, must not name a class twice")
    if source.classes is None and data_format.classes_from == "config":
        fail(f"{at}.classes", f"is null, must be a list of names or a names file for format {source.format}")
    augment = source.augment
    transforms = isinstance(augment, list) and all(
        isinstance(t, dict) and isinstance(t.get("type"), str) for t in augment
    )
    if augment not in ("default", "none") and not transforms:
        what = "default, none or a list of {type: Name, …its arguments}"
        fail(f"{at}.augment", f"is {show(augment)}, must be {what}")


def _check_split(split: SplitConfig, name: str, at: str, fail: Fail, *, generated: bool) -> None:
    for key in ("images", "annotations"):
        if not generated and not getattr(split, key):
            fail(f"{at}.{key}", f"is missing, must be given for format {name}")
    if generated and split.annotations is not None:
        fail(f"{at}.annotations", f"is {show(split.annotations)}, but format {name} generates them; leave it out")
    if not generated and split.size is not None:
        fail(f"{at}.size", f"is {show(split.size)}, but format {name} generates no images; leave it out")


def _check_heads(config: Config, classes: dict[str, Any], formats: dict[str, Any], fail: Fail) -> None:
    for name, head in config.heads.items():
        at = f"heads.{name}.data"
        if name in config.inherited_heads:  # kept, not trained: its data may be elsewhere
            continue
        if head.data not in config.data:
            fail(at, f"is {show(head.data)}, must be one of {', '.join(config.data)}{nearest(head.data, config.data)}")
        needs, gives = classes[name].needs, formats[head.data].gives
        if needs not in gives:
            source = f"{show(head.data)} of format {config.data[head.data].format}, which gives {', '.join(gives)}"
            fail(at, f"is {source}, but type {head.type} needs {needs}; name other data")
    for index, name in enumerate(config.inherited_heads):
        if name not in config.heads:
            fail(f"inherited_heads[{index}]", f"is {show(name)}, must be one of {', '.join(config.heads)}")


def _check_head_numbers(config: Config, fail: Fail) -> None:
    """What the ranges of single numbers do not say, for the heads that have these keys."""
    for name, head in config.heads.items():
        for key in ("mask_channels", "keypoint_channels", "anchor_ratios", "anchor_sizes"):
            numbers = getattr(head, key, None)
            if isinstance(numbers, list) and (not numbers or [] in numbers):
                fail(f"heads.{name}.{key}", f"is {show(numbers)}, must not be empty")
        weights = getattr(head, "box_delta_weights", None)
        if weights is not None and len(weights) != 4:
            fail(f"heads.{name}.box_delta_weights", f"is {show(weights)}, must be four numbers")
        for stage in ("", "box_", "rpn_"):
            low, high = (getattr(head, f"{stage}{kind}_iou", None) for kind in ("background", "foreground"))
            if low is not None and high is not None and low > high:
                fail(f"heads.{name}.{stage}background_iou", f"is {low}, must be at most {stage}foreground_iou {high}")


def _check_norms(part: BackboneConfig | NeckConfig, at: str, random: bool, fail: Fail) -> None:
    norm = None if isinstance(part, NeckConfig) and part.type == "none" else part.norm
    if part.norm_eval and norm in ("gn", None):
        fail(f"{at}.norm_eval", f"is true, but norm {show(norm)} has no running statistics; leave it out")
    if not random or part.allow_random:
        return
    source = "backbone.weights or init_from" if at == "backbone" else "init_from"
    for key, stops in (("norm", norm == "frozen_bn"), ("norm_eval", part.norm_eval)):
        if stops:
            reason = "on random weights this is no normalisation at all (mean 0, variance 1 forever)"
            fail(f"{at}.{key}", f"is {show(getattr(part, key))}, but {reason}; give {source}, or set {at}.allow_random")


def _check_length(config: Config, fail: Fail) -> None:
    steps, epochs = config.train.steps, config.train.epochs
    if (steps is None) == (epochs is None):
        both = "and train.epochs are both given" if steps else "is missing, and so is train.epochs"
        fail("train.steps", f"{both}; give one of them")
    if config.freeze and config.phases:
        fail("freeze", "and phases are both given; write freeze inside each phase")
    for index, phase in enumerate(config.phases[:-1]):
        if phase.steps is None:
            fail(f"phases[{index}].steps", "is missing; only the last phase may leave it out")
    lengths = [phase.steps for phase in config.phases if phase.steps is not None]
    if steps is None or not config.phases:
        return
    is_open = len(lengths) < len(config.phases)
    if (sum(lengths) >= steps) if is_open else (sum(lengths) != steps):
        must = f"less than train.steps {steps}" if is_open else f"train.steps {steps} (or the last leave out steps)"
        fail("phases", f"are {sum(lengths)} steps long{' before the last' * is_open}, must be {must}")


def _check_freeze(config: Config, fail: Fail) -> None:
    lists = [("freeze", config.freeze), *((f"phases[{i}].freeze", p.freeze) for i, p in enumerate(config.phases))]
    for at, names in lists:
        for index, name in enumerate(names):
            _check_part(name, config, f"{at}[{index}]", fail)
    cache = config.train.cache_features
    if cache in ("memory", "disk") and not any(n.startswith("backbone") for _, names in lists for n in names):
        fail("train.cache_features", f"is {cache}, but no part of the backbone is frozen; freeze it, or write off")


def _check_part(name: str, config: Config, at: str, fail: Fail) -> None:
    """`backbone…`, `neck…` or `heads.<name>…`; the rest can only be checked against the built model."""
    first, _, rest = name.partition(".")
    if first == "heads" and rest:
        head = rest.partition(".")[0]
        if head not in config.heads:
            fail(at, f"is {show(name)}, but the heads are {', '.join(config.heads)}{nearest(head, config.heads)}")
    elif first not in ("backbone", "neck", "heads"):
        near = nearest(first, ("backbone", "neck", "heads"))
        fail(at, f"is {show(name)}, must start with backbone, neck or heads.<name>{near}")


def _check_optimizer(config: Config, fail: Fail) -> None:
    for name in config.optimizer.lr_mult:
        _check_part(name, config, f"optimizer.lr_mult.{name}", fail)
    if len(config.optimizer.betas) != 2:
        fail("optimizer.betas", f"is {show(config.optimizer.betas)}, must be two numbers")
    milestones, steps = config.schedule.milestones, config.train.steps
    if any(a >= b for a, b in itertools.pairwise(milestones)):
        fail("schedule.milestones", f"is {show(milestones)}, must be ascending")
    if steps is not None:
        check_schedule(config.schedule, steps, f"train.steps {steps}", fail)


def check_schedule(schedule: ScheduleConfig, steps: int, length: str, fail: Fail) -> None:
    """Everything of the schedule must be over before the run is; `length` says where its `steps` come from."""
    if schedule.type == "multistep" and schedule.milestones and schedule.milestones[-1] >= steps:
        fail("schedule.milestones", f"is {show(schedule.milestones)}, must be below {length}")
    if schedule.warmup_steps >= steps and schedule.warmup_steps:
        fail("schedule.warmup_steps", f"is {schedule.warmup_steps}, must be below {length}")


def _check_batch(config: Config, world_size: int, fail: Fail) -> None:
    size, parts = config.train.batch_size, config.train.accumulate * world_size
    if size % parts:
        low, high = size // parts * parts, (size // parts + 1) * parts
        near = " or ".join(str(n) for n in (low, high) if n)
        why = f"train.accumulate {config.train.accumulate} x {world_size} processes"
        fail("train.batch_size", f"is {size}, must be divisible by {why}: {near}")


def _check_evaluation(config: Config, fail: Fail) -> None:
    if config.ema is None and config.eval.weights in ("ema", "both"):
        fail("eval.weights", f"is {config.eval.weights}, but ema is null; write model, or give ema")
    best = config.eval.best
    if best is None:
        return
    head, _, metric = best.partition("/")
    if head not in config.heads or not metric:
        heads = ", ".join(config.heads)
        fail(
            "eval.best", f"is {show(best)}, must be <head>/<metric> with a head of {heads}{nearest(head, config.heads)}"
        )
    source = config.data.get(config.heads[head].data)
    if source is None or source.val is None:
        fail("eval.best", f"is {show(best)}, but data.{config.heads[head].data} has no val split")
