"""Faster R-CNN without an FPN: the backbone's last stage is the RoI head (arXiv:1506.01497; Detectron2's R50-C4)."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from detbb.config.schema import NonEmpty
from detbb.heads.base import HeadSpec
from detbb.heads.faster_rcnn import TwoStageConfig, TwoStageHead
from detbb.modeling.backbones.resnet import build_resnet_c4
from detbb.modeling.norm import norm_layer
from detbb.modeling.weights import load_part


class FasterRcnnC4Config(TwoStageConfig):
    """Faster R-CNN on `layer3`, with its own `layer4`; goes with `neck: {type: none}`."""

    levels: list[str] = ["layer3"]
    """Feature level that proposals are made on."""
    roi_levels: list[str] = ["layer3"]
    """Feature level that RoIs are read from."""
    anchor_sizes: NonEmpty[NonEmpty[PositiveFloat]] = [[32.0, 64.0, 128.0, 256.0, 512.0]]
    """Anchor sizes of each level: square roots of areas, in pixels of the resized image."""
    rpn_pre_nms_train: PositiveInt = 12000
    """Training: the highest scored anchors that go into NMS."""
    rpn_pre_nms_test: PositiveInt = 6000
    """Evaluation: the highest scored anchors that go into NMS."""
    box_resolution: PositiveInt = 14
    """Height and width of the features that `layer4` gets for an RoI; it halves them."""


class FasterRcnnC4Head(TwoStageHead):
    """Boxes from the mean of `layer4` over each RoI."""

    Config = FasterRcnnC4Config
    backbone_parts = ("layer4",)  # follow the backbone's norm, its switches and its weights

    def __init__(self, config: Any, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        _, self.layer4 = build_resnet_c4(spec.backbone.arch, norm_layer=norm_layer(spec.backbone.norm))
        self.box_predictor = FastRCNNPredictor(self.layer4.out_channels, len(spec.classes) + 1)

    def roi_vectors(self, pooled: Tensor) -> Tensor:
        return self.layer4(pooled).mean(dim=(2, 3))

    def load_backbone_weights(self, state: dict[str, Tensor]) -> None:
        load_part(self.layer4, state, prefix="layer4.")
