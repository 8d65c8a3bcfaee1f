"""Ending a run on SIGTERM or SIGINT with nothing lost."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

from detbb.core.errors import Stopped, StoppedWaiting
from detbb.data.loader import BatchLoader
from detbb.distributed.collectives import world_size

ALONE_S = 5.0  # that data are waited for after a signal; a process alone is at a step boundary then, and can save
TOGETHER_S = 20.0  # the same where others wait for this process at the next boundary; torchrun kills after 30


class StopSignals:
    """While entered, SIGTERM and SIGINT only make a call give it; a second signal ends the process at once.

    Not so under torchrun: what a scheduler sent to everybody, torchrun passes on once more, so the second is the same.

    The loop asks at step boundaries, agrees on the answer over ranks, saves, and leaves. Where there is nothing to save
    yet (`started` is false), and where data are waited for that may never come, the signal raises Stopped.
    """

    def __init__(self) -> None:
        self.started = False
        self._received = 0  # the signal's number
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> int:
        """The signal that came, or 0."""
        return self._received

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._received and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(128 + number)
        self._received = number
        if not self.started:
            raise Stopped(number)
        signal.setitimer(signal.ITIMER_REAL, ALONE_S if world_size() == 1 else TOGETHER_S, 1.0)

    def _look(self, _: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is BatchLoader.__iter__.__code__:
                raise StoppedWaiting(self._received)
            frame = frame.f_back
