"""Batches in step order for training, and in fixed groups for evaluation."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detbb.config import Config, DataConfig
from detbb.data.annotations import Annotations
from detbb.data.batch import Batch, ImageSize, Target, collate
from detbb.data.images import BadImage, read_image, safe_join
from detbb.data.sampler import MicroBatch, SampleKey, SampleOrder, StepSampler, Turns, mix
from detbb.data.semantic import read_mask
from detbb.data.transforms import Sample, Transform, rasterize, resize
from detbb.errors import UserError


class Reader:
    """One source's images with their targets."""

    def __init__(
        self,
        annotations: Annotations,
        config: DataConfig,
        *,
        train: bool,
        needs: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> None:
        """`needs`: what to load beside boxes and labels: `masks`, `keypoints`, `semantic`."""
        if missing := sorted(need for need in needs if not annotations.has(need)):
            raise UserError(f"{annotations.root}: the annotations hold no {', '.join(missing)}, which a head needs")
        self.annotations, self.config = annotations, config
        self._needs, self._seed = needs, seed
        flips = annotations.flip_pairs if "keypoints" in needs else ()
        self.transform = Transform(config, train=train, flip_pairs=flips, semantic="semantic" in needs)

    def stream(self, index: int, epoch: int) -> int:
        """Seed of this image's augmentation."""
        return mix(self._seed, epoch, int(self.annotations.image_ids[index]))

    def size(self, index: int, epoch: int) -> tuple[int, int]:
        """(h, w) that the image is resized to, known without reading it."""
        height, width = self.annotations.sizes[index].tolist()
        return self.transform.size((height, width), self.stream(index, epoch))

    def read(self, index: int, epoch: int = 0, step: int = 0) -> tuple[Tensor, Target]:
        """A (3, h, w) uint8 image and its target. Raises BadImage for files, UserError for annotations."""
        annotations = self.annotations
        height, width = annotations.sizes[index].tolist()
        path = safe_join(annotations.root, annotations.file_names[index])
        image = read_image(path, self.config.max_pixels)
        if image.shape[:2] != (height, width):
            raise BadImage(path, f"is {image.shape[1]} x {image.shape[0]}, its annotations say {width} x {height}")
        try:
            sample = self._sample(image, index, self.size(index, epoch))
            sample = self.transform(sample, self.stream(index, epoch))
        except BadImage:
            raise
        except Exception as e:  # albumentations, or a run-length code that is none
            raise UserError(f"{path}: masks or augmentation failed: {' '.join(str(e).split())}") from e
        return torch.from_numpy(sample.image).permute(2, 0, 1).contiguous(), self._target(sample, index, step)

    def blank(self, index: int) -> tuple[Tensor, Target]:
        """A black image of the same size, to evaluate in place of one that cannot be decoded."""
        height, width = self.annotations.sizes[index].tolist()
        sample = self._sample(np.zeros((height, width, 3), dtype=np.uint8), index, self.size(index, 0))
        return torch.from_numpy(sample.image).permute(2, 0, 1).contiguous(), self._target(
            self.transform(sample, 0), index, 0
        )

    def _sample(self, image: np.ndarray, index: int, hw: tuple[int, int]) -> Sample:
        annotations = self.annotations
        rows = np.arange(len(annotations.labels))[annotations.rows(index)]
        rows = rows[~annotations.crowd[rows]]
        boxes = annotations.boxes_xywh[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        sample = Sample(image, boxes.clip(-1e6, 1e6), rows)
        if "keypoints" in self._needs and annotations.keypoints is not None:
            sample.keypoints = annotations.keypoints[rows]
        if "semantic" in self._needs:
            sample.semantic = read_mask(annotations, index)
        sample = resize(sample, hw)
        if "masks" in self._needs and annotations.segments is not None:
            sample.masks = rasterize(annotations.segments, rows, (image.shape[0], image.shape[1]), hw)
        return sample

    def _target(self, sample: Sample, index: int, step: int) -> Target:
        annotations = self.annotations
        image_id = int(annotations.image_ids[index])
        height, width = sample.image.shape[:2]
        image_labels = torch.zeros(len(annotations.classes), dtype=torch.bool)
        image_labels[annotations.labels[annotations.rows(index)].astype(np.int64)] = True
        return Target(
            image_id=image_id,
            size=ImageSize((height, width), tuple(annotations.sizes[index].tolist())),
            seed=mix(self._seed, step, image_id),
            boxes=torch.from_numpy(sample.boxes.astype(np.float32)),
            labels=torch.from_numpy(annotations.labels[sample.objects].astype(np.int64)),
            image_labels=image_labels,
            masks=None if sample.masks is None else torch.from_numpy(sample.masks),
            keypoints=None if sample.keypoints is None else torch.from_numpy(sample.keypoints),
            semantic=None if sample.semantic is None else torch.from_numpy(np.ascontiguousarray(sample.semantic)),
        )


class TrainDataset(Dataset):
    """Images by SampleKey; whole micro-batches become a Batch."""

    def __init__(self, readers: Mapping[str, Reader], stride: int = 32) -> None:
        self._readers, self._stride = readers, stride

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Target]:
        return self._read(key)[:2]

    def __getitems__(self, keys: MicroBatch) -> Batch | UserError:
        """The padded batch, or the error to raise in the main process (a worker's traceback is no use to a user)."""
        try:
            samples = [self._read(k) for k in keys]
            images, targets = [s[0] for s in samples], [s[1] for s in samples]
            batch = collate(images, targets, keys[0].source, self._stride, self._padded(keys))
            return replace(batch, bad_images=tuple(path for s in samples for path in s[2]))
        except UserError as e:
            return UserError(str(e))

    def _padded(self, keys: MicroBatch) -> tuple[int, int]:
        """(h, w) that covers the images of all processes, so that padding does not depend on how many there are."""
        others = [k for k in keys.everyone if k not in keys]
        if self._readers[keys[0].source].transform.changes_size:
            sizes = [tuple(self[k][0].shape[1:]) for k in others]
        else:
            sizes = [self._readers[k.source].size(k.index, k.epoch) for k in others]
        return max((s[0] for s in sizes), default=0), max((s[1] for s in sizes), default=0)

    def _read(self, key: SampleKey) -> tuple[Tensor, Target, list[str]]:
        """Image, target, and files passed over: with `on_bad_image: skip`, the next image takes a bad one's place."""
        reader = self._readers[key.source]
        bad: list[str] = []
        count = len(reader.annotations)
        for index in (np.arange(key.index, key.index + count) % count).tolist():
            try:
                return *reader.read(index, key.epoch, key.step), bad
            except BadImage as e:
                if reader.config.on_bad_image == "error":
                    raise
                bad.append(str(e))
        raise UserError(f"data.{key.source}.train: none of {count} images can be decoded; the first: {bad[0]}")


class EvalDataset(Dataset):
    """Groups of images, not augmented."""

    def __init__(self, reader: Reader, source: str, stride: int = 32) -> None:
        self._reader, self._source, self._stride = reader, source, stride

    def __getitems__(self, indices: list[int]) -> Batch | UserError:
        samples, bad = [], []
        for index in indices:
            try:
                samples.append(self._reader.read(index))
            except BadImage as e:
                if self._reader.config.on_bad_image == "error":
                    return UserError(str(e))
                samples.append(self._reader.blank(index))
                bad.append(str(e))
            except UserError as e:
                return UserError(str(e))
        batch = collate([s[0] for s in samples], [s[1] for s in samples], self._source, self._stride)
        return replace(batch, bad_images=tuple(bad))


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
) -> BatchLoader:
    """`train.accumulate` batches a step, for the steps start_step … end_step - 1, of this process's images.

    Only the sources given take turns. Each image's order and augmentation follow from (seed, step) alone, whatever the
    number of workers, of processes, or the step at which the loader starts.
    """
    batch_size = config.train.batch_size
    readers, orders = {}, {}
    for name, data in sources.items():
        try:
            readers[name] = Reader(data, config.data[name], train=True, needs=needs[name], seed=config.seed)
        except UserError as e:
            raise UserError(f"data.{name}: {e}") from None
        landscape = data.sizes[:, 1] >= data.sizes[:, 0] if config.data[name].aspect_grouping else None
        orders[name] = SampleOrder(len(data), batch_size, seed=mix(config.seed, *name.encode()), landscape=landscape)
    sampler = StepSampler(
        Turns({name: config.data[name].weight for name in sources}),
        orders,
        steps=range(start_step, end_step),
        accumulate=config.train.accumulate,
        share=(rank, world_size),
    )
    return _loader(TrainDataset(readers), sampler, config.train.workers, pin=config.device != "cpu")


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
    return _loader(EvalDataset(Reader(annotations, source, train=False), "eval"), groups, workers, pin=True)


def _loader(dataset: Dataset, batches: Any, workers: int, *, pin: bool) -> BatchLoader:
    if workers:
        _end_workers_at_exit()
    return BatchLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,  # shares the annotations' pages
        pin_memory=pin and torch.cuda.is_available(),
        generator=torch.Generator(),  # else starting workers would draw from the global stream
    )


@functools.cache
def _end_workers_at_exit() -> None:
    """Once a process: kill the workers of loaders that are still referred to when it exits."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill)


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """Workers leave signals to the main process, which saves first, and keep to one thread each.

    A process that exits asks its children to end by the very signal they ignore, and waits: see `_end_workers_at_exit`.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
