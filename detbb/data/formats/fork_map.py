"""Pieces of work on all free cores, for start-up: processes that are forked, send their results, and are gone.

Results are pickled, which takes several copies. The arrays beside them, which may be most of the memory there is, are
written once, where they stay.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np

P = TypeVar("P")
R = TypeVar("R")
MOST = 8  # processes: the parent takes their results one after the other


def spread(
    function: Callable[[P], tuple[R, np.ndarray]], pieces: Sequence[P], *, least: int
) -> tuple[list[R], np.ndarray]:
    """`function(piece)` of all pieces: the results, and the arrays joined; on several processes, `least` each or more.

    pieces: one or more. function: reads what it was made from (forked, nothing is sent to it) and gives something that
    pickles and a 1-D float64 array. Raises what it raises. No process is left behind, however this ends: a killed
    parent's find nobody to send to.
    """
    memory = _anonymous_file()  # None: where there is none, fork may not be safe either
    cores = len(os.sched_getaffinity(0)) if memory is not None else 1
    processes = min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MOST, len(pieces) // max(least, 1))
    try:
        if memory is not None and processes > 1:
            return _forked(function, pieces, processes, memory)
    finally:
        if memory is not None:
            os.close(memory)
    results, arrays = zip(*map(function, pieces), strict=True)
    return list(results), np.concatenate(arrays)


def _anonymous_file() -> int | None:
    try:
        return os.memfd_create("spread")
    except (AttributeError, OSError):  # another system than Linux, or a sandbox
        return None


def _forked(
    function: Callable[[P], tuple[R, np.ndarray]], pieces: Sequence[P], processes: int, memory: int
) -> tuple[list[R], np.ndarray]:
    context = multiprocessing.get_context("fork")
    ends = [round(i * len(pieces) / processes) for i in range(processes + 1)]
    workers: list[tuple[BaseProcess, Connection]] = []
    try:
        for first, end in pairwise(ends[1:]):  # the first share is this process's own
            here, there = context.Pipe()
            inherited = [*(earlier for _, earlier in workers), here]
            share = pieces[first:end]
            worker = context.Process(target=_work, args=(function, share, memory, there, inherited), daemon=True)
            worker.start()
            there.close()
            workers.append((worker, here))
        results, size = [], 0
        for piece in pieces[: ends[1]]:
            result, array = function(piece)
            results.append(result)
            size = _write(memory, [array], size)
        for started, here in workers:
            found, length = _receive(started, here)
            results += found
            with suppress(ConnectionError):  # if it has ended, the next word from it says so
                here.send(size)  # where its arrays begin
            size += length
        for started, here in workers:
            _receive(started, here)
        if not size:
            return results, np.zeros(0)
        return results, np.frombuffer(mmap.mmap(memory, size, access=mmap.ACCESS_COPY), np.float64)
    finally:
        for started, here in workers:
            here.close()
            started.kill()  # SIGTERM may only set a flag here, see stopping.StopSignals
            started.join()


def _receive(started: BaseProcess, here: Connection) -> Any:
    try:
        found = here.recv()
    except (EOFError, ConnectionResetError):
        started.join()
        raise ChildProcessError(f"a process reading data ended with exit code {started.exitcode}") from None
    if isinstance(found, Exception):
        raise found
    return found


def _work(
    function: Callable[[P], tuple[R, np.ndarray]],
    pieces: Sequence[P],
    memory: int,
    there: Connection,
    inherited: Sequence[Connection],
) -> None:
    for here in inherited:  # who holds the other end as well would wait for itself
        here.close()
    try:
        results, arrays = zip(*map(function, pieces), strict=True)
        there.send((list(results), sum(array.nbytes for array in arrays)))
        there.send(_write(memory, arrays, there.recv()))
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        there.send(error)


def _write(memory: int, arrays: Iterable[np.ndarray], place: int) -> int:
    """Write them one after the other; where the last one ends."""
    for array in arrays:
        data = array.data.cast("B") if array.size else b""
        while data:
            written = os.pwrite(memory, data, place)
            place, data = place + written, data[written:]
    return place
