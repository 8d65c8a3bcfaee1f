"""One image of a source with its target, resized and augmented."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detbb.config.schema import DataConfig
from detbb.core.errors import UserError, one_line
from detbb.data.formats.semantic import read_mask
from detbb.data.images import BadImage, read_image, safe_join
from detbb.data.sampler import hash_seed
from detbb.data.transforms import Sample, Transform, rasterize, resize
from detbb.structures.annotations import Annotations
from detbb.structures.batch import ImageSize, Target


class SampleReader:
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
        if train and config.pad == "source" and self.transform.changes_size:
            raise UserError("pad: 'source', but augment changes the size of images; valid here is batch")

    def stream(self, index: int, epoch: int) -> int:
        """Seed of this image's augmentation."""
        epoch = epoch if self.config.views is None else epoch % self.config.views
        return hash_seed(self._seed, epoch, int(self.annotations.image_ids[index]))

    def variants(self) -> int | None:
        """How many different images one image can become over all epochs; None: any number."""
        if self.transform.only_flips:
            return {"": 1, "h": 2}.get(self.transform.flips or "", 4)
        return self.config.views

    def variant(self, index: int, epoch: int) -> int:
        """Which of `variants()` the image is in this epoch."""
        if self.transform.only_flips:
            return self.transform.flipped(self.stream(index, epoch))
        assert self.config.views is not None
        return epoch % self.config.views

    def largest(self) -> tuple[int, int]:
        """(h, w) that covers every image of the source, resized."""
        sizes = [self.transform.size((h, w)) for h, w in np.unique(self.annotations.sizes, axis=0).tolist()]
        return max(h for h, _ in sizes), max(w for _, w in sizes)

    def path(self, index: int) -> Path:
        return safe_join(self.annotations.root, self.annotations.file_names[index], links=self.config.allow_links)

    def size(self, index: int, epoch: int, within: tuple[int, int] | None = None) -> tuple[int, int]:
        """(h, w) that the image is resized to, known without reading it; smaller if it would not fit `within`."""
        height, width = self.transform.size(tuple(self.annotations.sizes[index].tolist()), self.stream(index, epoch))
        scale = 1.0 if within is None else min(1.0, within[0] / height, within[1] / width)
        return max(int(height * scale), 1), max(int(width * scale), 1)

    def read(
        self, index: int, epoch: int = 0, step: int = 0, *, within: tuple[int, int] | None = None
    ) -> tuple[Tensor, Target]:
        """A (3, h, w) uint8 image and its target. Raises BadImage for files, UserError for annotations."""
        height, width = self.annotations.sizes[index].tolist()
        path = self.path(index)
        image = read_image(path, self.config.max_pixels)
        if image.shape[:2] != (height, width):
            raise BadImage(path, f"is {image.shape[1]} x {image.shape[0]}, its annotations say {width} x {height}")
        return self._augmented(image, index, epoch, step, self.size(index, epoch, within))

    def target(self, index: int, epoch: int = 0, step: int = 0) -> Target:
        """The target alone; the image is read only where the augmentation's draws might depend on its pixels."""
        if self.transform.flips is None:
            return self.read(index, epoch, step)[1]
        return self.black(index, epoch, step)[1]

    def black(self, index: int, epoch: int = 0, step: int = 0) -> tuple[Tensor, Target]:
        """A black image in place of this one, with this one's target."""
        hw = self.size(index, epoch)
        return self._augmented(np.zeros((*hw, 3), dtype=np.uint8), index, epoch, step, hw)

    def _augmented(
        self, image: np.ndarray, index: int, epoch: int, step: int, hw: tuple[int, int]
    ) -> tuple[Tensor, Target]:
        try:
            sample = self.transform(self._sample(image, index, hw), self.stream(index, epoch))
        except BadImage:
            raise
        except Exception as e:  # albumentations, or a run-length code that is none
            raise UserError(f"{self.path(index)}: masks or augmentation failed: {one_line(e)}") from e
        return torch.from_numpy(sample.image).permute(2, 0, 1), self._target(sample, index, step)

    def _sample(self, image: np.ndarray, index: int, hw: tuple[int, int]) -> Sample:
        """image: as on disk, or resized to `hw` already."""
        annotations = self.annotations
        original_hw: tuple[int, int] = tuple(annotations.sizes[index].tolist())
        rows, boxes = annotations.objects(index)
        sample = Sample(image, boxes.clip(-1e6, 1e6), rows)
        if "keypoints" in self._needs and annotations.keypoints is not None:
            sample.keypoints = annotations.keypoints[rows]
        if "semantic" in self._needs:
            sample.semantic = read_mask(annotations, index)
        sample = resize(sample, hw, original_hw)
        if "masks" in self._needs and annotations.segments is not None:
            sample.masks = rasterize(annotations.segments, rows, original_hw, hw)
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
            seed=hash_seed(self._seed, step, image_id),
            boxes=torch.from_numpy(sample.boxes.astype(np.float32)),
            labels=torch.from_numpy(annotations.labels[sample.objects].astype(np.int64)),
            image_labels=image_labels,
            masks=None if sample.masks is None else torch.from_numpy(sample.masks),
            keypoints=None if sample.keypoints is None else torch.from_numpy(sample.keypoints),
            semantic=None if sample.semantic is None else torch.from_numpy(np.ascontiguousarray(sample.semantic)),
        )
