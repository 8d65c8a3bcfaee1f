"""Configurations whose branches have their own heads' keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detbb.config import loading
from detbb.config.schema import Config
from detbb.data.formats import find_format, known_format
from detbb.heads import find_head, known_head


def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Config:
    """The checked configuration of a YAML file and `key=value` overrides; `heads` holds each head's own section.

    The file may name one parent, `base: other.yaml` (relative to it), which has none itself. `${oc.env:NAME,default}`
    and `${other.key}` are resolved; a variable that looks like a secret is refused, since the result is stored.
    world_size: processes that the batch size must divide among; None: torchrun's `WORLD_SIZE`.

    Raises: UserError: one line.
    """
    return loading.load_config(path, overrides, find_head=find_head, find_format=find_format, world_size=world_size)


def config_from_dict(values: dict[str, Any], origin: str, *, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of plain containers (a checkpoint's); `origin` says in errors where they come from.

    Nothing is resolved: a stored configuration reads no environment, and imports no head. Raises: UserError.
    """
    return loading.config_from_dict(values, origin, find_head=known_head, find_format=known_format, overrides=overrides)
