"""Processes: who we are, and what the loop agrees on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


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
