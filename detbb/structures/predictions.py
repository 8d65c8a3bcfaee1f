"""What a branch says about one image: what heads decode, and evaluators and pictures read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from detbb.structures.batch import ImageSize


@dataclass
class Predictions:
    """What a branch says about one image. Fields that a branch does not use stay None.

    Straight from `decode`, boxes, masks and keypoints are in pixels of the resized image; `to_original` maps them back.
    """

    boxes: Tensor | None = None  # (n, 4) float32 xyxy
    scores: Tensor | None = None  # (n,) float32 in [0, 1], descending
    labels: Tensor | None = None  # (n,) int64 in [0, C)
    masks: Tensor | None = None  # (n, 28, 28) float32: mask probability inside each box
    keypoints: Tensor | None = None  # (n, K, 3) float32: x, y, score
    semantic: Tensor | None = None  # (C, h, w) float32 logits; after to_original (h, w) uint8 labels
    probabilities: Tensor | None = None  # (C,) float32 in [0, 1]
    values: Tensor | None = None  # (C,) float32: any number for each class, such as a count

    def map(self, change: Callable[[Tensor], Tensor]) -> Predictions:
        """The same with `change(value)` in every field that is there."""
        return Predictions(**{name: None if value is None else change(value) for name, value in vars(self).items()})

    def to_original(self, size: ImageSize) -> Predictions:
        """The same in pixels of the image on disk."""
        scale_y = size.original_hw[0] / size.hw[0]
        scale_x = size.original_hw[1] / size.hw[1]
        boxes, keypoints, semantic = self.boxes, self.keypoints, self.semantic
        if boxes is not None:
            boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        if keypoints is not None:
            keypoints = keypoints * keypoints.new_tensor([scale_x, scale_y, 1.0])
        if semantic is not None:
            resized = F.interpolate(semantic[None], size=size.original_hw, mode="bilinear", align_corners=False)
            semantic = resized[0].argmax(0).byte()
        return replace(self, boxes=boxes, keypoints=keypoints, semantic=semantic)
