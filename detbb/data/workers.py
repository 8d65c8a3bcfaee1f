"""The processes that read data: how they start, what they need of the machine, and what their end means."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.core.machine import shared_memory
from detbb.structures.batch import round_up

PREFETCH = 2  # batches that a worker has ready: DataLoader's default
CURE = "give it more (Docker: --shm-size=8g), lower train.workers, or do without it: train.workers: 0"
_NO_ROOM, _NO_FILES = 71, 72  # exit codes of workers, which cannot say more
_ENDED = re.compile(
    r"DataLoader worker .*?(?:by signal: (?P<signal>[\w ]+)|exited unexpectedly(?: with exit code (?P<code>\d+))?)"
)


def start_worker(worker: int) -> None:
    """Workers leave signals to the main process, which saves first, and keep to one thread each.

    A process that exits asks its children to end by the very signal they ignore, and waits: see `end_workers_at_exit`.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # where the main process is killed
    torch.set_num_threads(1)
    # Python drops what cannot be handed over, and the run would wait for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_leave)  # type: ignore[attr-defined]


def _leave(error: Exception, _: object) -> None:
    text = str(error).lower()
    code = _NO_FILES if "too many open files" in text else _NO_ROOM if "/torch_" in text else 1
    if code == 1:
        traceback.print_exception(error)
    os._exit(code)


@functools.cache
def end_workers_at_exit() -> None:
    """Once a process: kill the workers of loaders that are still referred to when it exits."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill)


@contextmanager
def worker_failures() -> Iterator[None]:
    """Turn the end of a worker, which may surface anywhere in the main process, into its cause and cure.

    Raises: UserError.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        text = f"{error.__cause__ or ''} {error}"
        found = _ENDED.search(text)
        places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        broken = not isinstance(error, RuntimeError) and any("/multiprocessing/" in place for place in places)
        if found is None and not broken and "too many open files" not in text.lower():
            raise
        raise UserError(f"train.workers: {_cause(found)}") from error


def _cause(found: re.Match[str] | None) -> str:
    code, number = (found["code"], found["signal"]) if found else (str(_NO_FILES), None)
    if code == str(_NO_ROOM) or number == "Bus error":
        return f"a data worker found no room for a batch in /dev/shm ({_free()}); {CURE}"
    if code == str(_NO_FILES):
        return "a data worker could open no more files; raise the limit (ulimit -n), or lower train.workers"
    if number == "Killed":
        return (
            "a data worker was killed, as the system does where memory is short (its log says so: dmesg); lower "
            "train.workers, train.batch_size or eval.batch_size"
        )
    return (
        f"a data worker ended ({found[0] if found else code}); what it said is above, and with train.workers: 0 its "
        "error is the run's own"
    )


def shared_memory_warning(config: Config, *, world_size: int) -> list[str]:
    """A line if the batches that workers have ready may not fit into shared memory."""
    free, workers = shared_memory(), config.train.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free is None or workers == 0:
        return []
    images = config.train.batch_size // (config.train.accumulate * world_size)
    needed = 0
    for source in config.data.values():
        short, longest = map(round_up, source.image_size)
        batches = images + (config.eval.batch_size if source.val is not None else 0)  # both kinds wait at an evaluation
        needed = max(needed, workers * PREFETCH * batches * 3 * short * longest)
    if needed <= free:
        return []
    return [
        f"WARNING: train.workers: {workers} data workers may have {needed / 1e6:,.0f} MB of images ready, and /dev/shm "
        f"has {_free()}; {CURE}"
    ]


def _free() -> str:
    free = shared_memory()
    return "not there" if free is None else f"{free / 1e6:,.0f} MB free"
