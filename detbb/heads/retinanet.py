"""RetinaNet: nine anchors at every cell, trained with focal loss (Lin et al. 2017, arXiv 1708.02002)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.ops import box_iou

from detbb.config.schema import Share, at_most
from detbb.core.errors import UserError
from detbb.distributed.collectives import shared_count
from detbb.heads.base import HeadSpec
from detbb.heads.dense import DenseConfig, DenseHead, DenseOutput, batch_boxes
from detbb.modeling.norm import norm_layer
from detbb.modeling.precision import at_least_fp32
from detbb.structures.batch import Batch, ImageSize

BACKGROUND, IGNORED = -1, -2


class RetinaNetConfig(DenseConfig):
    """RetinaNet on FPN levels; the defaults are torchvision's, but 100 detections an image."""

    foreground_iou: Share = 0.5
    """Anchors learn the box that they overlap by at least this IoU; each box's best anchors learn it in any case."""
    background_iou: Annotated[Share, at_most("foreground_iou")] = 0.4
    """Anchors that overlap every box less than this learn background; those in between learn nothing."""


class RetinaNetHead(DenseHead):
    """torchvision's RetinaNet towers; losses and detections equal torchvision's `RetinaNet`."""

    Config = RetinaNetConfig
    config: RetinaNetConfig

    def __init__(self, config: RetinaNetConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        if config.num_convs > 4:
            raise UserError(f"heads.{spec.name}.num_convs: {config.num_convs}; valid are 0 … 4")
        strides = [spec.strides[level] for level in self.picked_levels]
        sizes = tuple(tuple(int(4 * stride * 2 ** (octave / 3)) for octave in range(3)) for stride in strides)
        self.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        norm = norm_layer(config.norm)
        self.classification_head = RetinaNetClassificationHead(
            self.in_channels, 9, self.num_classes, config.prior_probability, norm
        )
        self.regression_head = RetinaNetRegressionHead(self.in_channels, 9, norm)
        for tower in (self.classification_head, self.regression_head):
            tower.conv = tower.conv[: config.num_convs]
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> DenseOutput:
        maps = [features[level] for level in self.picked_levels]
        return DenseOutput(self.classification_head(maps), self.regression_head(maps), None, self.grids(maps))

    def boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode_single(deltas, anchors)

    def loss(self, output: DenseOutput, batch: Batch) -> dict[str, Tensor]:
        """Focal and L1 loss, each a mean over images of the image's sum over its number of positive anchors."""
        logits, deltas = at_least_fp32(output.logits), at_least_fp32(output.deltas)  # (B, N, C), (B, N, 4)
        anchors = self.anchors(output)  # (N, 4)
        boxes, labels, _ = batch_boxes(batch, logits)  # (M, 4), (M,)
        matched = self.match(batch, anchors)  # (B, N)
        positive = matched >= 0
        # one more row stands for "no box": all anchors are computed alike, and nothing waits for the device
        boxes = torch.cat([boxes, torch.ones_like(anchors[:1]).cumsum(1)])
        labels = torch.cat([labels, labels.new_zeros(1)])
        matched_box = torch.where(positive, matched, len(boxes) - 1).flatten()  # (B N,)

        rows, shown = torch.arange(len(matched_box), device=matched.device), positive.flatten().to(logits.dtype)
        cls_loss = self.focal_loss(logits.flatten(0, 1), rows, labels[matched_box], shown).view_as(matched)
        cls_loss = cls_loss * (matched != IGNORED)
        target = self.box_coder.encode_single(boxes[matched_box], anchors.repeat(len(logits), 1)).view_as(deltas)
        box_loss = (deltas - target).abs().sum(2) * positive

        per_image = positive.sum(1).clamp(min=1)
        images = shared_count(torch.full((), len(logits), device=logits.device))
        return {
            "loss_cls": (cls_loss.sum(1) / per_image).sum() / images,
            "loss_box_reg": (box_loss.sum(1) / per_image).sum() / images,
        }

    @torch.no_grad()
    def match(self, batch: Batch, anchors: Tensor) -> Tensor:
        """(B, N): the box that each anchor learns, counted over the batch's boxes, or `BACKGROUND` or `IGNORED`.

        torchvision's `Matcher` with low-quality matches, without its boolean indexing, which waits for the device.
        """
        rows, first = [], 0
        for target in batch.targets:
            if len(target.boxes) == 0:
                rows.append(torch.full((len(anchors),), BACKGROUND, device=anchors.device))
                continue
            iou = box_iou(target.boxes.to(anchors.dtype), anchors)  # (n, N)
            best_iou, best = iou.max(0)
            unsure = torch.where(best_iou < self.config.background_iou, BACKGROUND, IGNORED)
            is_best_of_a_box = (iou == iou.amax(1, keepdim=True)).any(0)
            rows.append(torch.where((best_iou >= self.config.foreground_iou) | is_best_of_a_box, best + first, unsure))
            first += len(target.boxes)
        return torch.stack(rows)
