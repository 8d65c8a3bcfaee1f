"""What a training step gets: images in one padded tensor, and one target an image.

Colour order is RGB everywhere. Boxes are xyxy in pixels of the resized image unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BATCH_STRIDE = 32  # height and width of batches are multiples of it


def round_up(size: int, stride: int = BATCH_STRIDE) -> int:
    """The next multiple of `stride`."""
    return -(-size // stride) * stride


class ImageSize(NamedTuple):
    """One image's size inside a padded batch, and on disk (after EXIF rotation)."""

    hw: tuple[int, int]
    original_hw: tuple[int, int]


@dataclass
class Target:
    """One image's annotations, in pixels of the resized image. n objects, C classes, K keypoints; n may be 0."""

    image_id: int  # original id
    size: ImageSize
    seed: int  # for random choices about this image inside heads; a function of (seed, step, image id)
    boxes: Tensor  # (n, 4) float32 xyxy; 0 <= x1 < x2 <= w, likewise y; crowds are left out
    labels: Tensor  # (n,) int64 in [0, C)
    image_labels: Tensor  # (C,) bool: which classes the image has, crowds too
    masks: Tensor | None = None  # (n, h, w) uint8
    keypoints: Tensor | None = None  # (n, K, 3) float32: x, y, visibility (0 absent, 1 hidden, 2 visible)
    semantic: Tensor | None = None  # (h, w) uint8: labels in [0, C) or 255 to ignore

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors as arrays: between processes each tensor would hold an open file."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and not v.is_cuda}
        return {**vars(self), **{k: v.numpy() for k, v in tensors.items() if v.numel() < 65536}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()})

    def to(self, device: torch.device) -> Target:
        tensors: dict[str, Any] = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


class CacheEntry(NamedTuple):
    """The place of an image's features in the feature cache, filled or not."""

    slot: int
    image_sha256: bytes  # SHA-256 of the file; empty: not to be stored
    is_stored: bool  # if so, `Batch.images` leaves the image out


class PrecomputedFeatures(NamedTuple):
    """What frozen parts made of a batch's images, up to the part `after` (`stem`, `layer1` …, or `neck`)."""

    after: str
    levels: dict[str, Tensor]  # by stage or level: `after`'s output, and the others that later parts read


@dataclass
class Batch:
    """Images of one data source.

    images: (B, 3, H, W) uint8 RGB; each image in the upper left corner, the rest is padding. H and W are multiples of
    the stride the network needs, and the same on every rank. Images whose features are cached are left out (B is less).
    """

    images: Tensor
    targets: list[Target]
    source: str
    bad_images: tuple[str, ...] = ()  # files left out or replaced because they could not be decoded
    entries: tuple[CacheEntry, ...] = ()  # one an image where the source has a feature cache
    precomputed: PrecomputedFeatures | None = None  # what is computed already

    @property
    def sizes(self) -> list[ImageSize]:
        return [t.size for t in self.targets]

    def to(self, device: torch.device) -> Batch:
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, targets=[t.to(device) for t in self.targets])

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory())


def collate(
    images: Sequence[Tensor],
    targets: Sequence[Target],
    source: str,
    stride: int = BATCH_STRIDE,
    at_least: tuple[int, int] = (0, 0),
) -> Batch:
    """Pad (3, h, w) uint8 images with zeros to one size that is a multiple of `stride` and covers `at_least` (h, w)."""
    height = round_up(max([at_least[0], *(i.shape[1] for i in images)]), stride)
    width = round_up(max([at_least[1], *(i.shape[2] for i in images)]), stride)
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return Batch(padded, list(targets), source)
