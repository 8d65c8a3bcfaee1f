"""What a branch is: a named head with its own data, loss, decoding and metric."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from detbb.config.schema import BackboneConfig, HeadConfig
from detbb.core.errors import UserError
from detbb.metrics.coco_ap import Kind
from detbb.metrics.evaluators import CocoEvaluator, Evaluator
from detbb.structures.annotations import Annotations
from detbb.structures.batch import Batch, ImageSize
from detbb.structures.predictions import Predictions as Predictions

HeadOutput = Any  # what `forward` hands to `loss` and `decode`; each head says what it is


@dataclass(frozen=True)
class HeadSpec:
    """What the detector tells a head when it builds it."""

    name: str
    classes: tuple[str, ...]
    channels: dict[str, int]  # of every level that backbone and neck offer
    strides: dict[str, int]  # input pixels per cell of each level
    backbone: BackboneConfig  # heads that hold backbone stages (C4) follow its arch and norm
    keypoints: tuple[str, ...] = ()

    def pick(self, levels: Iterable[str]) -> tuple[str, ...]:
        """The named levels, finest first. Raises UserError for none, an unknown one or one named twice."""
        picked = list(levels)
        unknown = [level for level in picked if level not in self.channels]
        if unknown or not picked or len(set(picked)) < len(picked):
            wrong = f"unknown {unknown[0]!r}" if unknown else f"{picked}"
            raise UserError(f"heads.{self.name}.levels: {wrong}; valid are, each once: {', '.join(self.channels)}")
        return tuple(sorted(picked, key=lambda level: self.strides[level]))

    def width(self, levels: Iterable[str]) -> int:
        """The number of channels that all of these levels have. Raises UserError when they differ."""
        widths = {level: self.channels[level] for level in levels}
        if len(set(widths.values())) > 1:
            raise UserError(f"heads.{self.name}.levels: channels differ ({widths}); valid: FPN levels, or one level")
        return next(iter(widths.values()))


class Head(nn.Module):
    """A branch on shared features.

        class CountingHead(detbb.Head): ...  # then, in a configuration, `type: my_package.heads:CountingHead`

    Subclasses set `Config` (type, range and a doc line for each of its keys) and `last_layers`, fill in the methods,
    and set `needs`, `metrics`, `main_metric` and `evaluator` if they do not predict boxes alone. `forward` + `loss` run
    in training, `forward` + `decode` in evaluation; none looks at `self.training`, which is for norms and dropout
    alone. Every parameter of the head must take part in every loss, also for a batch without objects. Loss sums are
    divided by `shared_count` (detbb/distributed/collectives.py), so that the number of processes does not matter.

    Letters in shapes: B images of a padded batch, n objects of one image, C classes, K keypoints.
    """

    Config: ClassVar[type[HeadConfig]] = HeadConfig
    config: Any  # an instance of `Config`
    needs: ClassVar[Literal["boxes", "masks", "keypoints", "semantic", "labels"]] = "boxes"
    metrics: ClassVar[tuple[Kind, ...]] = ("bbox",)  # what COCO's AP is computed of
    main_metric: str = "bbox/AP"  # of its evaluator: what best.pt follows by default
    last_layers: ClassVar[tuple[str, ...]]  # submodules that start fresh when the number of classes changes

    def __init__(self, config: HeadConfig, spec: HeadSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    @classmethod
    def levels(cls, config: Any) -> tuple[str, ...]:
        """The feature levels it reads: stages of the backbone, `p2 … p7` and `pool` of the FPN."""
        return tuple(config.levels)

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> HeadOutput:
        """What the head computes for a padded batch; `loss` and `decode` read it.

        features: {level: (B, spec.channels[level], ceil(H / stride), ceil(W / stride))} of the padded (H, W). sizes: B;
        image i fills the upper left `sizes[i].hw` pixels, the rest is padding (`own_cells` says which cells it has).
        """
        raise NotImplementedError

    def own_cells(self, level: str, size: ImageSize) -> tuple[int, int]:
        """Height and width in cells of the part of a level that shows the image itself, not padding."""
        stride = self.spec.strides[level]
        return math.ceil(size.hw[0] / stride), math.ceil(size.hw[1] / stride)

    def image_mask(self, level: str, features: dict[str, Tensor], sizes: list[ImageSize]) -> Tensor:
        """(B, h, w) bool for a level: true where a cell shows the image itself, false in the padding."""
        (height, width), device = features[level].shape[-2:], features[level].device
        own = torch.tensor([self.own_cells(level, size) for size in sizes], device=device)  # (B, 2)
        rows = torch.arange(height, device=device) < own[:, :1]  # (B, h)
        columns = torch.arange(width, device=device) < own[:, 1:]  # (B, w)
        return rows[:, :, None] & columns[:, None, :]

    def loss(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalars () by name (`loss_cls`, `loss_box_reg`, …), in float32 at least; all are summed.

        batch.targets: B, with boxes (n, 4) xyxy in pixels of the resized image; detbb/structures/batch.py has the rest.
        """
        raise NotImplementedError

    def decode(self, output: HeadOutput, sizes: list[ImageSize]) -> list[Predictions]:
        """B Predictions, each inside `sizes[i].hw`, on the device of the output.

        Boxes (n, 4), scores (n,) descending, labels (n,); detbb/structures/predictions.py has the other fields.
        """
        raise NotImplementedError

    def evaluator(self, annotations: Annotations, *, engine: str = "hotcoco") -> Evaluator:
        """A fresh one for a split: COCO's AP of `metrics`. engine: what computes it, `hotcoco` or `pycocotools`."""
        return CocoEvaluator(annotations, self.metrics, engine=engine)

    def check_data(self, annotations: Annotations) -> None:
        """Raise UserError if this head cannot learn from a split, beyond `needs`; called before step 0."""

    def class_tensors(self) -> tuple[str, ...]:
        """The tensors of `last_layers`: state-dict names below the head."""
        return tuple(f"{n}.{tensor}" for n in self.last_layers for tensor in self.get_submodule(n).state_dict())

    def load_backbone_weights(self, state: dict[str, Tensor]) -> None:
        """Take what this head shares with a classification backbone (torchvision's keys); most heads: nothing."""
