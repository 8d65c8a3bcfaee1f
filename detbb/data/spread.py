"""Pieces of work on all free cores, for start-up: processes that are forked, send their results, and are gone."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

P = TypeVar("P")
R = TypeVar("R")
MOST = 8  # processes: the parent takes their results one after the other


def spread(function: Callable[[P], R], pieces: Sequence[P], *, least: int) -> list[R]:
    """`[function(piece) for piece in pieces]`, on several processes if each gets at least `least` of them.

    function: reads what it was made from (forked, nothing is sent to it) and gives something that pickles. Raises what
    it raises. No process is left behind, however this ends: a killed parent's find nobody to send to.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # where this is, fork is safe
    processes = min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MOST, len(pieces) // max(least, 1))
    if processes < 2:
        return [function(piece) for piece in pieces]
    context = multiprocessing.get_context("fork")
    ends = [round(i * len(pieces) / processes) for i in range(processes + 1)]
    workers: list[tuple[BaseProcess, Connection]] = []
    try:
        for first, end in pairwise(ends[1:]):  # the first share is this process's own
            receiver, sender = context.Pipe(duplex=False)
            inherited = [*(earlier for _, earlier in workers), receiver]
            worker = context.Process(target=_send, args=(function, pieces[first:end], sender, inherited), daemon=True)
            worker.start()
            sender.close()
            workers.append((worker, receiver))
        results = [function(piece) for piece in pieces[: ends[1]]]
        for started, receiver in workers:
            try:
                found = receiver.recv()
            except EOFError:
                started.join()
                raise ChildProcessError(f"a process reading data ended with exit code {started.exitcode}") from None
            if isinstance(found, Exception):
                raise found
            results += found
        return results
    finally:
        for started, receiver in workers:
            receiver.close()
            started.kill()  # SIGTERM may only set a flag here, see stopping.StopSignals
            started.join()


def _send(function: Callable[[P], R], pieces: Sequence[P], sender: Connection, inherited: Sequence[Connection]) -> None:
    for receiver in inherited:  # who holds the other end as well would wait for itself
        receiver.close()
    try:
        sender.send([function(piece) for piece in pieces])
    except BrokenPipeError:
        pass
    except Exception as error:
        sender.send(error)
