"""Image classification: which class, or which classes, an image shows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detbb.config.schema import BelowOne, HeadConfig
from detbb.core.errors import UserError
from detbb.distributed.collectives import shared_count
from detbb.heads.base import Head, HeadSpec
from detbb.metrics.evaluators import ClassificationEvaluator
from detbb.modeling.precision import at_least_fp32
from detbb.structures.annotations import Annotations
from detbb.structures.batch import Batch, ImageSize
from detbb.structures.predictions import Predictions


class ClassifyConfig(HeadConfig):
    """A linear classifier on averaged features."""

    levels: list[str] = ["p5"]
    """Feature levels (`layer4` with `neck: {type: none}`); of several, the logits are summed."""
    multi_label: bool = False
    """`false`: each image shows exactly one class (softmax); `true`: any number of them (sigmoids)."""
    dropout: BelowOne = 0.0
    """Share of feature channels that are zeroed in training."""


class ClassifyHead(Head):
    """Linear logits of each cell, averaged over the image's own area, so that padding does not matter."""

    Config = ClassifyConfig
    needs = "labels"
    main_metric = "cls/accuracy"  # multi_label: cls/mAP
    last_layers = ("classifier",)

    def __init__(self, config: ClassifyConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        if config.multi_label:
            self.main_metric = "cls/mAP"
        self.picked_levels = spec.pick(config.levels)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.ModuleDict(
            {level: nn.Conv2d(spec.channels[level], len(spec.classes), kernel_size=1) for level in self.picked_levels}
        )

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> Tensor:
        """Logits (B, C), in float32 at least."""
        # The mean comes after the linear layer: the other order rounds differently, old results would change.
        cells = {level: linear(self.dropout(features[level])) for level, linear in self.classifier.items()}
        rows = []
        for i, size in enumerate(sizes):
            means = []
            for level, logits in cells.items():
                height, width = self.own_cells(level, size)
                means.append(at_least_fp32(logits[i, :, :height, :width]).mean((1, 2)))  # (C, h, w) -> (C,)
            rows.append(torch.stack(means).sum(0))
        return torch.stack(rows)

    def loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`loss_cls`: cross entropy, a mean over the images of all ranks."""
        present = torch.stack([target.image_labels for target in batch.targets])  # (B, C)
        if self.config.multi_label:
            total = F.binary_cross_entropy_with_logits(output, present.to(output.dtype), reduction="none").mean(1).sum()
        else:  # `check_data` has seen to exactly one class an image
            total = F.cross_entropy(output, present.long().argmax(1), reduction="sum")
        return {"loss_cls": total / shared_count(torch.full((), len(output), device=output.device))}

    def decode(self, output: Tensor, sizes: list[ImageSize]) -> list[Predictions]:
        probabilities = output.sigmoid() if self.config.multi_label else output.softmax(1)
        return [Predictions(probabilities=row.float()) for row in probabilities]

    def check_data(self, annotations: Annotations) -> None:
        """Raise UserError if an image does not show exactly one class and `multi_label` is off."""
        if self.config.multi_label:
            return
        image = np.repeat(np.arange(len(annotations)), np.diff(annotations.first))
        pairs = np.unique(np.stack([image, annotations.labels]), axis=1)
        counts = np.bincount(pairs[0], minlength=len(annotations))
        if (counts != 1).any():
            wrong = int((counts != 1).argmax())
            raise UserError(
                f"heads.{self.spec.name}.multi_label: false, but image {annotations.image_ids[wrong]} of "
                f"{annotations.root} shows {counts[wrong]} classes; valid is exactly one"
            )

    def evaluator(self, annotations: Annotations, *, engine: str = "hotcoco") -> ClassificationEvaluator:
        return ClassificationEvaluator(annotations, multi_label=self.config.multi_label)
