"""Which process of a run ended or stalled when a collective fails; a stalled one on this host is ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import traceback
import uuid
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from detbb.core.errors import ProcessLost, tell_torchrun

RENDEZVOUS_S = 60.0  # the least time to wait for all to start: imports from a cold disk take long
WAIT_S = 5.0  # the most time to wait until the others notice a failure, too
_SIGNS = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|tim(ed|e) ?out", re.IGNORECASE)
_TIMED_OUT = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)
_COLLECTIVES = re.compile(r"/torch/(distributed/|nn/parallel/distributed\.py|autograd/graph\.py)")  # the last: DDP's


def is_lost_process(error: Exception) -> bool:
    """Whether a collective failed because of another process.

    The place where it was raised counts, too: a data loader can time out as well. A CUDA error is this process's own.
    """
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, torch.AcceleratorError):
        return False
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames and _COLLECTIVES.search(frames[-1]) and _SIGNS.search(str(error)))


class Members:
    """The processes of one start of a run.

    Each writes its host and process id into a store, and also when a collective fails there. Those that do not report
    a failed collective are missing.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, timeout_s: float) -> None:
        """store: torchrun's. Raises: ProcessLost: a process did not start in time."""
        self._rank, self._ranks, self._timeout_s = rank, range(world_size), timeout_s
        self.store = self._rendezvous(store, max(timeout_s, RENDEZVOUS_S))

    def _rendezvous(self, shared: dist.Store, patience_s: float) -> dist.Store:
        """A part of torchrun's store for this start alone.

        torchrun's store keeps the addresses of ended processes over a restart. So each process writes a new random
        name, and rank 0 answers each of them with its own, which names the part.
        """
        began, name, failed = time.monotonic(), uuid.uuid4().hex, f"within {patience_s:g} s; see its own error"
        own = {"host": _host(), "pid": os.getpid(), "error_file": os.environ.get("TORCHELASTIC_ERROR_FILE")}
        try:
            if self._rank != 0:
                shared.set(f"detbb/here/{self._rank}", name)
                shared.wait([f"detbb/start/{name}"], timedelta(seconds=patience_s))
                name = shared.get(f"detbb/start/{name}").decode()
            store = dist.PrefixStore(f"detbb/{name}", shared)
            store.set(str(self._rank), json.dumps(own))
            while self._rank == 0 and (absent := [r for r in self._ranks if not store.check([str(r)])]):
                if time.monotonic() - began > patience_s:
                    raise ProcessLost(f"rank {', '.join(map(str, absent))} did not start {failed}")
                for r in absent:
                    if shared.check([f"detbb/here/{r}"]):
                        shared.set(f"detbb/start/{shared.get(f'detbb/here/{r}').decode()}", name)
                time.sleep(0.02)
            store.wait([str(r) for r in self._ranks], timedelta(seconds=patience_s))
        except dist.DistError as error:
            raise ProcessLost(f"another rank did not start {failed}") from error
        return store

    def explain(self, error: Exception) -> ProcessLost:
        """What to raise in place of a collective's own error. Ends processes of this host that gave no answer in time.

        A stopped process ignores everything but SIGKILL, and torchrun would send that only 30 s later.
        """
        missing: dict[int, dict] = {}
        with suppress(RuntimeError):  # the store ended with its host
            missing = {r: json.loads(self.store.get(str(r))) for r in self._missing_ranks()}
        if not missing:
            return ProcessLost(f"the connection to the other processes is lost ({str(error).splitlines()[0]})")
        names = ", ".join(f"rank {r} (pid {m['pid']} on {m['host'].split()[0]})" for r, m in missing.items())
        if not _TIMED_OUT.search(str(error)):
            return ProcessLost(f"{names} ended before its time; see its own error")
        text = f"{names} gave no answer within train.timeout_s ({self._timeout_s:g} s)"
        here = [m for m in missing.values() if m["host"] == _host()]
        for number, delay_s in ((signal.SIGUSR2, 1.0), (signal.SIGKILL, 0.0)):  # SIGUSR2: see `distributed.processes`
            for process in here:
                tell_torchrun(process["error_file"], text)
                with suppress(OSError):
                    os.kill(process["pid"], number)
            time.sleep(delay_s)
        return ProcessLost(text)

    def _missing_ranks(self) -> list[int]:
        """The ranks that do not report a failed collective within a while."""
        self.store.set(f"waiting/{self._rank}", "")
        began = time.monotonic()
        while True:
            time.sleep(0.1)
            lost = [r for r in self._ranks if not self.store.check([f"waiting/{r}"])]
            if time.monotonic() - began > (1.0 if len(lost) < 2 else WAIT_S):
                return lost


def _host() -> str:
    """Equal where a process id means the same process: containers may share a host's name, but not its processes."""
    space = "/proc/self/ns/pid"
    return f"{socket.gethostname()} {os.readlink(space) if os.path.exists(space) else ''}"
