"""Who the other processes of a run are, and which of them is to blame when a collective fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from detbb.errors import PeerLost, tell_torchrun

WAIT_S = 5.0  # at most, for the others to notice as well
MEET_S = 60.0  # at least, for all to start: what they import may come from a cold disk
_SIGNS = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|wait timeout|timed out", re.IGNORECASE)
_TIMED_OUT = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because of another process."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_SIGNS.search(str(error))))


class Peers:
    """The processes of a run as they entered themselves into the store, which torchrun keeps.

    Whoever finds a collective broken enters that too; who does not is the one that is lost.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, timeout_s: float) -> None:
        self._store, self._rank, self._size, self._timeout_s = store, rank, world_size, timeout_s
        own = {"host": _host(), "pid": os.getpid(), "error_file": os.environ.get("TORCHELASTIC_ERROR_FILE")}
        self._entries = [f"detbb/process/{r}" for r in range(world_size)]
        store.set(self._entries[rank], json.dumps(own))

    def meet(self) -> None:
        """Wait until all have started."""
        self._store.wait(self._entries, timedelta(seconds=max(self._timeout_s, MEET_S)))

    def explain(self, error: Exception) -> PeerLost:
        """What to raise in place of a collective's own error. Ends processes of this host that gave no answer in time.

        A stopped process ignores everything but SIGKILL, and torchrun would send that only 30 s later.
        """
        try:
            lost = self._lost()
            absent = [r for r in lost if not self._store.check([self._entries[r]])]
            entries = {r: json.loads(self._store.get(self._entries[r])) for r in lost if r not in absent}
        except RuntimeError:  # the store went with its host
            absent, entries = [], {}
        if absent:
            return PeerLost(f"rank {', '.join(map(str, absent))} did not start; see its own error")
        if not entries:
            return PeerLost(f"the connection to the other processes is lost ({str(error).splitlines()[0]})")
        who = ", ".join(f"rank {r} (pid {e['pid']} on {e['host'].split()[0]})" for r, e in entries.items())
        if not _TIMED_OUT.search(str(error)):
            return PeerLost(f"{who} ended before its time; see its own error")
        text = f"{who} gave no answer within train.timeout_s ({self._timeout_s:g} s)"
        self._end([e for e in entries.values() if e["host"] == _host()], text)
        return PeerLost(text)

    def _lost(self) -> list[int]:
        """The ranks that do not say within a while that they are waiting too."""
        self._store.set(f"detbb/waiting/{self._rank}", "")
        began = time.monotonic()
        while True:
            time.sleep(0.1)
            lost = [r for r in range(self._size) if not self._store.check([f"detbb/waiting/{r}"])]
            if time.monotonic() - began > (1.0 if len(lost) < 2 else WAIT_S):
                return lost

    def _end(self, entries: Sequence[dict], text: str) -> None:
        for number, delay_s in ((signal.SIGUSR2, 1.0), (signal.SIGKILL, 0.0)):  # SIGUSR2: see `distributed.processes`
            for entry in entries:
                with suppress(OSError):
                    tell_torchrun(entry["error_file"], text)
                    os.kill(entry["pid"], number)
            time.sleep(delay_s)


def _host() -> str:
    """Equal where a process id means the same process: containers may share a host's name, but not its processes."""
    space = "/proc/self/ns/pid"
    return f"{socket.gethostname()} {os.readlink(space) if os.path.exists(space) else ''}"
