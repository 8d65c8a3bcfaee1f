"""The class list of formats whose annotations hold only numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from detbb.core.errors import UserError
from detbb.data.images import read_text


def read_classes(value: Any) -> dict[int, str]:
    """Number -> name, in the order of the numbers.

    `value` is a list of names (0, 1, …), or a file: JSON or YAML with a list, a mapping of numbers to names, or either
    below `names` (as in YOLO's data files); or text with one name a line.
    """
    origin = "classes"
    if isinstance(value, str):
        origin, path = value, Path(value)
        text = read_text(path)
        try:
            structured = path.suffix.lower() in (".json", ".yaml", ".yml")  # JSON is YAML
            value = yaml.safe_load(text) if structured else [line.strip() for line in text.splitlines() if line.strip()]
        except (yaml.YAMLError, RecursionError, ValueError) as e:
            raise UserError(f"{origin}: class names cannot be read: {' '.join(str(e).split())}") from None
        if isinstance(value, dict) and "names" in value:
            value = value["names"]
    items = (
        list(enumerate(value)) if isinstance(value, list) else list(value.items()) if isinstance(value, dict) else []
    )
    try:
        names = {int(number): name for number, name in items}
    except (TypeError, ValueError):
        names = {}
    if not names or not all(isinstance(n, str) and n for n in names.values()):
        raise UserError(f"{origin}: needs a list of class names, or a mapping of numbers to names, in `classes`")
    if len(set(names.values())) < len(items) or min(names) < 0:
        raise UserError(f"{origin}: class names must differ, and their numbers must not be negative")
    return dict(sorted(names.items()))
