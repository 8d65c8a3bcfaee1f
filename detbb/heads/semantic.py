"""Semantic segmentation on the neck: a label for every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from detbb.config.schema import HeadConfig, Norm
from detbb.data.formats.semantic import IGNORE
from detbb.distributed.collectives import shared_count
from detbb.heads.base import Head, HeadSpec
from detbb.metrics.evaluators import SemanticEvaluator
from detbb.modeling.norm import norm_layer
from detbb.modeling.precision import at_least_fp32
from detbb.structures.annotations import Annotations
from detbb.structures.batch import Batch, ImageSize
from detbb.structures.predictions import Predictions


class SemanticConfig(HeadConfig):
    """A small fully convolutional head that sums several levels."""

    levels: list[str] = ["p3", "p4", "p5"]
    """Feature levels; the finest one sets the resolution of the logits."""
    channels: PositiveInt = 128
    """Channels of each level's convolution."""
    norm: Norm | None = "gn"
    """The norm after each convolution; `null`: none."""
    norm_eval: bool = False
    """`true`: running statistics stay fixed in this head."""
    norm_affine: bool = True
    """`false`: norm weight and bias are not trained in this head."""


class SemanticHead(Head):
    """3×3 convolution of each level, summed at the finest, 1×1 logits (after panoptic FPN, arXiv 1901.02446)."""

    Config = SemanticConfig
    needs = "semantic"
    main_metric = "sem/mIoU"
    last_layers = ("classifier",)

    def __init__(self, config: SemanticConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        self.picked_levels = spec.pick(config.levels)
        self.convs = nn.ModuleDict()
        for level in self.picked_levels:
            norm = norm_layer(config.norm)
            self.convs[level] = Conv2dNormActivation(spec.channels[level], config.channels, norm_layer=norm)
        self.classifier = nn.Conv2d(config.channels, len(spec.classes), kernel_size=1)

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> Tensor:
        """Logits (B, C, h, w) at the finest level, padding included."""
        finest, *coarser = self.picked_levels
        summed = self.convs[finest](features[finest])
        for level in coarser:
            summed = summed + _resize(self.convs[level](features[level]), summed.shape[-2:])
        return self.classifier(summed)

    def loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`loss_sem`: cross entropy of every pixel, a mean over the labelled pixels of all ranks."""
        logits = self.at_input_resolution(output)
        target = torch.full_like(logits[:, 0], IGNORE, dtype=torch.long)  # (B, H, W)
        for row, one in zip(target, batch.targets, strict=True):
            assert one.semantic is not None
            row[: one.semantic.shape[0], : one.semantic.shape[1]] = one.semantic
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return {"loss_sem": total / shared_count((target != IGNORE).sum())}

    def decode(self, output: Tensor, sizes: list[ImageSize]) -> list[Predictions]:
        found = []
        for row, size in zip(output, sizes, strict=True):  # one at a time: C maps are large
            logits = self.at_input_resolution(row[None])[0, :, : size.hw[0], : size.hw[1]]
            found.append(Predictions(semantic=logits.float()))
        return found

    def at_input_resolution(self, logits: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h stride, w stride): every cell covers its stride, whatever the padding is."""
        stride = self.spec.strides[self.picked_levels[0]]
        return _resize(at_least_fp32(logits), [side * stride for side in logits.shape[-2:]])

    def evaluator(self, annotations: Annotations, *, engine: str = "hotcoco") -> SemanticEvaluator:
        return SemanticEvaluator(annotations)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
