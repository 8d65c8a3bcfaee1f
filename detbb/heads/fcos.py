"""FCOS: every cell inside a box predicts the distances to its four sides (Tian et al. 2020, arXiv 2006.09214).

Letters in shapes: B images, N cells over all levels, C classes, M boxes of the batch, P (cell, box) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead

from detbb.config.schema import Norm, Share
from detbb.distributed.collectives import shared_count
from detbb.heads.base import HeadSpec
from detbb.heads.dense import DenseConfig, DenseHead, DenseOutput, Grid, batch_boxes, giou_loss
from detbb.modeling.norm import norm_layer
from detbb.modeling.precision import at_least_fp32
from detbb.structures.batch import Batch, ImageSize


class FcosConfig(DenseConfig):
    """FCOS on FPN levels; the defaults are torchvision's `fcos_resnet50_fpn`, evaluated from score 0.05 on."""

    norm: Norm | None = "gn"
    """The norm after each tower convolution; `null`: none."""
    nms_threshold: Share = 0.6
    """IoU above which NMS drops the lower-scored of two boxes of one class."""
    center_sampling_radius: PositiveFloat = 1.5
    """A cell learns a box only this near to the box centre, in strides, along each axis."""


class Candidates(NamedTuple):
    """(cell, box) pairs that could be positive. P depends on shapes alone, so nothing waits for the device."""

    cell: Tensor  # (P,) in [0, B * N]
    box: Tensor  # (P,) in [0, M)
    won: Tensor  # (P,) bool: the cell learns this box; at most one pair of each cell


