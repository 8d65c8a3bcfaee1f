"""The errors that a command turns into one line and an exit code."""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from signal import Signals

# Control characters but tab and newline, marks that reorder text or break lines, and lone surrogates.
_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """What the user gave cannot work: what is wrong, the value, what is valid, where. Commands exit with 2."""

    same_on_all_ranks = False  # True where every rank raises this error, so that rank 0 alone prints it


class RunFailed(RuntimeError):
    """A run cannot go on, and a traceback would not say more. Commands say it in one line and exit with 1."""


class ProcessLost(RunFailed):
    """Another process ended or did not answer; the message says which. The cause is in that process's own error."""


class Stopped(Exception):
    """A signal asked the run to end, and a checkpoint is safe on disk. Commands exit with `128 + signal`."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by {Signals(signal).name}")
        self.signal = signal


class StoppedWaiting(Stopped):
    """A signal asked the run to end while it waited for data that may never come."""


def tell_torchrun(error_file: str | None, text: str) -> None:
    """Make `text` what torchrun shows last, as the error of the process that was given this TORCHELASTIC_ERROR_FILE."""
    if error_file:
        details = {"py_callstack": text.strip(), "timestamp": str(int(time.time()))}
        with suppress(OSError), open(error_file, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text.strip(), "extraInfo": details}}, file)


def one_line(error: object, most: int | None = 300) -> str:
    """What an error says, without line breaks and in at most so many characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def printable(text: object) -> str:
    """`text` with control characters written out: a name from a file must not steer a terminal, nor a log's reader."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def unknown_name(where: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is none of the valid ones: lists them, and says the nearest."""
    valid = list(valid)
    return UserError(f"{where}: {name!r} is not known; valid are {', '.join(valid)}{nearest(name, valid)}")


def some(names: Collection[str], count: int = 5) -> str:
    """The first names, and how many more there are; `none` where there is none."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join([*names][:count]) or "none") + more


def nearest(word: object, names: Iterable[object]) -> str:
    """`; did you mean …?`, or nothing if no name is close."""
    near = difflib.get_close_matches(str(word), [str(name) for name in names], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
