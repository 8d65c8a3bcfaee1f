"""Keys and types: whether plain containers fit a dataclass, with the key path of what does not."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from detbb.core.errors import nearest

Fail = Callable[[str, str], NoReturn]  # (key path, message)

_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text (quote it)"}


def check_section(section: type, values: Any, at: str, fail: Fail) -> None:
    """`values` must be a mapping with the fields of the dataclass `section`, of their types, with none missing."""
    hints = get_type_hints(section)
    names = [f.name for f in dataclasses.fields(section)]
    if not isinstance(values, dict):
        fail(at, f"is {show(values)}, must be a section with keys among {', '.join(names)}")
    for key in values:
        if key not in names:
            fail(join(at, key), f"is not a key of {at or 'the config'}{nearest(key, names)}; valid: {', '.join(names)}")
    for f in dataclasses.fields(section):
        if f.name in values:
            check_value(hints[f.name], values[f.name], join(at, f.name), fail)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            fail(join(at, f.name), "is missing")


def check_value(hint: Any, value: Any, at: str, fail: Fail) -> None:
    """`value` must be of the type that the annotation `hint` names."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        _check_union(choices, value, at, fail)
    elif hint is Any:
        _check_data(value, at, fail)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        check_section(hint, value, at, fail)
    elif origin is Literal:
        if value not in choices or isinstance(value, bool):
            words = ", ".join(str(c) for c in choices)
            fail(at, f"is {show(value)}, must be one of {words}{nearest(value, choices)}")
    elif origin is dict:
        if not isinstance(value, dict):
            fail(at, f"is {show(value)}, must be a section of name: value")
        for key, item in value.items():
            _check_key(key, at, fail)
            check_value(choices[1], item, join(at, key), fail)
    elif origin in (list, tuple):
        if not isinstance(value, list | tuple):
            fail(at, f"is {show(value)}, must be a list")
        for index, item in enumerate(value):
            check_value(choices[0], item, f"{at}[{index}]", fail)
    else:
        _check_scalar(hint, value, at, fail)


def _check_union(choices: tuple, value: Any, at: str, fail: Fail) -> None:
    if value is None and type(None) in choices:
        return
    others = [c for c in choices if c is not type(None)]
    if len(others) > 1:
        others = [c for c in others if isinstance(c, type) and isinstance(value, c)] or others
    check_value(others[0], value, at, fail)


def _check_scalar(hint: type, value: Any, at: str, fail: Fail) -> None:
    if type(value) is int and abs(value) >= 2**63:
        fail(at, f"is {show(value)}, must fit into 64 bits")
    accepted = (int, float) if hint is float else (hint,)
    if type(value) not in accepted or (hint is float and not math.isfinite(value)):
        fail(at, f"is {show(value)}, must be {_WORDS.get(hint, hint.__name__)}")
    if isinstance(value, str) and ("${" in value or value == "???"):
        fail(at, f"is {show(value)}, which is not resolved")


def _check_data(value: Any, at: str, fail: Fail) -> None:
    """Any plain data."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_key(key, at, fail)
            _check_data(item, join(at, key), fail)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_data(item, f"{at}[{index}]", fail)
    elif type(value) in _WORDS:
        _check_scalar(type(value), value, at, fail)
    elif value is not None:
        fail(at, f"is {show(value)}, must be plain data")


def _check_key(key: Any, at: str, fail: Fail) -> None:
    if not isinstance(key, str):
        fail(at, f"has the key {show(key)}, must have words as keys")


def join(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)


def show(value: Any) -> str:
    """The value as it would be written, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
