"""What is wrong with a configuration, in words: the value, what is valid, the nearest key, detbb's word for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from detbb.core.errors import nearest

Problem = tuple[str, str]  # key path, and what is wrong with it

MAX_DEPTH = 30
_SCALARS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text (quote it)"}
_WORDS = {
    "bool_type": _SCALARS[bool],
    "int_type": _SCALARS[int],
    "float_type": _SCALARS[float],
    "finite_number": _SCALARS[float],
    "string_type": _SCALARS[str],
    "dict_type": "a section of name: value",
}
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
_FOREIGN = {  # what detbb says -> keys of other tools, in lower case; the last words of one are enough
    "data.<name>.image_size": "imgsz input.min_size_train input.max_size_train",
    "data.<name>.classes, or leaves it to the annotations": "num_classes nc names",
    "train.epochs": "epochs max_epochs",
    "train.steps": "max_iter max_iters",
    "train.batch_size": "batch batch_size ims_per_batch samples_per_gpu",
    "train.workers": "num_workers workers_per_gpu",
    "train.precision": "amp amp.enabled",
    "optimizer.lr": "lr lr0 base_lr learning_rate",
    "optimizer.momentum": "momentum",
    "optimizer.weight_decay": "weight_decay",
    "schedule.milestones": "solver.steps",
    "schedule.warmup_steps": "warmup_iters warmup_epochs",
    "eval.every": "eval_period val_interval",
    "checkpoint.every": "checkpoint_period save_period",
    "backbone.weights (a backbone) or init_from (a detector)": "model.weights pretrained load_from",
    "freeze: [backbone.stem, backbone.layer1] (for 2 and 1)": "freeze_at frozen_stages",
    "output_dir": "work_dir project",
    "base": "_base_",
}


def join(at: str, *keys: str | int) -> str:
    """`data.blood.image_size[0]`"""
    for key in keys:
        at = f"{at}[{key}]" if isinstance(key, int) else f"{at}.{key}" if at else key
    return at


def show(value: Any) -> str:
    """The value as it would be written, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def describe_range(node: dict[str, Any]) -> str:
    """The range of the numbers or the length of the lists that a JSON schema allows: `at least 0 and below 1`."""
    least, above = node.get("minimum"), node.get("exclusiveMinimum")
    most, below = node.get("maximum"), node.get("exclusiveMaximum")
    if node.get("type") == "integer" and above is not None:
        least, above = above + 1, None
    if least is not None and most is not None:
        return f"between {least} and {most}"
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


def node_at(schema: dict[str, Any], keys: Sequence[str | int] = ()) -> dict[str, Any]:
    """The part of a JSON schema that describes the value at `keys`, without `null` where that is allowed too."""
    node = schema
    for key in (None, *keys):
        if isinstance(key, int):
            node = node.get("items", {})
        elif key is not None:
            others = node.get("additionalProperties")
            node = node.get("properties", {}).get(key) or (others if isinstance(others, dict) else {})
        for choice in node.get("anyOf", ()):
            if choice.get("type") != "null":
                node = {**node, **choice}
                break
        if "$ref" in node:
            node = {**node, **schema["$defs"][node["$ref"].rpartition("/")[2]]}
    return node


def problems_of(error: ValidationError, section: type[BaseModel], at: str) -> Iterator[Problem]:
    """Everything that pydantic found in the `section` at key path `at`."""
    schema = section.model_json_schema()
    listed = set()  # sections whose keys were said
    for one in error.errors(include_url=False):
        keys, value = one["loc"], one["input"]
        if one["type"] == "extra_forbidden":
            foreign = list(_foreign(join(at, *keys), value))
            yield from foreign
            if not foreign:
                where, valid = join(at, *keys[:-1]), list(node_at(schema, keys[:-1])["properties"])
                near = nearest(keys[-1], valid)
                all_valid = f"; valid: {', '.join(valid)}" if where not in listed else ""
                yield join(at, *keys), f"is not a key of {where or 'the config'}{near}{all_valid}"
                listed.add(where)
        elif one["type"] == "missing":
            yield join(at, *keys), "is missing"
        elif one["type"] == "value_error":
            yield join(at, *keys), f"is {show(value)}, {one['ctx']['error']}"
        else:
            must = _must(one["type"], value, node_at(schema, keys)) or one["msg"].lower()
            yield join(at, *keys), f"is {show(value)}, must be {must}".replace("must be not", "must not be")


def _foreign(at: str, value: Any) -> Iterator[Problem]:
    """The keys at and below `at` that another tool has, each with detbb's."""
    for path in _leaves(at, value):
        for own, words in _FOREIGN.items():
            if f".{path.lower()}".endswith(tuple(f".{word}" for word in words.split())):
                yield path, f"is not a key of detbb, which says {own}"


def _leaves(at: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(join(at, key), item)
    else:
        yield at


def _must(kind: str, value: Any, node: dict[str, Any]) -> str:
    """What the value must be, as `node` of the JSON schema says; nothing if that knows no such `kind` of error."""
    if kind in _WORDS:
        return _WORDS[kind]
    if kind == "literal_error":
        choices = node.get("enum") or [node["const"]]
        return f"one of {', '.join(choices)}{nearest(value, choices)}"
    if kind == "model_type":
        return f"a section with keys among {', '.join(node['properties'])}"
    if kind == "list_type":
        scalar = type(value) in _SCALARS and node["items"].get("type") in ("string", "integer", "number")
        return f"a list, such as [{show(value).strip(chr(39))}]" if scalar else "a list"
    if kind in ("too_short", "too_long"):
        least, most = node.get("minItems", 0), node.get("maxItems")
        return f"{_COUNTS.get(least, least)} numbers" if least == most else "not empty"
    return describe_range(node)


def unusable(value: Any, at: str = "", depth: int = 0) -> Iterator[Problem]:
    """Everything in containers that is no plain data: other objects, keys that are no words, what is not resolved."""
    if isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            yield at, f"is nested deeper than {MAX_DEPTH} levels"
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                yield at, f"has the key {show(key)}, must have words as keys"
            else:
                yield from unusable(item, join(at, key), depth + 1)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        yield at, f"is {show(value)}, which is not resolved"
    elif type(value) is int and abs(value) >= 2**63:
        yield at, f"is {show(value)}, must fit into 64 bits"
    elif type(value) is float and not math.isfinite(value):
        yield at, f"is {show(value)}, must be a finite number"
    elif value is not None and type(value) not in _SCALARS:
        yield at, f"is {show(value)}, must be plain data"
