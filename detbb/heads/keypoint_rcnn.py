"""Keypoint R-CNN (arXiv:1703.06870, section 5): Faster R-CNN and a heat map a keypoint inside each box."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_inference, keypoints_to_heatmap

from detbb.config.schema import NonEmpty
from detbb.core.errors import UserError
from detbb.heads.base import HeadSpec
from detbb.heads.faster_rcnn import FasterRcnnConfig, FasterRcnnHead, Rois, roi_align
from detbb.heads.rpn import count_for
from detbb.modeling.precision import at_least_fp32
from detbb.structures.batch import Target
from detbb.structures.predictions import Predictions


class KeypointRcnnConfig(FasterRcnnConfig):
    """Keypoint R-CNN with an FPN."""

    keypoint_channels: NonEmpty[PositiveInt] = [512] * 8
    """Channels of the keypoint branch's convolutions, in order."""
    keypoint_resolution: PositiveInt = 14
    """Height and width of the features that a keypoint is predicted from; its heat map has four times as many."""


class KeypointRcnnHead(FasterRcnnHead):
    """Boxes, and for each the keypoints that the data has. Any number of classes, which share the keypoints."""

    Config = KeypointRcnnConfig
    needs = "keypoints"
    main_metric = "keypoints/AP"
    metrics = ("bbox", "keypoints")

    def __init__(self, config: Any, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        if not spec.keypoints:
            raise UserError(f"heads.{spec.name}.data: {config.data!r} has no keypoints; valid is a source with some")
        self.keypoint_pool = roi_align(config, spec, config.keypoint_resolution)
        self.keypoint_head = KeypointRCNNHeads(self.channels, config.keypoint_channels)
        self.keypoint_predictor = KeypointRCNNPredictor(config.keypoint_channels[-1], len(spec.keypoints))

    def keypoint_logits(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """(R, K, 4 keypoint_resolution, 4 keypoint_resolution)"""
        return at_least_fp32(self.keypoint_predictor(self.keypoint_head(self.keypoint_pool(features, boxes, []))))

    def branch_loss(self, features: dict[str, Tensor], rois: Rois, targets: list[Target]) -> dict[str, Tensor]:
        """`loss_keypoint`: the mean cross entropy over the labelled keypoints that lie in their RoI.

        RoIs whose object has no labelled keypoint are left out: they would add nothing.
        """
        visible = [_keypoints(t)[m, :, 2].gt(0).any(1) for t, m in zip(targets, rois.matched, strict=True)]
        rois = rois.select(visible)
        logits = self.keypoint_logits(features, rois.boxes)
        truth = torch.cat([_keypoints(t)[m] for t, m in zip(targets, rois.matched, strict=True)])  # (R, K, 3)
        # A keypoint's class is its cell in the heat map; one outside its RoI has none, and is not learned.
        cells, valid = keypoints_to_heatmap(truth.to(logits.dtype), torch.cat(rois.boxes), logits.shape[-1])
        valid = valid.bool()  # (R, K)
        loss = F.cross_entropy(logits.flatten(2)[valid], cells[valid], reduction="sum")  # over (R, K, side²)
        return {"loss_keypoint": loss / count_for(loss, int(valid.sum()))}

    def branch_decode(self, features: dict[str, Tensor], boxes: list[Tensor], predictions: list[Predictions]) -> None:
        """The score of a keypoint is its heat map's highest logit."""
        points, scores = keypointrcnn_inference(self.keypoint_logits(features, boxes), boxes)
        for prediction, box, xy, score in zip(predictions, boxes, points, scores, strict=True):
            # torchvision searches a box below one pixel as if it were one pixel large, so beyond the image's border
            inside = xy[..., :2].clamp(box[:, None, :2], box[:, None, 2:]).float()
            prediction.keypoints = torch.cat([inside, score[..., None].float()], dim=-1)


def _keypoints(target: Target) -> Tensor:
    assert target.keypoints is not None
    return target.keypoints
