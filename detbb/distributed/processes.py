"""Joining the process group that torchrun describes, and wrapping a model for it."""

from __future__ import annotations

import faulthandler
import inspect
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from detbb.config.schema import Config
from detbb.core.errors import Stopped, UserError
from detbb.distributed.collectives import error_on_all_ranks, is_distributed, world_size
from detbb.distributed.lost_process import Members, is_lost_process


@contextmanager
def processes(config: Config) -> Iterator[torch.device]:
    """Join the process group that torchrun describes, if any; gives this process's device.

    A process group that the caller made is used as it is. Raises: UserError: `device: cuda` without one; ProcessLost:
    another process ended, or gave no answer within `train.timeout_s`.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("device: 'cuda', but PyTorch sees no CUDA device; valid here are auto and cpu")
    device = torch.device("cpu")
    if cuda and config.device != "cpu":
        device = torch.device("cuda", _own_gpu())
        torch.cuda.set_device(device)
        # fp32 is fp32: by default convolutions would round to TF32. And algorithms are picked by rule: timing them
        # (cudnn.benchmark) may pick others in the next run, and anew for each of the many shapes of padded batches.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    if is_distributed() or "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield device
        return
    faulthandler.register(signal.SIGUSR2)  # a stalled process shows its stack before it is ended
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _prctl_pr_set_pdeathsig(signal.SIGTERM)  # if torchrun is killed, save and end
    timeout = timedelta(seconds=config.train.timeout_s)
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=timeout))
    except ValueError as error:  # RANK and WORLD_SIZE without the rest, or not as torchrun sets them
        raise UserError(f"{error}; start several processes with torchrun, or unset RANK and WORLD_SIZE") from error
    members = Members(store, number, size, timeout_s=config.train.timeout_s)
    group = {"store": members.store, "rank": number, "world_size": size, "timeout": timeout}
    backend, own_gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(backend, device_id=own_gpu, **group)
        yield device
    except Stopped:
        dist.destroy_process_group()
        raise
    except Exception as error:  # the group is not destroyed: that could wait for a lost process
        if not is_lost_process(error):
            raise
        raise members.explain(error) from error
    dist.destroy_process_group()


def _own_gpu() -> int:
    number = int(os.environ.get("LOCAL_RANK", "0"))
    processes_here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)), torch.cuda.device_count()
    if processes_here > gpus:
        raise error_on_all_ranks(
            f"--nproc-per-node: {processes_here} processes, but {gpus} GPUs; valid is one process a GPU"
        )
    return number


def wrap(detector: nn.Module) -> nn.Module:
    """DDP over what is trained now; the detector itself on a single process. To be called at every phase switch."""
    if world_size() == 1:
        return detector
    # Buffers are not broadcast: that would keep rank 0's statistics alone, so they are averaged over ranks instead.
    ddp = nn.parallel.DistributedDataParallel
    names = ("forward_sync_buffers", "broadcast_buffers")  # PyTorch 2.14 gave it a new name
    name = next(name for name in names if name in inspect.signature(ddp).parameters)
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True, "find_unused_parameters": False}
    return ddp(detector, **options)
