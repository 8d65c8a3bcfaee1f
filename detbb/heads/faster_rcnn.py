"""Faster R-CNN on an FPN (arXiv:1506.01497, arXiv:1612.03144), and what the other two-stage heads share with it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from detbb.config.schema import Share, at_most
from detbb.core.errors import UserError
from detbb.heads.base import Head, HeadSpec
from detbb.heads.rpn import SMOOTH_L1_BETA, Rpn, RpnConfig, RpnOutput, count_for
from detbb.heads.sampling import SeededSampler
from detbb.modeling.precision import at_least_fp32
from detbb.structures.batch import Batch, ImageSize, Target
from detbb.structures.predictions import Predictions


class TwoStageConfig(RpnConfig):
    """What all two-stage heads take."""

    roi_levels: list[str] = ["p2", "p3", "p4", "p5"]
    """Feature levels that RoIs are read from, finest first, each at half the resolution of the one before; a larger RoI
    is read from a coarser level (FPN, equation 1)."""
    roi_sampling_ratio: NonNegativeInt = 2
    """RoIAlign: sampling points per bin and side; 0: as many as the RoI has cells."""
    box_resolution: PositiveInt = 7
    """Height and width of the features that an RoI's box is predicted from."""
    box_foreground_iou: Share = 0.5
    """Proposals with at least this IoU to a box are positive."""
    box_background_iou: Annotated[Share, at_most("box_foreground_iou")] = 0.5
    """Proposals with less than this IoU to all boxes are negative; those in between are not trained."""
    box_samples: PositiveInt = 512
    """Proposals per image that are trained."""
    box_positive_fraction: Share = 0.25
    """Largest share of positives among them."""
    box_delta_weights: Annotated[list[PositiveFloat], Field(min_length=4, max_length=4)] = [10.0, 10.0, 5.0, 5.0]
    """Factors on the regression targets dx, dy, dw, dh."""
    score_threshold: Share = 0.05
    """Least score of a detection."""
    nms_threshold: Share = 0.5
    """IoU above which the lower scored of two detections of a class is dropped."""
    detections_per_image: PositiveInt = 100
    """Most detections per image."""


class FasterRcnnConfig(TwoStageConfig):
    """Faster R-CNN with an FPN."""

    box_channels: PositiveInt = 1024
    """Width of the two hidden layers between an RoI's features and its box."""


@dataclass
class TwoStageOutput:
    """The first stage's result and the features that the second stage reads."""

    rpn: RpnOutput
    features: dict[str, Tensor]  # of roi_levels


@dataclass
class Rois:
    """The proposals that are trained, one tensor an image. Label 0 is background, 1 … C the classes."""

    boxes: list[Tensor]  # (r, 4) xyxy
    labels: list[Tensor]  # (r,) int64
    matched: list[Tensor]  # (r,) int64: index of the target's box

    def select(self, keep: list[Tensor]) -> Rois:
        """Those that `keep` (one mask or index an image) picks."""
        return Rois(*([x[k] for x, k in zip(xs, keep, strict=True)] for xs in (self.boxes, self.labels, self.matched)))

    def positive(self) -> Rois:
        return self.select([labels > 0 for labels in self.labels])


def roi_align(config: TwoStageConfig, spec: HeadSpec, resolution: int) -> MultiScaleRoIAlign:
    """RoIAlign over `roi_levels`, at the scales that the levels have.

    torchvision's module guesses them from the first images it sees: wrongly, if those are much smaller than the batch.
    """
    levels = spec.pick(config.roi_levels)
    strides = [spec.strides[level] for level in levels]
    if any(b != 2 * a for a, b in pairwise(strides)):
        raise UserError(
            f"heads.{spec.name}.roi_levels: {', '.join(levels)} (strides {strides}); valid are neighbouring levels"
        )
    pool = MultiScaleRoIAlign(list(levels), resolution, config.roi_sampling_ratio)
    pool.scales = [1 / s for s in strides]
    pool.map_levels = initLevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    return pool


