"""Configurations whose branches have their own heads' keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detbb.config import loading
from detbb.config.schema import Config
from detbb.core.doors import refuse_import
from detbb.data.formats import find_format, known_format
from detbb.heads import find_head, known_head


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
    return loading.load_config(source, overrides, find_head=find_head, find_format=find_format, world_size=world_size)


def config_from_dict(values: dict[str, Any], origin: str, *, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of plain containers (a checkpoint's); `origin` says in errors where they come from.

    Nothing is resolved: a stored configuration reads no environment, and imports no code. Raises: UserError.
    """
    config = loading.config_from_dict(
        values, origin, find_head=known_head, find_format=known_format, overrides=overrides
    )
    refuse_import(config.backbone.arch, key=f"backbone.arch of {origin}")
    return config
