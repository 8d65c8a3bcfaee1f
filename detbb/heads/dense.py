"""What heads share that predict boxes at every cell of several levels (FCOS, RetinaNet).

Numerically this is torchvision's FCOS and RetinaNet, written over the whole batch and without waiting for the device.
Shapes: B images, N anchors over all levels, C classes, M boxes of the batch.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import batched_nms, clip_boxes_to_image

from detbb.config.schema import HeadConfig, Norm, Share
from detbb.heads.base import Head, HeadSpec
from detbb.modeling.precision import at_least_fp32
from detbb.structures.batch import Batch, ImageSize
from detbb.structures.predictions import Predictions

CACHED_ELEMENTS = 1 << 17  # a tensor of this size stays in a core's cache during a chain of operations


class DenseConfig(HeadConfig):
    """The keys of heads that predict boxes at every cell."""

    levels: list[str] = ["p3", "p4", "p5", "p6", "p7"]
    """Feature levels, all with the same number of channels."""
    num_convs: NonNegativeInt = 4
    """3×3 convolutions in the classification tower and in the box tower."""
    norm: Norm | None = None
    """The norm after each of them; `null`: none."""
    norm_eval: bool = False
    """`true`: running statistics stay fixed in this head."""
    norm_affine: bool = True
    """`false`: norm weight and bias are not trained in this head."""
    prior_probability: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Score of every class that the fresh head starts with (focal loss, section 4.1)."""
    focal_alpha: Share = 0.25
    """Focal loss: weight of positives, in [0, 1]; negatives have 1 - alpha."""
    focal_gamma: NonNegativeFloat = 2.0
    """Focal loss: how much less well-classified anchors count."""
    score_threshold: Share = 0.05
    """Least score that enters NMS, in evaluation too."""
    nms_threshold: Share = 0.5
    """IoU above which NMS drops the lower-scored of two boxes of one class."""
    topk_candidates: PositiveInt = 1000
    """How many best (cell, class) pairs of each level enter NMS."""
    detections_per_image: PositiveInt = 100
    """How many detections are kept after NMS."""


class Grid(NamedTuple):
    """The cells of one level; cell (row, column) is at pixel (row * stride_y, column * stride_x)."""

    height: int
    width: int
    stride_y: int  # padded image height // height, as in torchvision: not the nominal stride when that does not divide
    stride_x: int
    nominal_stride: int


class DenseOutput(NamedTuple):
    """What a dense head's `forward` returns; anchors in the order level, row, column, anchor shape."""

    logits: Tensor  # (B, N, C)
    deltas: Tensor  # (B, N, 4)
    centerness: Tensor | None  # (B, N) logits
    grids: tuple[Grid, ...]


