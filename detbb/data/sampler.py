"""Which images make up each optimizer step: pure functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from detbb.core.errors import UserError

_BITS = (1 << 64) - 1


def hash_seed(*values: int) -> int:
    """A 63-bit hash of integers, for seeds (SplitMix64; Steele, Lea & Flood 2014). Order matters."""
    state = 0
    for value in values:
        z = (state ^ (value & _BITS)) + 0x9E3779B97F4A7C15 & _BITS
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _BITS
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _BITS
        state = z ^ z >> 31
    return state >> 1


class SampleKey(NamedTuple):
    """One image of one step."""

    source: str
    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index()
    step: int


class MicroBatch(list[SampleKey]):
    """This process's images of one forward pass; `everyone`: those of all processes, which are padded alike."""

    def __init__(self, own: list[SampleKey], everyone: list[SampleKey]) -> None:
        super().__init__(own)
        self.everyone = everyone


class SourceSchedule:
    """Which source a step takes: smooth weighted round robin, so that any stretch of steps is close to the weights."""

    def __init__(self, weights: Mapping[str, float], phases: Sequence[tuple[int, Collection[str]]] = ()) -> None:
        """phases: from which step on which sources take turns, in order; without, all of them from step 0."""
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"data.{name}.weight: {weight} is not a finite number above 0")
        self._weights = {name: float(weight) for name, weight in weights.items()}
        self._phases = list(phases) or [(0, weights)]
        self._credit = dict.fromkeys(weights, 0.0)
        self._count = dict.fromkeys(weights, 0)
        self._visits: list[tuple[str, int]] = []  # of each step so far: source, its visit

    def source_at(self, step: int) -> tuple[str, int]:
        """(source of step `step`, how many steps it had before)."""
        while len(self._visits) <= step:
            learning = next(names for first, names in reversed(self._phases) if first <= len(self._visits))
            active = {name: weight for name, weight in self._weights.items() if name in learning}
            for name, weight in active.items():
                self._credit[name] += weight
            source = max(active, key=self._credit.__getitem__)
            self._credit[source] -= sum(active.values())
            self._visits.append((source, self._count[source]))
            self._count[source] += 1
        return self._visits[step]


class SampleOrder:
    """The endless stream of one source's images: each epoch is a new permutation, nothing is dropped or repeated in it.

    With `landscape`, images of one orientation are put into the same batches: within each block of an epoch's length
    rounded up to whole batches, the stream is split by orientation and the batches are shuffled.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int, landscape: np.ndarray | None = None) -> None:
        self._images, self._batch, self._seed = num_images, batch_size, seed
        self._landscape = landscape
        self._per_block = -(-num_images // batch_size)  # batches
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._permutation = lru_cache(maxsize=4)(
            lambda epoch: np.random.default_rng(hash_seed(seed, epoch, 0)).permutation(num_images)
        )

    def batch(self, visit: int) -> list[tuple[int, int]]:
        """(epoch, index) of the `batch_size` images of this source's visit `visit`."""
        block, row = divmod(visit, self._per_block)
        return [(int(e), int(i)) for e, i in self._block(block)[row]]

    def _make_block(self, block: int) -> np.ndarray:
        """(batches, batch size, 2) epoch and index."""
        length = self._per_block * self._batch
        epoch, place = np.divmod(np.arange(block * length, (block + 1) * length), self._images)
        index = np.empty(length, dtype=np.int64)
        for e in np.unique(epoch).tolist():
            index[epoch == e] = self._permutation(e)[place[epoch == e]]
        if self._landscape is not None:
            grouped = np.argsort(~self._landscape[index], kind="stable")
            epoch, index = epoch[grouped], index[grouped]
        batches = np.stack([epoch, index], axis=1).reshape(self._per_block, self._batch, 2)
        return batches[np.random.default_rng(hash_seed(self._seed, block, 1)).permutation(self._per_block)]


class StepSampler(Sampler[MicroBatch]):
    """This process's micro-batches in step order.

    A step's images are cut into `accumulate` runs, and each run into one share a process: neither changes which images
    a step has.
    """

    def __init__(
        self,
        schedule: SourceSchedule,
        orders: Mapping[str, SampleOrder],
        *,
        steps: range,
        accumulate: int = 1,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._schedule, self._orders, self._steps = schedule, orders, steps
        self._accumulate, (self._rank, self._processes) = accumulate, share

    def __len__(self) -> int:
        return len(self._steps) * self._accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self._steps:
            source, visit = self._schedule.source_at(step)
            keys = [SampleKey(source, epoch, index, step) for epoch, index in self._orders[source].batch(visit)]
            run = len(keys) // self._accumulate
            own = run // self._processes
            assert own * self._processes * self._accumulate == len(keys)
            for first in range(0, len(keys), run):
                everyone = keys[first : first + run]
                yield MicroBatch(everyone[self._rank * own : (self._rank + 1) * own], everyone)
