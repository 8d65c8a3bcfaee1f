"""A head that lets one process fail in a chosen way at a chosen step, for tests of what the others do then."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from runs import shrink

from detbb.heads.base import HeadSpec
from detbb.heads.fcos import FcosConfig, FcosHead

if "TORCHELASTIC_RUN_ID" in os.environ:  # a process of torchrun, which no fixture reaches
    shrink()


class FaultyConfig(FcosConfig):
    """FCOS with faults."""

    faults: list[str] = []
    """For each start of the job in turn: `<what>@<number of the loss computed since then>`; what happens on rank 1."""


class FaultyHead(FcosHead):
    """FCOS, until rank 1 fails: `raise`, `kill`, `exit`, `stop` (it hangs), `nan`, `nan_gradient`, `sigterm` …"""

    Config = FaultyConfig

    def __init__(self, config: FaultyConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        planned = config.faults[start] if start < len(config.faults) else "none@0"
        self.fault, _, number = planned.partition("@")
        self.left = int(number) if os.environ.get("RANK") == "1" else 0

    def loss(self, output: Any, batch: Any) -> dict[str, Any]:
        losses = super().loss(output, batch)
        self.left -= 1
        if self.fault == "nan_gradient" and self.left <= 0 and os.environ.get("RANK") == "1":
            name = min(losses)
            losses[name].register_hook(lambda g: g * float("nan"))
        if self.left != 0:
            return losses
        print(f"FAULT {time.time()}", file=sys.stderr, flush=True)
        if self.fault == "raise":
            raise ZeroDivisionError("planted in rank 1")
        if self.fault == "exit":
            os._exit(0)
        if self.fault == "nan":
            return {name: value * float("nan") for name, value in losses.items()}
        if self.fault == "pause":
            time.sleep(3)
        elif self.fault not in ("none", "nan_gradient"):
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "sigterm": signal.SIGTERM}[self.fault]
            os.kill(os.getpid(), number)
        return losses
