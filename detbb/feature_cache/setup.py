"""Whether a phase can cache features, where, and under which name."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.data.sample import SampleReader
from detbb.detector import Detector
from detbb.distributed.collectives import raise_on_all_ranks
from detbb.feature_cache.cache import DTYPES, FeatureCache, Plan, Store, folder_name, open_folder
from detbb.feature_cache.frozen_prefix import FrozenPrefix, last_frozen
from detbb.freeze import digests
from detbb.heads import find_head
from detbb.modeling.neck import Fpn
from detbb.structures.batch import BATCH_STRIDE

if TYPE_CHECKING:
    from detbb.config.phases import Phase
    from detbb.structures.annotations import Annotations

_VERSIONS = ("torch", "torchvision", "numpy", "cv2", "albumentations", "PIL", "detbb")


class Unusable(Exception):
    """Why features cannot be cached, as the end of a sentence."""


def check(config: Config, detector: Detector, phases: Sequence[Phase], data: Mapping[str, Annotations]) -> None:
    """Raise UserError if `train.cache_features` is `memory` or `disk` and no phase, or not every such phase, allows it.

    Leaves `detector` frozen as in the last phase.
    """
    if config.train.cache_features in ("memory", "disk"):
        with raise_on_all_ranks():
            _check(config, detector, phases, data)


def _check(config: Config, detector: Detector, phases: Sequence[Phase], data: Mapping[str, Annotations]) -> None:
    cached = False
    for phase in phases:
        detector.freeze(phase.freeze)
        try:
            if _backbone_is_frozen(detector):
                _place(config, {s: _plan(config, detector, s, data[s])[0] for s in _sources(detector)})
                cached = True
        except Unusable as reason:
            raise UserError(f"train.cache_features: {config.train.cache_features!r}, but {reason}") from None
    if not cached:
        raise UserError(
            f"train.cache_features: {config.train.cache_features!r}, but no phase freezes the whole backbone; "
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
    if prefix is None or not _backbone_is_frozen(detector):
        return prefix, ["feature cache: not used in this phase, where the backbone is not frozen as a whole"]
    with raise_on_all_ranks():
        try:
            found = {source: _plan(config, detector, source, data[source]) for source in _sources(detector)}
            names = {s: _about(config, detector, s, plan, reader) for s, (plan, reader) in found.items()}
            root, exists = _root(config), False
            if wanted != "memory":
                exists = all((root / folder_name(about)).exists() for about in names.values())
            plans = {source: plan for source, (plan, _) in found.items()}
            place = "disk" if exists else _place(config, plans)
            if wanted == "auto" and not exists:
                _check_pays(config, plans, steps)
            stores = {
                source: Store(plan, open_folder(root, names[source], plan) if place == "disk" else None)
                for source, plan in plans.items()
            }
        except Unusable as reason:
            if wanted != "auto":
                raise UserError(f"train.cache_features: {wanted!r}, but {reason}") from None
            return prefix, [f"train.cache_features auto: not used, because {reason}"]
    where = "in memory" if place == "memory" else f"in {root}"
    return FeatureCache(prefix, stores), [_line(source, store, where) for source, store in stores.items()]


def _backbone_is_frozen(detector: Detector) -> bool:
    return last_frozen(detector) in (detector.backbone.stages[-1], "neck")


def _sources(detector: Detector) -> list[str]:
    return list(dict.fromkeys(detector.sources[name] for name in detector.active_heads()))


def _plan(config: Config, detector: Detector, source: str, annotations: Annotations) -> tuple[Plan, SampleReader]:
    reader = SampleReader(annotations, config.data[source], train=True, seed=config.seed)
    if reader.transform.changes_size:
        raise Unusable(f"data.{source}.augment may change the size of images")
    variants = reader.variants()
    if variants is None:
        raise Unusable(
            f"data.{source}.augment makes new images every epoch; say data.{source}.views: 4, say, or flip at most"
        )
    shapes = np.unique(annotations.sizes, axis=0).tolist()
    sizes = {_padded(reader.transform.size((h, w))) for h, w in shapes}
    if config.data[source].pad == "batch" and (len(sizes) > 1 or reader.transform.draws_size):
        raise Unusable(f"images are padded to different sizes; say data.{source}.pad: source")
    hw = _padded(reader.largest())
    backbone, neck = detector.backbone, cast(Fpn, detector.neck)
    names: list[str] = list(backbone.out)
    if last_frozen(detector) == "neck":
        heads = [config.heads[name] for name in detector.active_heads(source)]
        read = {level for head in heads for level in find_head(head.type).levels(head)}
        names = [name for name in neck.channels if name in read]
    offered, strides = neck.channels | backbone.channels, neck.strides | backbone.strides
    levels = {n: (-(-hw[0] // strides[n]), -(-hw[1] // strides[n]), offered[n]) for n in names}
    dtype = DTYPES["fp64" if config.train.precision == "fp64" else config.train.cache_dtype]
    return Plan(len(annotations), variants, hw, levels, dtype), reader


def _padded(hw: tuple[int, int]) -> tuple[int, int]:
    return -(-hw[0] // BATCH_STRIDE) * BATCH_STRIDE, -(-hw[1] // BATCH_STRIDE) * BATCH_STRIDE


def _place(config: Config, plans: Mapping[str, Plan]) -> str:
    """`memory` or `disk`. Raises Unusable if neither that is allowed has room."""
    wanted, limit = config.train.cache_features, config.train.cache_limit_gb
    needed = sum(plan.bytes for plan in plans.values())
    text = f"the features take up to {needed / 1e9:.3g} GB"
    if needed > limit * 1e9:
        raise Unusable(f"{text}, more than train.cache_limit_gb {limit:g}")
    memory = _free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted in ("memory", "auto") and needed <= memory * (1.0 if wanted == "memory" else 0.5):
        return "memory"
    if wanted == "memory":
        raise Unusable(f"{text}, and {memory / 1e9:.3g} GB of memory are free for each process")
    root = _root(config).absolute()
    disk = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
    if needed > disk:
        raise Unusable(f"{text}, and {disk / 1e9:.3g} GB are free for {root}")
    return "disk"


def _check_pays(config: Config, plans: Mapping[str, Plan], steps: int) -> None:
    weights = {source: config.data[source].weight for source in plans}
    for source, plan in plans.items():
        passes = steps * config.train.batch_size * weights[source] / sum(weights.values()) / plan.images
        if passes < 1.25 * plan.variants:
            raise Unusable(
                f"this phase is {passes:.3g} passes over data.{source} long, with {plan.variants} views an image"
            )


def _free_memory() -> int:
    """Bytes that processes can still take."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if (info := Path("/proc/meminfo")).exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
        free = min(free, max(int(most) - int((group / "memory.current").read_text()), 0))
    return free


