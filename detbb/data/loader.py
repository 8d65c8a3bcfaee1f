"""Batches in step order for training, and in fixed groups for evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detbb.config.schema import Config, DataConfig
from detbb.core.errors import UserError
from detbb.core.machine import check_batch
from detbb.data.feature_store import Store
from detbb.data.images import BadImage
from detbb.data.sample import SampleReader
from detbb.data.sampler import MicroBatch, SampleKey, SampleOrder, SourceSchedule, StepSampler, hash_seed
from detbb.data.workers import end_workers_at_exit, start_worker
from detbb.structures.annotations import Annotations
from detbb.structures.batch import Batch, CacheEntry, Target, collate


class TrainDataset(Dataset):
    """Images by SampleKey; whole micro-batches become a Batch."""

    def __init__(
        self, readers: Mapping[str, SampleReader], stride: int = 32, *, stores: Mapping[str, Store] | None = None
    ) -> None:
        self._readers, self._stride, self._stores = readers, stride, stores or {}
        self._largest = {name: r.largest() for name, r in readers.items() if r.config.pad == "source"}

    def __getitems__(self, keys: MicroBatch) -> Batch | UserError:
        """The padded batch, or the error to raise in the main process (a worker's traceback is no use to a user)."""
        try:
            images, targets, bad, entries = zip(*map(self._read, keys), strict=True)
            read = [image for image in images if image is not None]
            batch = collate(read, targets, keys[0].source, self._stride, self._padded(keys))
        except UserError as e:
            return UserError(str(e))
        return replace(batch, bad_images=sum(bad, ()), entries=tuple(e for e in entries if e is not None))

    def _padded(self, keys: MicroBatch) -> tuple[int, int]:
        """(h, w) that covers the images of all processes, so that padding does not depend on how many there are."""
        source = keys[0].source
        if source in self._stores:
            return self._stores[source].plan.hw
        if source in self._largest:
            return self._largest[source]
        reader = self._readers[source]
        if reader.transform.changes_size:
            sizes = [self._read(k)[1].size.hw for k in keys.everyone if k not in keys]
        else:
            sizes = [reader.size(k.index, k.epoch) for k in keys.everyone]
        return max((s[0] for s in sizes), default=0), max((s[1] for s in sizes), default=0)

    def _read(self, key: SampleKey) -> tuple[Tensor | None, Target, tuple[str, ...], CacheEntry | None]:
        """Image (None if its features are stored), target, files passed over, and entry of the feature cache.

        With `on_bad_image: skip`, the next image takes a bad one's place. Where padding follows from the sizes alone,
        it becomes no larger than the bad one, so that all processes still know the padding.
        """
        reader, store = self._readers[key.source], self._stores.get(key.source)
        known = store is not None or key.source in self._largest or reader.transform.changes_size
        bad: tuple[str, ...] = ()
        count = len(reader.annotations)
        for offset in range(count):
            index = (key.index + offset) % count
            try:
                entry = store.find(reader, index, key.epoch) if store is not None else None
                if entry is not None and entry.is_stored:
                    return None, reader.target(index, key.epoch, key.step), bad, entry
                within = None if known or not offset else reader.size(key.index, key.epoch)
                image, target = reader.read(index, key.epoch, key.step, within=within)
                return image, target, bad, store.checked(entry, reader, index) if store and entry else None
            except BadImage as e:
                if reader.config.on_bad_image == "error":
                    raise
                bad += (str(e),)
        raise UserError(f"data.{key.source}.train: none of {count} images can be decoded; the first: {bad[0]}")


class EvalDataset(Dataset):
    """Groups of images, not augmented."""

    def __init__(self, reader: SampleReader, source: str, stride: int = 32) -> None:
        self._reader, self._source, self._stride = reader, source, stride

    def __getitems__(self, indices: list[int]) -> Batch | UserError:
        samples, bad = [], []
        for index in indices:
            try:
                samples.append(self._reader.read(index))
            except UserError as e:
                if not isinstance(e, BadImage) or self._reader.config.on_bad_image == "error":
                    return UserError(str(e))
                samples.append(self._reader.black(index))
                bad.append(str(e))
        images, targets = zip(*samples, strict=True)
        return replace(collate(images, targets, self._source, self._stride), bad_images=tuple(bad))


class BatchLoader(DataLoader):
    """A DataLoader that raises in the main process what its workers found wrong."""

    def __iter__(self) -> Generator[Batch]:  # type: ignore[override]
        for item in super().__iter__():
            if isinstance(item, UserError):
                raise item
            yield item


def train_loader(
    sources: Mapping[str, Annotations],
    config: Config,
    *,
    needs: Mapping[str, frozenset[str]],
    start_step: int,
    end_step: int,
    rank: int = 0,
    world_size: int = 1,
    stores: Mapping[str, Store] | None = None,
    phases: Sequence[tuple[int, Collection[str]]] = (),
) -> BatchLoader:
    """`train.accumulate` batches a step, for the steps start_step … end_step - 1, of this process's images.

    Only the sources given take turns; `phases` says which did before, so that a switch repeats no image. Each image's
    order and augmentation follow from (seed, step) alone, whatever the number of workers, of processes, or the step at
    which the loader starts. stores: the feature cache by source.
    """
    batch_size = config.train.batch_size
    readers, orders = {}, {}
    for name, data in sources.items():
        try:
            readers[name] = SampleReader(data, config.data[name], train=True, needs=needs[name], seed=config.seed)
        except UserError as e:
            raise UserError(f"data.{name}: {e}") from None
        images = batch_size // (config.train.accumulate * world_size)
        check_batch(images, readers[name].largest(), f"train.batch_size or data.{name}.image_size")
        landscape = data.sizes[:, 1] >= data.sizes[:, 0] if config.data[name].aspect_grouping else None
        orders[name] = SampleOrder(
            len(data), batch_size, seed=hash_seed(config.seed, *name.encode()), landscape=landscape
        )
    taking = {*sources, *(name for _, names in phases for name in names)}
    sampler = StepSampler(
        SourceSchedule({name: source.weight for name, source in config.data.items() if name in taking}, phases),
        orders,
        steps=range(start_step, end_step),
        accumulate=config.train.accumulate,
        share=(rank, world_size),
    )
    return _loader(TrainDataset(readers, stores=stores), sampler, config.train.workers, pin=config.device != "cpu")


def eval_loader(
    annotations: Annotations,
    source: DataConfig,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """Every image once, in groups of `batch_size` of similar shape; this process gets every `world_size`-th group.

    The groups, and so the padding and every bit of the result, do not depend on the number of processes. With
    `on_bad_image: skip` a black image stands in for one that cannot be decoded.
    """
    height, width = annotations.sizes.T
    order = np.lexsort((np.arange(len(annotations)), width, height, width >= height)).tolist()
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world_size]
    reader = SampleReader(annotations, source, train=False)
    check_batch(max(map(len, groups), default=0), reader.largest(), "eval.batch_size or data.<name>.image_size")
    return _loader(EvalDataset(reader, "eval"), groups, workers, pin=True)


def _loader(dataset: Dataset, batches: Any, workers: int, *, pin: bool) -> BatchLoader:
    cv2.setNumThreads(0)  # parallel are the workers; threads of OpenCV's would compete with PyTorch's
    if workers:
        end_workers_at_exit()
    with warnings.catch_warnings():  # PyTorch's, about too many workers; `training.start.advice` says it once
        warnings.filterwarnings("ignore", "This DataLoader will create")
        return BatchLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=lambda batch: batch,
            num_workers=workers,
            worker_init_fn=start_worker,
            multiprocessing_context="fork" if workers else None,  # shares the annotations' pages
            pin_memory=pin and torch.cuda.is_available(),
            generator=torch.Generator(),  # else starting workers would draw from the global stream
        )
