"""Processes: who we are, and what all of them agree on.

Start-up, membership and restarts are torchrun's; everything here also works on a single process without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detbb.config import Config
from detbb.errors import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@contextmanager
def processes(config: Config) -> Iterator[torch.device]:
    """Join the process group that torchrun describes, if any; gives this process's device.

    Raises: UserError: `device: cuda` without one.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("device: 'cuda', but PyTorch sees no CUDA device; valid here are auto and cpu")
    device = torch.device("cpu")
    if cuda and config.device != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.train.timeout_s))
    try:
        yield device
    finally:
        dist.destroy_process_group()


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


def from_rank0(item: T) -> T:
    """Rank 0's `item` on every rank."""
    if not is_distributed():
        return item
    box: list = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def rank0_first() -> None:
    """Call once before (on the other ranks) and once after (on rank 0) work that rank 0 must do first."""
    if is_distributed():
        dist.barrier()


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
    return nn.parallel.DistributedDataParallel(
        detector, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=False
    )