def _root(config: Config) -> Path:
    return Path(config.train.cache_dir or Path(config.output_dir).parent / "feature_cache")


def _about(config: Config, detector: Detector, source: str, plan: Plan, reader: SampleReader) -> dict[str, Any]:
    """Everything that a source's features depend on besides the bytes of its images."""
    last, data, train = last_frozen(detector), config.data[source], config.train
    state = detector.state_dict()
    parts = {"backbone": detector.backbone} | ({"neck": detector.neck} if last == "neck" else {})
    names = [name for name in state if name.startswith(tuple(f"{part}." for part in parts))]
    augmented: dict[str, Any] = {"image_size": list(data.image_size), "augment": data.augment}
    if reader.transform.flips is None or reader.transform.draws_size:
        augmented |= {"views": data.views, "seed": config.seed}
    annotations = reader.annotations
    listed = hashlib.sha256("\0".join(annotations.file_names).encode("utf-8", "surrogateescape"))
    for array in (annotations.sizes, annotations.image_ids):
        listed.update(np.ascontiguousarray(array).data)
    about = {
        "format": 1,
        "frozen": _hash(digests(state, names)),
        "modules": _hash([repr(part) for part in parts.values()]),
        "input": [detector.pixel_mean.flatten().tolist(), detector.pixel_std.flatten().tolist(), plan.hw],
        "after": last,
        "levels": plan.levels,
        "stored as": str(plan.dtype),
        "computed": [train.precision, train.fold_frozen, train.compile, detector.pixel_mean.device.type],
        "augment": augmented,
        "images": listed.hexdigest(),
        "versions": {name: getattr(importlib.import_module(name), "__version__", "") for name in _VERSIONS},
    }
    return json.loads(json.dumps(about, default=str))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _line(source: str, store: Store, where: str) -> str:
    plan = store.plan
    views = (
        f"{plan.images} images x {plan.variants} views, {' '.join(plan.levels)} of {plan.hw[1]} x {plan.hw[0]} pixels"
    )
    share = 100 * store.filled // (plan.images * plan.variants)
    kind = str(plan.dtype).removeprefix("torch.")
    return f"feature cache of data.{source}: {views}, {kind}: up to {plan.bytes / 1e9:.3g} GB {where}, {share} % stored"
