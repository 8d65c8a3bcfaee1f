"""Whether a phase can cache features, where, and under which name."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from detbb.config.phases import Phase
from detbb.config.schema import Config
from detbb.core import cache
from detbb.core.errors import UserError
from detbb.data.feature_store import Plan, Store, open_folder
from detbb.data.sample import SampleReader
from detbb.detector import Detector
from detbb.distributed.collectives import raise_on_all_ranks
from detbb.feature_cache.cache import FeatureCache
from detbb.feature_cache.frozen_prefix import FrozenPrefix, last_frozen
from detbb.freeze import digests
from detbb.heads import find_head
from detbb.modeling.neck import Fpn
from detbb.structures.annotations import Annotations
from detbb.structures.batch import round_up

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_VERSIONS = ("torch", "torchvision", "numpy", "cv2", "albumentations", "PIL")


class Unusable(Exception):
    """Why features cannot be cached, as the end of a sentence."""


def check(config: Config, detector: Detector, phases: Sequence[Phase], data: Mapping[str, Annotations]) -> None:
    """Refuse `memory` and `disk` where no phase freezes the whole backbone, or one that does cannot be cached."""
    wanted = config.train.cache_features
    if wanted not in ("memory", "disk"):
        return
    with raise_on_all_ranks():
        cached = [phase for phase in phases if _backbone_is_frozen(detector, phase.freeze)]
        for phase in cached:
            try:
                _check_room(config, [plan for plan, _ in _plans(config, detector, data, phase.freeze).values()])
            except Unusable as reason:
                raise UserError(f"train.cache_features: {wanted!r}, but {reason}") from None
        if not cached:
            raise UserError(
                f"train.cache_features: {wanted!r}, but no phase freezes the whole backbone; "
                "valid here are off and auto"
            )


def with_cache(
    prefix: FrozenPrefix | None, config: Config, detector: Detector, *, data: Mapping[str, Annotations], steps: int
) -> tuple[FrozenPrefix | FeatureCache | None, list[str]]:
    """The prefix, in a feature cache where the phase of `steps` steps allows it, and lines for the log.

    Raises: UserError: `memory` or `disk` cannot be had any more.
    """
    wanted = config.train.cache_features
    if wanted == "off":
        return prefix, []
    if prefix is None or not _backbone_is_frozen(detector, detector.frozen):
        return prefix, ["feature cache: not used in this phase, where the backbone is not frozen as a whole"]
    root, stores = _root(config), {}
    with raise_on_all_ranks():
        try:
            found = _plans(config, detector, data, detector.frozen)
            plans = {source: plan for source, (plan, _) in found.items()}
            names = {}
            if wanted != "memory":
                names = {s: _about(config, detector, s, plan, reader) for s, (plan, reader) in found.items()}
            if not names or not all((root / cache.key(about)).exists() for about in names.values()):
                _check_room(config, list(plans.values()))
                if wanted == "auto":
                    _check_pays(config, plans, steps)
            for source, plan in plans.items():
                stores[source] = Store(plan, None if wanted == "memory" else open_folder(root, names[source], plan))
        except Unusable as reason:
            if wanted != "auto":
                raise UserError(f"train.cache_features: {wanted!r}, but {reason}") from None
            return prefix, [f"train.cache_features auto: not used, because {reason}"]
    where = "in memory" if wanted == "memory" else f"in {root}"
    return FeatureCache(prefix, stores), [_line(source, store, where) for source, store in stores.items()]


def _backbone_is_frozen(detector: Detector, frozen: Sequence[str]) -> bool:
    return last_frozen(detector, frozen) in (detector.backbone.stages[-1], "neck")


def _plans(
    config: Config, detector: Detector, data: Mapping[str, Annotations], frozen: Sequence[str]
) -> dict[str, tuple[Plan, SampleReader]]:
    """The plan and the reader of each source that a head learns from while `frozen` is frozen. Raises: Unusable."""
    sources = dict.fromkeys(detector.sources[name] for name in detector.active_heads(frozen=frozen))
    return {source: _plan(config, detector, frozen, source=source, annotations=data[source]) for source in sources}


def _plan(
    config: Config, detector: Detector, frozen: Sequence[str], *, source: str, annotations: Annotations
) -> tuple[Plan, SampleReader]:
    reader = SampleReader(annotations, config.data[source], train=True, seed=config.seed)
    if reader.transform.changes_size:
        raise Unusable(f"data.{source}.augment may change the size of images")
    variants = reader.variants()
    if variants is None:
        raise Unusable(
            f"data.{source}.augment makes a new image every epoch, so nothing can be reused; "
            f"set data.{source}.views (4, for example), or use flips only"
        )
    shapes = np.unique(annotations.sizes, axis=0).tolist()
    sizes = {tuple(map(round_up, reader.transform.size((h, w)))) for h, w in shapes}
    if config.data[source].pad == "batch" and (len(sizes) > 1 or reader.transform.draws_size):
        raise Unusable(f"images are padded to different sizes; say data.{source}.pad: source")
    height, width = map(round_up, reader.largest())
    backbone, neck = detector.backbone, cast(Fpn, detector.neck)
    names: list[str] = list(backbone.out)
    if last_frozen(detector, frozen) == "neck":
        heads = [config.heads[name] for name in detector.active_heads(source, frozen=frozen)]
        read = {level for head in heads for level in find_head(head.type).levels(head)}
        names = [name for name in neck.channels if name in read]
    offered, strides = neck.channels | backbone.channels, neck.strides | backbone.strides
    levels = {n: (-(-height // strides[n]), -(-width // strides[n]), offered[n]) for n in names}
    dtype = DTYPES["fp64" if config.train.precision == "fp64" else config.train.cache_dtype]
    return Plan(len(annotations), variants, (height, width), levels, dtype), reader


def _check_room(config: Config, plans: Sequence[Plan]) -> None:
    """Raise Unusable if features would take more than `train.cache_limit_gb`, or than is free where they would be."""
    needed, limit = sum(plan.bytes for plan in plans), config.train.cache_limit_gb
    text = f"the features take up to {needed / 1e9:.3g} GB"
    if needed > limit * 1e9:
        raise Unusable(f"{text}, more than train.cache_limit_gb {limit:g}")
    root, processes = _root(config).absolute(), 1
    if config.train.cache_features == "memory":
        root, processes = Path(tempfile.gettempdir()), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free // processes
    if needed > free:
        raise Unusable(f"{text}, and {free / 1e9:.3g} GB are free for each process in {root}")


def _check_pays(config: Config, plans: Mapping[str, Plan], steps: int) -> None:
    """Raise Unusable if the phase is too short for most features to be read again after they were computed."""
    weights = {source: config.data[source].weight for source in plans}
    for source, plan in plans.items():
        passes = steps * config.train.batch_size * weights[source] / sum(weights.values()) / plan.images
        if passes < 1.25 * plan.variants:
            raise Unusable(
                f"this phase is {passes:.3g} passes over data.{source} long, with {plan.variants} views an image"
            )


def _root(config: Config) -> Path:
    return Path(config.train.cache_dir or Path(config.output_dir).parent) / "feature_cache"


def _about(config: Config, detector: Detector, source: str, plan: Plan, reader: SampleReader) -> str:
    """Everything that a source's features depend on besides the bytes of its images, as JSON. Raises: Unusable."""
    last, data, train = last_frozen(detector), config.data[source], config.train
    state = detector.state_dict() | dict(detector.named_buffers())  # which has the non-persistent ones too
    parts = {"backbone": detector.backbone} | ({"neck": detector.neck} if last == "neck" else {})
    names = [name for name in state if name.startswith(tuple(f"{part}." for part in parts))]
    augmented: dict[str, Any] = {"image_size": list(data.image_size), "augment": data.augment}
    if not reader.transform.only_flips:
        augmented |= {"views": data.views, "seed": config.seed}
    annotations = reader.annotations
    about = {
        "format": 2,
        "frozen": cache.key(digests(state, names)),
        "modules": cache.key(*parts.values()),
        "attributes": [[*map(_attributes, part.modules())] for part in parts.values()],
        "code": [cache.code_digest(), *_foreign_code(parts.values())],
        "input": [detector.pixel_mean.flatten().tolist(), detector.pixel_std.flatten().tolist(), plan.hw],
        "after": last,
        "levels": plan.levels,
        "stored as": str(plan.dtype),
        "computed": [train.precision, train.fold_frozen, train.compile, detector.pixel_mean.device.type],
        "augment": augmented,
        "images": cache.key([*annotations.file_names], annotations.sizes, annotations.image_ids),
        "versions": {name: getattr(importlib.import_module(name), "__version__", "") for name in _VERSIONS},
    }
    return json.dumps(about, sort_keys=True, default=str)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module's own code may read besides tensors and modules: plain values by name."""
    plain = bool | int | float | str | tuple | list | None
    return {n: v for n, v in vars(module).items() if n[0] != "_" and n != "training" and isinstance(v, plain)}


def _foreign_code(parts: Iterable[nn.Module]) -> list[str]:
    """Digests of the files whose classes compute features, of others than this package and torch. Raises: Unusable."""
    classes = {base for part in parts for module in part.modules() for base in type(module).__mro__}
    files = set()
    for base in classes:
        if base.__module__.partition(".")[0] not in ("detbb", "torch", "torchvision", "builtins", "typing"):
            try:
                files.add(Path(inspect.getfile(base)).read_bytes())
            except (TypeError, OSError):
                raise Unusable(f"the code of {base.__qualname__} is in no file, so a change would not show") from None
    return sorted(cache.key(content) for content in files)


def _line(source: str, store: Store, where: str) -> str:
    plan = store.plan
    views = (
        f"{plan.images} images x {plan.variants} views, {' '.join(plan.levels)} of {plan.hw[1]} x {plan.hw[0]} pixels"
    )
    share = 100 * store.filled // max(plan.slots, 1)
    kind = str(plan.dtype).removeprefix("torch.")
    return f"feature cache of data.{source}: {views}, {kind}: up to {plan.bytes / 1e9:.3g} GB {where}, {share} % stored"