class TwoStageHead(Head):
    """RPN, sampling, box losses and detections: all but how an RoI's features become a vector."""

    last_layers: ClassVar[tuple[str, ...]] = ("box_predictor",)
    box_predictor: nn.Module

    def __init__(self, config: Any, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        self.roi_levels = spec.pick(config.roi_levels)
        self.rpn = Rpn(config, spec)
        self.sampler = SeededSampler(config.box_samples, config.box_positive_fraction, f"{spec.name}/roi")
        self.box_pool = roi_align(config, spec, config.box_resolution)
        rules = RoIHeads(
            None,
            None,
            None,
            config.box_foreground_iou,
            config.box_background_iou,
            config.box_samples,
            config.box_positive_fraction,
            tuple(config.box_delta_weights),
            config.score_threshold,
            config.nms_threshold,
            config.detections_per_image,
        )
        self.rules = (rules,)  # torchvision's matching and post-processing: no parameters, so no submodule

    @classmethod
    def levels(cls, config: Any) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*config.levels, *config.roi_levels]))

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> TwoStageOutput:
        return TwoStageOutput(self.rpn(features), {level: features[level] for level in self.roi_levels})

    def loss(self, output: TwoStageOutput, batch: Batch) -> dict[str, Tensor]:
        """`loss_rpn_cls`, `loss_rpn_loc`, `loss_cls`, `loss_box_reg`, and those of the branches."""
        proposals = self.rpn.proposals(output.rpn, batch.sizes, "train")
        rois = self.sample(proposals, batch.targets)
        losses = self.rpn.loss(output.rpn, batch.targets)
        losses |= self.box_loss(output.features, rois, batch.targets)
        return losses | self.branch_loss(output.features, rois.positive(), batch.targets)

    def decode(self, output: TwoStageOutput, sizes: list[ImageSize]) -> list[Predictions]:
        proposals = self.rpn.proposals(output.rpn, sizes, "test")
        logits, deltas = self.box_logits(output.features, proposals)
        found = self.rules[0].postprocess_detections(logits, deltas, proposals, [s.hw for s in sizes])
        predictions = [Predictions(b.float(), s.float(), n - 1) for b, s, n in zip(*found, strict=True)]
        self.branch_decode(output.features, found[0], predictions)
        return predictions

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], targets: list[Target]) -> Rois:
        """What the second stage is trained on: proposals and the boxes themselves, matched and sampled."""
        boxes = [t.boxes.to(p) for t, p in zip(targets, proposals, strict=True)]
        proposals = self.rules[0].add_gt_proposals(proposals, boxes)
        matched, labels = self.rules[0].assign_targets_to_proposals(proposals, boxes, [t.labels + 1 for t in targets])
        # A matched index means nothing for background; only positives are ever looked up.
        drawn = [self.sampler(n, t.seed) for n, t in zip(labels, targets, strict=True)]
        return Rois(proposals, labels, matched).select([torch.cat(d).sort().values for d in drawn])

    def box_loss(self, features: dict[str, Tensor], rois: Rois, targets: list[Target]) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box_reg`, both over the number of sampled proposals."""
        logits, deltas = self.box_logits(features, rois.boxes)  # (R, C + 1), (R, 4 (C + 1))
        labels = torch.cat(rois.labels)  # (R,)
        positive = torch.where(labels > 0)[0]  # (P,)
        deltas = deltas.view(len(deltas), -1, 4)[positive, labels[positive]]  # (P, 4): those of the true class
        chosen = rois.positive()
        truth = torch.cat([t.boxes[m] for t, m in zip(targets, chosen.matched, strict=True)]).to(deltas.dtype)
        regression = self.rules[0].box_coder.encode_single(truth, torch.cat(chosen.boxes))
        loss_cls = F.cross_entropy(logits, labels, reduction="sum")
        loss_box = F.smooth_l1_loss(deltas, regression, reduction="sum", beta=SMOOTH_L1_BETA)
        count = count_for(loss_cls, len(labels))
        return {"loss_cls": loss_cls / count, "loss_box_reg": loss_box / count}

    def box_logits(self, features: dict[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(R, C + 1) class logits, background first, and (R, 4 (C + 1)) box deltas of all images' boxes in order."""
        logits, deltas = self.box_predictor(self.roi_vectors(self.box_pool(features, boxes, [])))
        return at_least_fp32(logits), at_least_fp32(deltas)

    def roi_vectors(self, pooled: Tensor) -> Tensor:
        """(R, C, resolution, resolution) → (R, what `box_predictor` takes)."""
        raise NotImplementedError

    def branch_loss(self, features: dict[str, Tensor], rois: Rois, targets: list[Target]) -> dict[str, Tensor]:
        """Losses of further branches on the positive `rois`."""
        return {}

    def branch_decode(self, features: dict[str, Tensor], boxes: list[Tensor], predictions: list[Predictions]) -> None:
        """Add what further branches say about the detected `boxes` (in the precision of the network)."""


class FasterRcnnHead(TwoStageHead):
    """Boxes from two fully connected layers per RoI."""

    Config = FasterRcnnConfig

    def __init__(self, config: Any, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        self.channels = spec.width(self.roi_levels)
        self.box_head: nn.Module = TwoMLPHead(self.channels * config.box_resolution**2, config.box_channels)
        self.box_predictor = FastRCNNPredictor(config.box_channels, len(spec.classes) + 1)

    def roi_vectors(self, pooled: Tensor) -> Tensor:
        return self.box_head(pooled)
