"""Plain containers → `Config`: keys, types and ranges of all sections, each head's own among them; then combinations.

pydantic validates. All mistakes become one UserError of one line: where each was written, the key, the value, what is
valid.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detbb.config.checks import check_combinations
from detbb.config.loading import Sources, config_to_dict, override_layer, resolve
from detbb.config.messages import problems_of, show, unusable
from detbb.config.schema import Config, Section
from detbb.core.errors import UserError
from detbb.data.formats import find_format
from detbb.heads import find_head
from detbb.modeling.backbones import find_backbone


def load_config(
    source: str | Path | dict[str, Any] | Config, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Config:
    """The checked configuration of a YAML file, a dict or a Config, and `key=value` overrides.

        config = detbb.load_config("configs/shapes_fcos.yaml", ["train.steps=100"])

    `heads` holds each head's own section. `base: other.yaml` names a parent (relative to the file that says so), which
    may have one itself. `${oc.env:NAME,default}` and `${other.key}` are resolved; a variable that looks like a secret
    is refused, since the result is stored.
    world_size: processes that the batch size must divide among; None: torchrun's `WORLD_SIZE`.

    Raises: UserError: one line with all mistakes.
    """
    sources = Sources.read(source, overrides)
    values, problems = resolve(sources.merged_onto(config_to_dict(Config())))  # so that ${…} reaches defaults too
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1  # as distributed.processes
    return _build(values, problems, sources, world_size=world_size)


def config_from_dict(values: dict[str, Any], origin: str, *, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of plain containers (a checkpoint's); `origin` says in errors where they come from.

    Nothing is resolved: a stored configuration reads no environment, and imports no code. Raises: UserError.
    """
    sources = Sources([(origin, {})], [override_layer(text) for text in overrides])
    return _build(sources.merged_onto(copy.deepcopy(values)), {}, sources, may_import=False)


def _build(
    values: dict[str, Any],
    problems: dict[str, str],
    sources: Sources,
    *,
    world_size: int = 1,
    may_import: bool = True,
) -> Config:
    """The Config of `values`. problems: what is known to be wrong already, by key path."""
    for at, message in unusable(values):
        problems.setdefault(at, message)
    classes, heads, formats = {}, {}, {}
    for name, source in _entries(values, "data"):
        written = source.get("format", "coco") if isinstance(source, dict) else "coco"
        try:
            formats[name] = find_format(str(written), may_import=may_import)
        except UserError as error:
            problems.setdefault(f"data.{name}.format", str(error))
    for name, head in _entries(values, "heads"):
        at = f"heads.{name}"
        if not isinstance(head, dict) or not isinstance(head.get("type"), str):
            problems.setdefault(at, f"is {show(head)}, must be a section with `type` and `data`")
            continue
        try:
            classes[name] = find_head(head["type"], may_import=may_import)
            heads[name] = _validated(classes[name].Config, head, at, problems)
        except UserError as error:
            problems.setdefault(f"{at}.type", str(error))
    backbone = values.get("backbone")
    if isinstance(backbone, dict) and isinstance(arch := backbone.get("arch"), str):
        try:
            find_backbone(arch, may_import=may_import)
        except UserError as error:
            problems.setdefault("backbone.arch", str(error).removeprefix("backbone.arch").lstrip(": "))
    config = _validated(Config, values, "", problems)
    if config is None or problems:
        raise sources.error(problems.items())
    config.heads = heads
    config.eval.weights = config.eval.weights or ("ema" if config.ema else "model")
    if config.checkpoint.every is None:
        config.checkpoint.every = config.eval.every
    if found := list(check_combinations(config, classes, formats, world_size)):
        raise sources.error(found)
    return config


def _entries(values: dict[str, Any], section: str) -> list[tuple[str, Any]]:
    """Name and content of each entry of `data` or `heads`."""
    return [*values[section].items()] if isinstance(values.get(section), dict) else []


def _validated(section: type[Section], values: dict[str, Any], at: str, problems: dict[str, str]) -> Any:
    """The values as a section, or None and more `problems`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        for key, message in problems_of(error, section, at):
            problems.setdefault(key, message)
    return None
