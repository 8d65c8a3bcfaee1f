"""A counting branch: how many objects of each class an image shows, learned from boxes, predicted without any."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from detbb.distributed.collectives import shared_count
from detbb.heads import Evaluator, Head, HeadConfig, HeadSpec, Predictions
from detbb.structures.annotations import Annotations
from detbb.structures.batch import Batch, ImageSize


class CountingConfig(HeadConfig):
    """Where objects have their centre."""

    levels: list[str] = ["p4", "p5"]
    """Feature levels; the finest one sets the resolution."""


class CountingHead(Head):
    """The expected number of centres in each cell; over an image they sum up to its counts."""

    Config, main_metric, last_layers = CountingConfig, "count/exact", ("rate",)

    def __init__(self, config: CountingConfig, spec: HeadSpec) -> None:
        super().__init__(config, spec)
        self.finest, *self.coarser = spec.pick(config.levels)
        self.hidden = nn.Conv2d(sum(spec.channels[level] for level in config.levels), 64, kernel_size=3, padding=1)
        self.rate = nn.Conv2d(64, len(spec.classes), kernel_size=1)
        nn.init.constant_(self.rate.bias, -3.0)  # most cells hold no centre

    def forward(self, features: dict[str, Tensor], sizes: list[ImageSize]) -> Tensor:
        """(B, C, h, w) expected centres, none of them in the padding; in float32 also under autocast."""
        maps = [features[self.finest]]
        maps += [nn.functional.interpolate(features[level], maps[0].shape[-2:]) for level in self.coarser]
        rate = self.rate(torch.relu(self.hidden(torch.cat(maps, dim=1))))
        rate = nn.functional.softplus(rate.to(torch.promote_types(rate.dtype, torch.float32)))
        return rate * self.image_mask(self.finest, features, sizes)[:, None]

    def loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Poisson likelihood of the centres in each cell, over the objects of all processes."""
        truth = torch.zeros_like(output)
        for cells, target in zip(truth, batch.targets, strict=True):
            x, y = ((target.boxes[:, :2] + target.boxes[:, 2:]) / 2 / self.spec.strides[self.finest]).long().T
            cells.index_put_((target.labels, y, x), cells.new_ones(()), accumulate=True)
        total = nn.functional.poisson_nll_loss(output, truth, log_input=False, reduction="sum")
        return {"loss_count": total / shared_count(truth.sum())}

    def decode(self, output: Tensor, sizes: list[ImageSize]) -> list[Predictions]:
        return [Predictions(values=counts) for counts in output.sum((2, 3)).float()]

    def evaluator(self, annotations: Annotations, *, engine: str = "hotcoco") -> Evaluator:
        labels = [annotations.labels[r][~annotations.crowd[r]] for r in map(annotations.rows, range(len(annotations)))]
        counts = [np.bincount(present, minlength=len(annotations.classes)) for present in labels]
        return CountEvaluator(dict(zip(annotations.image_ids.tolist(), counts, strict=True)))


@dataclass
class CountEvaluator(Evaluator):
    """`count/exact`: percent of (image, class) pairs whose rounded count is right; `count/MAE`: mean absolute error."""

    truth: dict[int, np.ndarray]  # image id -> (C,)
    results: list[dict] = field(default_factory=list)

    def add(self, image_id: int, predictions: Predictions) -> None:
        self.results.append({"image_id": image_id, "counts": predictions.values.tolist()})

    def state(self) -> list[dict]:
        return self.results

    def summarize(self, results: list[dict]) -> dict[str, float]:
        errors = np.abs([np.subtract(entry["counts"], self.truth[entry["image_id"]]) for entry in results])
        return {"count/exact": 100 * float((errors < 0.5).mean()), "count/MAE": float(errors.mean())}
