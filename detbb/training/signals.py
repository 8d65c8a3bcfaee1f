"""Ending a run on SIGTERM or SIGINT with nothing lost."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self


class StopSignals:
    """While entered, SIGTERM and SIGINT only make a call give it; a second signal ends the process at once.

    Not so under torchrun: what a scheduler sent to everybody, torchrun passes on once more, so the second is the same.

    The loop asks at step boundaries, agrees on the answer over ranks, saves, and leaves.
    """

    def __init__(self) -> None:
        self._received = 0  # the signal's number
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> int:
        """The signal that came, or 0."""
        return self._received

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._received and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(128 + number)
        self._received = number
