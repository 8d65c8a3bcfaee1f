"""Mask R-CNN (arXiv:1703.06870): Faster R-CNN and a mask inside each box."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference, project_masks_on_boxes

from detbb.config.schema import NonEmpty
from detbb.heads.base import HeadSpec
from detbb.heads.faster_rcnn import FasterRcnnConfig, FasterRcnnHead, Rois, roi_align
from detbb.heads.rpn import count_for
from detbb.modeling.precision import at_least_fp32
from detbb.structures.batch import Target
from detbb.structures.predictions import Predictions


class MaskRcnnConfig(FasterRcnnConfig):
    """Mask R-CNN with an FPN."""

    mask_channels: NonEmpty[PositiveInt] = [256, 256, 256, 256]
    """Channels of the mask branch's convolutions, in order."""
    mask_resolution: PositiveInt = 14
    """Height and width of the features that a mask is predicted from; the mask has twice as many cells a side."""


class MaskRcnnHead(FasterRcnnHead):
    """Boxes, and for each a mask of its class."""

    Config = MaskRcnnConfig
    needs = "masks"
    main_metric = "segm/AP"
    metrics = ("bbox", "segm")
    last_layers = ("box_predictor", "mask_predictor.mask_fcn_logits")

    def __init__(self, config: Any, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        self.mask_pool = roi_align(config, spec, config.mask_resolution)
        self.mask_head = MaskRCNNHeads(self.channels, config.mask_channels, 1)
        last = config.mask_channels[-1]
        self.mask_predictor = MaskRCNNPredictor(last, last, len(spec.classes) + 1)

    def mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """(R, C + 1, 2 mask_resolution, 2 mask_resolution); channel 0 is nobody's, as in torchvision."""
        return at_least_fp32(self.mask_predictor(self.mask_head(self.mask_pool(features, boxes, []))))

    def branch_loss(self, features: dict[str, Tensor], rois: Rois, targets: list[Target]) -> dict[str, Tensor]:
        """`loss_mask`: the mean binary cross entropy over the cells of the positive RoIs' masks.

        RoIs whose object has no mask, or an empty one, are left out: an empty mask would be learned as the truth.
        """
        rois = rois.select([_masks(t).flatten(1).any(1).bool()[m] for t, m in zip(targets, rois.matched, strict=True)])
        logits = self.mask_logits(features, rois.boxes)
        labels, side = torch.cat(rois.labels), logits.shape[-1]  # (R,)
        per_image = zip(targets, rois.boxes, rois.matched, strict=True)
        # (R, side, side): each object's mask, cut to its RoI and resized
        truth = torch.cat([project_masks_on_boxes(_masks(t), b, m, side) for t, b, m in per_image])
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]  # (R, side, side)
        loss = F.binary_cross_entropy_with_logits(chosen, truth, reduction="sum")
        return {"loss_mask": loss / (count_for(loss, len(labels)) * side**2)}

    def branch_decode(self, features: dict[str, Tensor], boxes: list[Tensor], predictions: list[Predictions]) -> None:
        logits = self.mask_logits(features, boxes)
        labels = [p.labels + 1 for p in predictions if p.labels is not None]
        for prediction, masks in zip(predictions, maskrcnn_inference(logits, labels), strict=True):
            prediction.masks = masks[:, 0].float()


def _masks(target: Target) -> Tensor:
    assert target.masks is not None
    return target.masks