class DenseHead(Head):
    """Anchors, scores and NMS. Subclasses build the towers and `anchor_generator`, and define `loss` and `boxes`."""

    last_layers = ("classification_head.cls_logits",)
    config: DenseConfig
    anchor_generator: AnchorGenerator

    def __init__(self, config: DenseConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        self.picked_levels = spec.pick(config.levels)
        self.in_channels = spec.width(self.picked_levels)
        self.num_classes = len(spec.classes)

    def boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """The predicted boxes (n, 4) of n anchors."""
        raise NotImplementedError

    def grids(self, features: list[Tensor]) -> tuple[Grid, ...]:
        strides = [self.spec.strides[level] for level in self.picked_levels]
        height, width = (int(side) * strides[0] for side in features[0].shape[-2:])
        cells = [f.shape[-2:] for f in features]
        return tuple(Grid(h, w, height // h, width // w, s) for (h, w), s in zip(cells, strides, strict=True))

    def anchors(self, output: DenseOutput) -> Tensor:
        """(N, 4) xyxy, the same for every image."""
        logits = at_least_fp32(output.logits)
        self.anchor_generator.set_cell_anchors(logits.dtype, logits.device)
        cells = [[g.height, g.width] for g in output.grids]
        strides = [[g.stride_y, g.stride_x] for g in output.grids]
        return torch.cat(self.anchor_generator.grid_anchors(cells, strides))

    def decode(self, output: DenseOutput, sizes: list[ImageSize]) -> list[Predictions]:
        scores = at_least_fp32(output.logits).sigmoid()
        if output.centerness is not None:
            scores = (scores * at_least_fp32(output.centerness).sigmoid()[..., None]).sqrt()
        anchors, deltas = self.anchors(output), at_least_fp32(output.deltas)  # (N, 4), (B, N, 4)
        shapes = self.anchor_generator.num_anchors_per_location()
        counts = [g.height * g.width * n for g, n in zip(output.grids, shapes, strict=True)]
        picked_scores, picked = [], []  # (B, k) of each level; picked counts (anchor, class) pairs over all levels
        first = 0
        # Each level sends its best: else the many cells of the finest one would crowd out the others.
        for level in scores.split(counts, dim=1):
            pairs = level.flatten(1)  # (B, N of the level, C) -> (B, pairs)
            best = pairs.topk(min(self.config.topk_candidates, pairs.shape[1]))
            picked_scores.append(best.values)
            picked.append(best.indices + first)
            first += pairs.shape[1]
        rows = zip(torch.cat(picked_scores, 1), torch.cat(picked, 1), deltas, sizes, strict=True)
        return [self.suppress(best, pairs, of_all, anchors, size) for best, pairs, of_all, size in rows]

    def suppress(self, scores: Tensor, pairs: Tensor, deltas: Tensor, anchors: Tensor, size: ImageSize) -> Predictions:
        """One image's detections. scores, pairs: (k,) of its candidates; deltas: (N, 4) of all its anchors."""
        above = scores > self.config.score_threshold
        scores, pairs = scores[above], pairs[above]
        anchor, labels = pairs // self.num_classes, pairs % self.num_classes  # a pair counts anchor * C + class
        boxes = clip_boxes_to_image(self.boxes(deltas[anchor], anchors[anchor]), size.hw)
        keep = batched_nms(boxes, scores, labels, self.config.nms_threshold)[: self.config.detections_per_image]
        return Predictions(boxes=boxes[keep].float(), scores=scores[keep].float(), labels=labels[keep])

    def focal_loss(self, logits: Tensor, rows: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Focal loss of each row, summed over classes (Lin et al. 2017, equation 5): logits (N, C) to (N,).

        Class `labels[k]` is present in row `rows[k]` where `present[k]` is 1, and absent where it is 0; a pair may come
        again with 0. The graph can be gone through backward once.
        """
        return _FocalLoss.apply(logits, rows, labels, present, (self.config.focal_alpha, self.config.focal_gamma))


class _FocalLoss(torch.autograd.Function):
    """The loss and its derivative at once. Backward scales the latter in place and needs no other such tensor."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, labels: Tensor, present: Tensor, focal: tuple[float, float]
    ) -> Tensor:
        alpha, gamma = focal
        losses, slopes = logits.new_empty(len(logits)), logits.new_empty(logits.shape)  # contiguous
        at_once = len(logits) if logits.is_cuda else CACHED_ELEMENTS // max(logits.shape[1], 1)
        for x, loss, slope in zip(*(t.split(max(at_once, 1)) for t in (logits, losses, slopes)), strict=True):
            cost = _absent(x, gamma, slope)
            slope.mul_(1 - alpha)
            torch.sum(cost.mul_(1 - alpha), -1, out=loss)
        x = logits[rows, labels]
        absent_slope, present_slope = torch.empty_like(x), torch.empty_like(x)
        absent, there = _absent(x, gamma, absent_slope), _absent(-x, gamma, present_slope)
        losses.index_add_(0, rows, (alpha * there - (1 - alpha) * absent) * present)
        change = (alpha * present_slope + (1 - alpha) * absent_slope) * -present
        slopes.view(-1).scatter_add_(0, rows * logits.shape[1] + labels, change)
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.saved_tensors[0].mul_(grad[:, None]), None, None, None, None


def _absent(x: Tensor, gamma: float, slope: Tensor) -> Tensor:
    """p^gamma * -log(1 - p) with p = sigmoid(x), and its derivative in `slope`. A present class has that of -x."""
    p, cost = x.sigmoid(), _softplus(x)
    torch.neg(p, out=slope).add_(1).mul_(gamma).mul_(cost).add_(p)
    scale = p.pow_(gamma)
    slope.mul_(scale)
    return cost.mul_(scale)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), to rounding.

    On CPU, PyTorch's log1p takes one number at a time and its log many. log(u) + (e - (u - 1)) / u with u = 1 + e is
    log1p(e) to rounding, since u - 1 and the difference are exact.
    """
    if x.is_cuda:
        return F.softplus(x)
    e = x.abs().neg_().exp_()
    u = e + 1
    return u.log().add_(e.sub_(u - 1).div_(u)).add_(x.clamp(min=0))


def batch_boxes(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All boxes (M, 4) of a batch in the dtype of `like`, their labels (M,) and the number of their image (M,)."""
    image = [torch.full_like(target.labels, i) for i, target in enumerate(batch.targets)]
    boxes = torch.cat([target.boxes for target in batch.targets]).to(like.dtype)
    return boxes, torch.cat([target.labels for target in batch.targets]), torch.cat(image)


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - GIoU of pairs of xyxy boxes (P, 4): (P,) (Rezatofighi et al. 2019).

    torchvision's `generalized_box_iou_loss` without its boolean indexing, which waits for the device.
    """
    inner = (torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])).clamp(min=0)
    hull = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    intersection, enclosing = _area(inner), _area(hull)
    union = _area(boxes[:, 2:] - boxes[:, :2]) + _area(targets[:, 2:] - targets[:, :2]) - intersection
    return 1 - intersection / (union + 1e-7) + (enclosing - union) / (enclosing + 1e-7)


def _area(sides: Tensor) -> Tensor:
    return sides[:, 0] * sides[:, 1]
