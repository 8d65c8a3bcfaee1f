"""Exchanges between all processes of a run; everything here also works on a single process.

Start-up, membership and restarts are torchrun's, see detbb/distributed/processes.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from detbb.core.errors import UserError


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@contextmanager
def raise_on_all_ranks(*, rank0_first: bool = False) -> Iterator[None]:
    """A UserError on one rank is raised on all, so that no process waits for one that ended.

    rank0_first: the others begin when rank 0 is done, so that it alone generates files.
    """
    own = None
    if rank0_first and rank() != 0:
        _raise_first(None)
    try:
        yield
    except UserError as error:
        if not is_distributed():
            raise
        own = str(error)
    if rank0_first and rank() == 0:
        _raise_first(own)
    _raise_first(own)


def _raise_first(own: str | None) -> None:
    if found := [text for text in all_gather_objects(own) if text is not None]:
        raise error_on_all_ranks(found[0])


def error_on_all_ranks(text: str) -> UserError:
    error = UserError(text)
    error.same_on_all_ranks = True
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
    """The `item` of each rank, in rank order, on every rank."""
    if not is_distributed():
        return [item]
    items: list = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def gather_objects(item: object) -> list:
    """The `item` of each rank, in rank order, on rank 0; an empty list on the others."""
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
