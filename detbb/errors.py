"""The errors that a command turns into one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user gave cannot work: what is wrong, the value, what is valid, where. Commands exit with 2."""


class Stopped(Exception):
    """A signal asked the run to end, and a checkpoint is safe on disk. Commands exit with `128 + signal`."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def unknown_name(where: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is none of the valid ones: lists them, and says the nearest."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"{where}: {name!r} is not known; valid are {', '.join(valid)}{hint}")