class FcosHead(DenseHead):
    """torchvision's FCOS towers; losses and detections equal torchvision's `FCOS`."""

    Config = FcosConfig
    config: FcosConfig

    def __init__(self, config: FcosConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        norm = norm_layer(config.norm) or (lambda channels: nn.Identity())  # None would mean torchvision's GroupNorm
        self.classification_head = FCOSClassificationHead(
            self.in_channels, 1, self.num_classes, config.num_convs, config.prior_probability, norm
        )
        self.regression_head = FCOSRegressionHead(self.in_channels, 1, config.num_convs, norm)
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True  # no norm needs its output again
        sides = tuple((spec.strides[level],) for level in self.picked_levels)
        self.anchor_generator = AnchorGenerator(sides, ((1.0,),) * len(sides))
        self.box_coder = BoxLinearCoder(normalize_by_size=True)

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> DenseOutput:
        maps = [features[level] for level in self.picked_levels]
        deltas, centerness = self.regression_head(maps)
        return DenseOutput(self.classification_head(maps), deltas, centerness.squeeze(2), self.grids(maps))

    def boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode(deltas, anchors)

    def loss(self, output: DenseOutput, batch: Batch) -> dict[str, Tensor]:
        """Focal, GIoU and centre-ness loss, each a sum over the number of positive cells of all ranks."""
        assert output.centerness is not None
        logits = at_least_fp32(output.logits).flatten(0, 1)  # (B N, C)
        deltas = at_least_fp32(output.deltas).flatten(0, 1)  # (B N, 4)
        centerness = at_least_fp32(output.centerness).flatten()  # (B N,)
        boxes, labels, image = batch_boxes(batch, logits)  # (M, 4), (M,), (M,)
        cell, box, won = self.assign(boxes, image, output)  # (P,) each
        cell = cell.clamp(max=len(logits) - 1)  # unmatched pairs read some cell; their weight is 0
        # Weights of 0 and 1 instead of a selection, whose size the device would have to be asked for.
        weight = won.to(logits.dtype)
        count = shared_count(weight.sum())

        anchors = self.anchors(output)  # (N, 4)
        anchors = anchors[cell % len(anchors)]  # (P, 4)
        sides = self.box_coder.encode(anchors, boxes[box])  # (P, 4): left, top, right, bottom
        left_right, top_bottom = sides[:, 0::2], sides[:, 1::2]  # (P, 2)
        # Centre-ness: 1 in the middle of the box, 0 at its border.
        shares = (left_right.amin(1) / left_right.amax(1)) * (top_bottom.amin(1) / top_bottom.amax(1))
        target = torch.where(won, shares, 0.0).sqrt()
        box_loss = giou_loss(self.boxes(deltas[cell], anchors), boxes[box])
        centerness_loss = F.binary_cross_entropy_with_logits(centerness[cell], target, reduction="none")
        cls_loss = self.focal_loss(logits, cell, labels[box], weight).sum()
        return {
            "loss_cls": cls_loss / count,
            "loss_box_reg": (box_loss * weight).sum() / count,
            "loss_centerness": (centerness_loss * weight).sum() / count,
        }

    @torch.no_grad()
    def assign(self, boxes: Tensor, image: Tensor, output: DenseOutput) -> Candidates:
        """Which cell learns which box. boxes: (M, 4) xyxy; image: (M,), the number of each box's image in the batch.

        A cell learns a box that it lies in, if it is near the box's centre and the farthest side is within its level's
        range; of several such boxes, the smallest. Only the cells around each centre are looked at: M × tens of pairs
        instead of M × N.
        """
        batch_size, num_cells = output.logits.shape[:2]
        nowhere = batch_size * num_cells  # where pairs that do not match are sent
        pairs = [
            torch.where(near, cell + image[:, None] * num_cells, nowhere)
            for cell, near in self.nearby(boxes, output.grids)
        ]
        cell = torch.cat(pairs, dim=1)  # (M, P / M)
        box = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(cell).flatten()  # (P,)
        cell = cell.flatten()  # (P,)
        # torchvision's ranking: in float32, boxes of nearly the same area tie, and then the first box wins
        rank = (1e8 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[box]
        # Per cell the highest rank, then of the boxes with that rank the first.
        best = rank.new_full((nowhere + 1,), -torch.inf).scatter_reduce(0, cell, rank, "amax")
        contender = torch.where(rank == best[cell], cell, nowhere)
        first = box.new_full((nowhere + 1,), len(boxes)).scatter_reduce(0, contender, box, "amin")
        return Candidates(cell, box, (contender < nowhere) & (first[cell] == box))

    def nearby(self, boxes: Tensor, grids: tuple[Grid, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each level, k cells around each box's centre (M, k), numbered over all levels, and which may learn it."""
        first = 0
        for grid, (lower, upper) in zip(grids, _ranges(grids), strict=True):
            reach = self.config.center_sampling_radius * grid.nominal_stride
            column, far_x, near_x = _along_axis(boxes[:, 0], boxes[:, 2], (grid.width, grid.stride_x), reach)
            row, far_y, near_y = _along_axis(boxes[:, 1], boxes[:, 3], (grid.height, grid.stride_y), reach)
            far = torch.maximum(far_y[:, :, None], far_x[:, None, :])  # (M, rows, columns)
            near = near_y[:, :, None] & near_x[:, None, :] & (far > lower) & (far < upper)
            cell = first + row[:, :, None] * grid.width + column[:, None, :]
            yield cell.flatten(1), near.flatten(1)
            first += grid.height * grid.width


def _ranges(grids: tuple[Grid, ...]) -> list[tuple[float, float]]:
    """(lower, upper) of each level in pixels: a cell learns a box whose farthest side is strictly between."""
    edges = [0.0, *(4.0 * grid.nominal_stride for grid in grids[1:])]
    return [*zip(edges, [8.0 * grid.nominal_stride for grid in grids[:-1]] + [math.inf], strict=True)]


def _along_axis(low: Tensor, high: Tensor, cells: tuple[int, int], reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (M, k) of cells near the centre between `low` and `high`, distances to the farther end, whether to use.

    `cells`: their number and stride along this axis.
    """
    count, stride = cells
    center = (low + high) / 2
    span = int(2 * reach / stride) + 2
    start = ((center - reach) / stride).floor().long() if span < count else torch.zeros_like(low, dtype=torch.long)
    index = start[:, None] + torch.arange(min(span, count), device=low.device)  # (M, k)
    at = (index * stride).to(low.dtype)
    to_low, to_high = at - low[:, None], high[:, None] - at
    inside = (torch.minimum(to_low, to_high) > 0) & (index >= 0) & (index < count)
    return index, torch.maximum(to_low, to_high), inside & ((at - center[:, None]).abs() < reach)
