"""Processes: who we are, and what all of them agree on.

Start-up, membership and restarts are torchrun's; everything here also works on a single process without one.
"""

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
from torch import Tensor, nn
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from detbb.config import Config
from detbb.errors import Stopped, UserError
from detbb.peers import Peers, is_lost_peer


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@contextmanager
def processes(config: Config) -> Iterator[torch.device]:
    """Join the process group that torchrun describes, if any; gives this process's device.

    A process group that the caller made is used as it is. Raises: UserError: `device: cuda` without one; PeerLost:
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
    faulthandler.register(signal.SIGUSR2)  # shows where a process is; a stalled one is asked before it is ended
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _prctl_pr_set_pdeathsig(signal.SIGTERM)  # should torchrun be killed, save and leave
    timeout = timedelta(seconds=config.train.timeout_s)
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=timeout))
    except ValueError as error:  # RANK and WORLD_SIZE without the rest, or not as torchrun sets them
        raise UserError(f"{error}; start several processes with torchrun, or unset RANK and WORLD_SIZE") from error
    peers = Peers(store, number, size, timeout_s=config.train.timeout_s)
    group = {"store": peers.store, "rank": number, "world_size": size, "timeout": timeout}
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **group)
        else:
            dist.init_process_group("gloo", **group)
        yield device
    except Stopped:
        dist.destroy_process_group()
        raise
    except Exception as error:  # the group is left as it is: destroying it could wait for the lost
        if not is_lost_peer(error):
            raise
        raise peers.explain(error) from error
    dist.destroy_process_group()


def _own_gpu() -> int:
    number = int(os.environ.get("LOCAL_RANK", "0"))
    processes_here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)), torch.cuda.device_count()
    if processes_here > gpus:
        raise _everywhere(f"--nproc-per-node: {processes_here} processes, but {gpus} GPUs; valid is one process a GPU")
    return number


@contextmanager
def agreed(*, rank0_first: bool = False) -> Iterator[None]:
    """A UserError on one rank is raised on all, so that nobody waits for a process that left.

    rank0_first: the others begin when rank 0 is done, so that what it generates is written once.
    """
    own = None
    if rank0_first and rank() != 0 and (text := from_rank0(None)) is not None:
        raise _everywhere(text)
    try:
        yield
    except UserError as error:
        if not is_distributed():
            raise
        own = str(error)
    if rank0_first and rank() == 0:
        from_rank0(own)
        if own is not None:
            raise _everywhere(own)
    if found := [text for text in all_gather_objects(own) if text is not None]:
        raise _everywhere(found[0])


def _everywhere(text: str) -> UserError:
    error = UserError(text)
    error.everywhere = True
    return error


def shared_count(count: Tensor) -> Tensor:
    """What a local loss sum is divided by: max(sum of `count` over ranks, 1) / world size.

    DDP averages gradients over ranks, so the sum over this gives the loss of the whole batch on any number of ranks.
    """
    total = count.detach().to(torch.float64 if count.dtype == torch.float64 else torch.float32).clone()
    if is_distributed():
        dist.all_reduce(total)
    return total.clamp(min=1) / world_size()


def all_gather_objects(item: object) -> list:
    """Everybody's `item`, in rank order, on every rank."""
    if not is_distributed():
        return [item]
    items: list = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def gather_objects(item: object) -> list:
    """Everybody's `item`, in rank order, on rank 0; nothing on the others."""
    if not is_distributed():
        return [item]
    items: list | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(item, items)
    return items or []


def from_rank0(item: Any) -> Any:
    """Rank 0's `item` on every rank."""
    if not is_distributed():
        return item
    box: list = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def maximum(values: Tensor) -> Tensor:
    """Elementwise maximum over ranks."""
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def mean(values: Tensor) -> Tensor:
    """Elementwise mean over ranks."""
    if is_distributed():
        dist.all_reduce(values)
        values /= world_size()
    return values


def wrap(detector: nn.Module) -> nn.Module:
    """DDP over what is trained now; the detector itself on a single process. Made anew at every phase switch."""
    if not is_distributed() or world_size() == 1:
        return detector
    # Buffers are not broadcast: statistics are averaged over ranks instead, so that no rank's are thrown away.
    ddp = nn.parallel.DistributedDataParallel
    names = ("forward_sync_buffers", "broadcast_buffers")  # PyTorch 2.14 gave it a new name
    name = next(name for name in names if name in inspect.signature(ddp).parameters)
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True, "find_unused_parameters": False}
    return ddp(detector, **options)
