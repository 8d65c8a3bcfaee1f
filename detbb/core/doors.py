"""What a name in the configuration stands for: an entry of a plain dict, or `package.module:Name` from outside."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

from detbb.core.errors import UserError, unknown_name

T = TypeVar("T")


def subclass_of(base: type) -> Callable[[object], bool]:
    """A `check` for `lookup`."""
    return lambda found: isinstance(found, type) and issubclass(found, base)


def lookup(
    known: Mapping[str, T], name: str, *, key: str, check: Callable[[object], bool], what: str, may_import: bool = True
) -> T:
    """What `name` stands for: an entry of `known`, or the attribute of a module that `package.module:Name` imports.

    key: where the name was given, as errors say it. check: whether what a module holds is a `what`, such as
    "subclass of detbb.Head". may_import: False for a name from a file that may be anybody's, see `refuse_import`.
    Raises: UserError: nothing of that name, or it is something else.
    """
    if name in known:
        return known[name]
    if not may_import:
        refuse_import(name, key=key)
    module_name, outside, attribute = name.partition(":")
    if not outside:
        raise unknown_name(key, name, [*known, "package.module:Name"])
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # whatever the user's module raises, and what `importlib` says of a relative name
        raise UserError(
            f"{key} {name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); is it installed or on "
            "PYTHONPATH?"
        ) from error
    if not check(found):
        raise UserError(f"{key} {name!r}: {attribute!r} of {module_name!r} is no {what}")
    return cast(T, found)


def refuse_import(name: str, *, key: str) -> None:
    """For a name that comes from a file that may be anybody's: raise UserError if `lookup` would import its module."""
    module_name, outside, _ = name.partition(":")
    if outside and module_name not in sys.modules:
        raise UserError(
            f"{key} {name!r}: {module_name!r} is not imported, and a file must not choose what code runs; "
            f"if it is yours, add --import {module_name} (in Python: import {module_name})"
        )
