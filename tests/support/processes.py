"""Several processes in one test."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """`function(*args)` in `world_size` new processes joined in a gloo group; the results in rank order.

    function: of a module's top level. Raises what the first failing rank raised, or TimeoutError; no process is left.
    """
    multiprocessing.set_forkserver_preload(
        ["detbb.training.loop"]
    )  # imported once; the processes are forked from there
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, world_size, folder, timeout_s, args)
        context = mp.start_processes(_run, arguments, nprocs=world_size, join=False, start_method="forkserver")
        end = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError(f"{function.__name__} took more than {timeout_s} s on {world_size} processes")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _run(rank: int, function: Callable[..., Any], world_size: int, folder: str, timeout_s: float, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", timeout=timeout, world_size=world_size, rank=rank
    )
    try:
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
