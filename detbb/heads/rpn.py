"""The region proposal network: what two-stage heads look at first (Faster R-CNN, arXiv:1506.01497, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from detbb.config.schema import HeadConfig, NonEmpty, Share, at_most
from detbb.core.errors import UserError
from detbb.distributed.collectives import shared_count
from detbb.heads.base import HeadSpec
from detbb.heads.sampling import SeededSampler
from detbb.modeling.precision import at_least_fp32
from detbb.structures.batch import ImageSize, Target

SMOOTH_L1_BETA = 1 / 9  # torchvision's, for both stages


class RpnConfig(HeadConfig):
    """What all two-stage heads take for their first stage."""

    levels: list[str] = ["p2", "p3", "p4", "p5", "pool"]
    """Feature levels that proposals are made on, finest first."""
    anchor_sizes: NonEmpty[NonEmpty[PositiveFloat]] = [[32.0], [64.0], [128.0], [256.0], [512.0]]
    """Anchor sizes of each level: square roots of areas, in pixels of the resized image."""
    anchor_ratios: NonEmpty[PositiveFloat] = [0.5, 1.0, 2.0]
    """Height over width of the anchors, on every level."""
    rpn_pre_nms_train: PositiveInt = 2000
    """Training: the highest scored anchors of each level that go into NMS."""
    rpn_post_nms_train: PositiveInt = 2000
    """Training: proposals per image after NMS."""
    rpn_pre_nms_test: PositiveInt = 1000
    """Evaluation: the highest scored anchors of each level that go into NMS."""
    rpn_post_nms_test: PositiveInt = 1000
    """Evaluation: proposals per image after NMS."""
    rpn_nms_threshold: Share = 0.7
    """IoU above which the lower scored of two proposals of a level is dropped."""
    rpn_foreground_iou: Share = 0.7
    """Anchors with at least this IoU to a box are positive (and the best anchors of each box)."""
    rpn_background_iou: Annotated[Share, at_most("rpn_foreground_iou")] = 0.3
    """Anchors with less than this IoU to all boxes are negative; those in between are not trained."""
    rpn_samples: PositiveInt = 256
    """Anchors per image that are trained."""
    rpn_positive_fraction: Share = 0.5
    """Largest share of positives among them."""


@dataclass
class RpnOutput:
    """B images, N anchors over all levels; fp32 (fp64 under `precision: fp64`)."""

    objectness: Tensor  # (B, N) logits
    deltas: Tensor  # (B, N, 4)
    anchors: Tensor  # (N, 4) xyxy, the same for every image
    level_counts: list[int]  # anchors of each level; sum N


def count_for(loss: Tensor, count: int) -> Tensor:
    """What a loss that sums over `count` items of this process is divided by, see `shared_count`."""
    return shared_count(torch.tensor(float(count), dtype=loss.dtype, device=loss.device)).to(loss.dtype)


class Rpn(nn.Module):
    """Objectness and box deltas on every level, and the proposals and losses that follow from them."""

    def __init__(self, config: RpnConfig, spec: HeadSpec) -> None:
        super().__init__()
        self.levels = spec.pick(config.levels)
        self.stride = spec.strides[self.levels[0]]
        ratios, sizes = tuple(config.anchor_ratios), tuple(tuple(s) for s in config.anchor_sizes)
        if len(sizes) != len(self.levels) or len({len(s) for s in sizes}) > 1:
            raise UserError(
                f"heads.{spec.name}.anchor_sizes: lists of {[len(s) for s in sizes]} sizes; valid is one list for each "
                f"of the {len(self.levels)} levels {', '.join(self.levels)}, all of one length"
            )
        self.head = RPNHead(spec.width(self.levels), len(sizes[0]) * len(ratios))
        self.sampler = SeededSampler(config.rpn_samples, config.rpn_positive_fraction, f"{spec.name}/rpn")

        rules = RegionProposalNetwork(
            AnchorGenerator(sizes, (ratios,) * len(sizes)),
            nn.Identity(),
            config.rpn_foreground_iou,
            config.rpn_background_iou,
            config.rpn_samples,
            config.rpn_positive_fraction,
            {"training": config.rpn_pre_nms_train, "testing": config.rpn_pre_nms_test},
            {"training": config.rpn_post_nms_train, "testing": config.rpn_post_nms_test},
            config.rpn_nms_threshold,
        )
        # torchvision's matching and filtering: no parameters, so no submodule, and `proposals` alone sets its mode.
        self.rules = (rules,)

    def forward(self, features: dict[str, Tensor]) -> RpnOutput:
        maps = [features[level] for level in self.levels]
        objectness, deltas = self.head(maps)  # of each level (B, A, h, w) and (B, 4 A, h, w), A anchors a cell
        objectness = [at_least_fp32(o) for o in objectness]
        deltas = [at_least_fp32(d) for d in deltas]
        # As in torchvision, a level's stride is what divides the padded image, not the nominal one.
        batch, (height, width) = len(maps[0]), (side * self.stride for side in maps[0].shape[-2:])
        grids = [list(f.shape[-2:]) for f in maps]
        generator = self.rules[0].anchor_generator
        generator.set_cell_anchors(objectness[0].dtype, objectness[0].device)
        anchors = generator.grid_anchors(grids, [[height // h, width // w] for h, w in grids])
        flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
        flat_objectness, flat_deltas = flat_objectness.view(batch, -1), flat_deltas.view(batch, -1, 4)
        return RpnOutput(flat_objectness, flat_deltas, torch.cat(anchors), [len(a) for a in anchors])

    @torch.no_grad()
    def proposals(self, output: RpnOutput, sizes: list[ImageSize], use: Literal["train", "test"]) -> list[Tensor]:
        """(n, 4) xyxy for each image, inside it, best first. No gradient goes through them."""
        rules = self.rules[0].train(use == "train")
        boxes = rules.box_coder.decode(output.deltas.flatten(0, 1), [output.anchors] * len(sizes))  # (B N, 1, 4)
        hw = [s.hw for s in sizes]
        return rules.filter_proposals(boxes.view(len(sizes), -1, 4), output.objectness, hw, output.level_counts)[0]

    def loss(self, output: RpnOutput, targets: list[Target]) -> dict[str, Tensor]:
        """`loss_rpn_cls` and `loss_rpn_loc`, both over the number of sampled anchors."""
        rules, anchors = self.rules[0], output.anchors
        boxes = [{"boxes": t.boxes.to(anchors)} for t in targets]
        labels, matched = rules.assign_targets_to_anchors([anchors] * len(targets), boxes)  # of each image (N,), (N, 4)
        logits, truth, deltas, regression = [], [], [], []
        for i, target in enumerate(targets):
            positive, negative = self.sampler(labels[i], target.seed)
            sampled = torch.cat([positive, negative])  # objectness learns both, the deltas only the positives
            logits.append(output.objectness[i, sampled])
            truth.append(labels[i][sampled].to(logits[-1]))
            deltas.append(output.deltas[i, positive])
            regression.append(rules.box_coder.encode_single(matched[i][positive].to(anchors), anchors[positive]))
        loss_cls = F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(truth), reduction="sum")
        loss_loc = F.smooth_l1_loss(torch.cat(deltas), torch.cat(regression), reduction="sum", beta=SMOOTH_L1_BETA)
        count = count_for(loss_cls, sum(len(t) for t in truth))
        return {"loss_rpn_cls": loss_cls / count, "loss_rpn_loc": loss_loc / count}
