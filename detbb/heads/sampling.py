"""Which anchors and proposals take part in a loss: random, but a function of (seed, step, image id) alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeededSampler:
    """Draws a fixed number of candidates per image, with at most a given share of positives.

    torchvision's BalancedPositiveNegativeSampler, except that each image has its own generator: neither the process,
    the worker, the device nor the other images of the batch change what is drawn.
    """

    count: int
    positive_fraction: float
    use: str  # what is sampled (`objects/rpn`): draws for different uses are independent

    def __call__(self, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Ascending indices of the positives and of the negatives drawn, on the device of `labels`.

        `labels`: (n,), > 0 positive, 0 negative, < 0 never drawn. `seed`: of the image, `Target.seed`.
        """
        digest = hashlib.blake2b(f"{seed}/{self.use}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        positive = _draw(torch.where(labels > 0)[0], int(self.count * self.positive_fraction), generator)
        negative = _draw(torch.where(labels == 0)[0], self.count - len(positive), generator)
        return positive, negative


def _draw(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(candidates), generator=generator)[:count].sort().values
    return candidates[order.to(candidates.device)]
