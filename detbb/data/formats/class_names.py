"""The class list of formats whose annotations hold only numbers, and the names of their keypoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detbb.core.errors import UserError, one_line
from detbb.data.formats.coco import flip_pairs
from detbb.data.images import read_text


class Keypoints(NamedTuple):
    names: tuple[str, ...]
    flip_pairs: tuple[tuple[int, int], ...]  # that change places when the image is mirrored


def read_classes(value: Any) -> dict[int, str]:
    """Number -> name, in the order of the numbers.

    `value` is a list of names (0, 1, …), or a file: JSON or YAML with a list, a mapping of numbers to names, or either
    below `names` (as in YOLO's data files); or text with one name a line.
    """
    origin, value = _content(value)
    if isinstance(value, dict) and "names" in value:
        value = value["names"]
    if isinstance(value, list):
        value = dict(enumerate(value))
    try:
        names = {int(number): name for number, name in value.items()} if isinstance(value, dict) else {}
    except (TypeError, ValueError):
        names = {}
    if not names or not all(isinstance(n, str) and n for n in names.values()):
        raise UserError(f"{origin}: needs a list of class names, or a mapping of numbers to names, in `classes`")
    if len(set(names.values())) < len(value) or min(names) < 0:
        raise UserError(f"{origin}: class names must differ, and their numbers must not be negative")
    return dict(sorted(names.items()))


def read_keypoints(names: list[str] | None, classes: Any) -> Keypoints | None:
    """The keypoints that a source names: those of `keypoints`, or of `kpt_shape` in the file of `classes` (as in YOLO's
    data files, with `flip_idx` and `kpt_names`). None: it says nothing about any."""
    if names is not None:
        return Keypoints(tuple(names), flip_pairs(names))
    origin, content = _content(classes)
    if not isinstance(content, dict) or "kpt_shape" not in content:
        return None
    shape, flips, named = (content.get(key) for key in ("kpt_shape", "flip_idx", "kpt_names"))
    if not (isinstance(shape, list) and shape and type(shape[0]) is int and 1 <= shape[0] <= 1000):
        raise UserError(f"{origin}: kpt_shape is {shape!r}, must be [number of keypoints, 2 or 3]")
    first = next(iter(named.values()), None) if isinstance(named, dict) else named
    points = first if isinstance(first, list) and len(first) == shape[0] else range(shape[0])
    found = tuple(str(name) for name in points)
    if flips is None:
        return Keypoints(found, flip_pairs(found))
    if not isinstance(flips, list) or sorted(flips, key=repr) != sorted(range(shape[0]), key=repr):
        raise UserError(f"{origin}: flip_idx is {flips!r}, must be the numbers 0 … {shape[0] - 1} in another order")
    return Keypoints(found, tuple((i, k) for i, k in enumerate(flips) if i < k))


def _content(value: Any) -> tuple[str, Any]:
    """Where class names come from, and what is there."""
    if not isinstance(value, str):
        return "classes", value
    path = Path(value)
    text = read_text(path)
    try:
        structured = path.suffix.lower() in (".json", ".yaml", ".yml")  # JSON is YAML
        return value, yaml.safe_load(text) if structured else [s for line in text.splitlines() if (s := line.strip())]
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise UserError(f"{value}: class names cannot be read: {one_line(e)}") from None
