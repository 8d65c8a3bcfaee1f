"""The two errors that a command turns into one line and an exit code."""

from __future__ import annotations


class UserError(ValueError):
    """What the user gave cannot work: what is wrong, the value, what is valid, where. Commands exit with 2."""


class Stopped(Exception):
    """A signal asked the run to end, and a checkpoint is safe on disk. Commands exit with `128 + signal`."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal
