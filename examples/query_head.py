"""A set-prediction branch after DETR (Carion et al. 2020, arXiv 2005.12872): queries, no anchors and no NMS.

Letters in shapes: B images, Q queries, L cells of the level, D width, C classes, n objects of one image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image, generalized_box_iou

from detbb.distributed.collectives import shared_count
from detbb.heads import Head, HeadConfig, HeadSpec, Predictions
from detbb.structures.batch import Batch, ImageSize


class QueryConfig(HeadConfig):
    """A transformer decoder over one feature level."""

    levels: list[str] = ["p5"]
    """The feature level that the queries attend to."""
    queries: PositiveInt = 30
    """Objects that an image can have at most."""
    layers: PositiveInt = 2
    """Decoder layers."""


class QueryOutput(NamedTuple):
    logits: Tensor  # (B, Q, C + 1), the last class is no object
    boxes: Tensor  # (B, Q, 4) centre x, centre y, width, height as shares of each image's own width and height


class QueryHead(Head):
    """Each query attends to the cells of its image, never to the padding, and says one object or none."""

    Config, last_layers = QueryConfig, ("classifier",)

    def __init__(self, config: QueryConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        (self.level,) = spec.pick(config.levels)
        width = spec.channels[self.level]
        self.queries = nn.Parameter(torch.randn(config.queries, width))
        self.place = nn.Linear(2, width)
        layer = nn.TransformerDecoderLayer(width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, config.layers)
        self.classifier = nn.Linear(width, len(spec.classes) + 1)
        self.box = nn.Linear(width, 4)

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> QueryOutput:
        cells = features[self.level].flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, L, D)
        mask = self.image_mask(self.level, features, sizes)  # (B, h, w)
        own = torch.tensor([self.own_cells(self.level, size) for size in sizes]).to(cells)  # (B, 2)
        places = torch.stack([mask.cumsum(1), mask.cumsum(2)], dim=-1) / own[:, None, None]  # (B, h, w, 2): y and x
        memory = cells + self.place(places.flatten(1, 2).to(cells))
        queries = self.queries.expand(len(cells), -1, -1)  # (B, Q, D)
        found = self.decoder(queries, memory, memory_key_padding_mask=~mask.flatten(1))
        return QueryOutput(self.classifier(found).float(), self.box(found).float().sigmoid())

    def loss(self, output: QueryOutput, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of all queries; L1 and GIoU of those that are matched, over the objects of all ranks."""
        labels = torch.full_like(output.logits[..., 0], len(self.spec.classes), dtype=torch.long)  # (B, Q): no object
        distance = overlap = output.boxes.sum() * 0  # reaches every parameter, also without objects
        for logits, boxes, row, target in zip(*output, labels, batch.targets, strict=True):
            height, width = target.size.hw
            truth = box_convert(target.boxes / target.boxes.new_tensor([width, height] * 2), "xyxy", "cxcywh")  # (n, 4)
            giou = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes, truth)))  # (Q, n)
            cost = 5 * torch.cdist(boxes, truth, p=1) - 2 * giou - logits.softmax(-1)[:, target.labels]
            query, one = (torch.as_tensor(i) for i in linear_sum_assignment(cost.detach().cpu()))
            row[query] = target.labels[one]
            distance = distance + (boxes[query] - truth[one]).abs().sum()
            overlap = overlap + (1 - giou[query, one]).sum()
        count = shared_count(torch.tensor(float(sum(len(t.boxes) for t in batch.targets)), device=labels.device))
        queries = shared_count(torch.tensor(float(labels.numel()), device=labels.device))
        cls_loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum") / queries
        return {"loss_cls": cls_loss, "loss_l1": 5 * distance / count, "loss_giou": 2 * overlap / count}

    def decode(self, output: QueryOutput, sizes: list[ImageSize]) -> list[Predictions]:
        predictions = []
        for logits, boxes, size in zip(*output, sizes, strict=True):
            scores, labels = logits.softmax(-1)[:, :-1].max(-1)  # (Q,)
            order = scores.argsort(descending=True)
            boxes = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([*size.hw[::-1], *size.hw[::-1]])
            boxes = clip_boxes_to_image(boxes, size.hw)[order]
            predictions.append(Predictions(boxes=boxes, scores=scores[order], labels=labels[order]))
        return predictions
