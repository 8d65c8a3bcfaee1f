"""A state on made-up batches, for tests of the step, the freeze rule and the average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detbb.config.schema import Config
from detbb.detector import Detector, build_detector
from detbb.distributed.collectives import rank, world_size
from detbb.freeze import digest
from detbb.heads import find_head
from detbb.structures.batch import Batch, ImageSize, Target
from detbb.training.ema import Ema
from detbb.training.step import TrainState, train_step

CLASSES = ["square", "disc", "star"]


def small_config(arch: str = "resnet18", *, head: str = "fcos", **head_args: Any) -> Config:
    config = Config()
    config.backbone.arch = arch
    config.backbone.norm = "bn"
    config.neck.channels = 32
    config.optimizer.lr = 0.01
    levels = {"levels": ["p3", "p4", "p5"]} if head == "fcos" else {}
    config.heads = {"objects": find_head(head).Config(type=head, data="made", **levels, **head_args)}
    return config


def small_detector(config: Config, *, seed: int = 0) -> Detector:
    """With norm weights, biases and statistics that are neither 0 nor 1: a drift of those would not show."""
    torch.manual_seed(seed)
    detector = build_detector(config, {name: CLASSES for name in config.heads})
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                if name.endswith("num_batches_tracked"):
                    tensor.fill_(7)
                else:
                    tensor.copy_(torch.rand_like(tensor) * 0.2 + (0.0 if name.endswith(("bias", "mean")) else 0.9))
    return detector


def made_batch(step: int, *, images: int = 2, size: int = 64, boxes: int = 2, source: str = "made") -> Batch:
    """This rank's share of `images` random images; the same images whatever the number of processes."""
    share = images // world_size()
    targets, pixels = [], []
    for index in range(rank() * share, (rank() + 1) * share):
        g = torch.Generator().manual_seed(1000 * step + index)
        pixels.append(torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8))
        corner = torch.rand(boxes, 2, generator=g) * size / 2
        xyxy = torch.cat([corner, corner + size / 8 + torch.rand(boxes, 2, generator=g) * size / 3], dim=1)
        labels = torch.randint(0, len(CLASSES), (boxes,), generator=g)
        present = torch.zeros(len(CLASSES), dtype=torch.bool)
        present[labels] = True
        targets.append(Target(index, ImageSize((size, size), (size, size)), 1000 * step + index, xyxy, labels, present))
    return Batch(torch.stack(pixels), targets, source)


def make_state(config: Config, detector: Detector, frozen: list[str]) -> TrainState:
    """What detbb.training.start and the first phase make, without a run folder."""
    ema = config.ema and Ema(detector, decay=config.ema.decay, warmup_steps=config.ema.warmup_steps)
    state = TrainState(detector, ema, config.train, torch.device("cpu"), torch.amp.GradScaler("cpu", enabled=False))
    state.freeze(frozen, config.optimizer)
    return state


def learn(
    state: TrainState, steps: int, *, first: int = 0, lr: float = 0.01, folder: Path = Path("."), **batch: Any
) -> None:
    for step in range(first, first + steps):
        parts = [made_batch(step * 10 + k, **batch) for k in range(state.config.accumulate)]
        train_step(state, parts, lr=lr, stop=lambda: 0, folder=folder, step=step)


def copy_state(detector: Detector) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in detector.state_dict().items()}


def bits_differ(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names whose bytes differ (-0.0 and +0.0 do, NaNs of the same bits do not)."""
    assert set(before) == set(after)
    return {name for name in before if digest(before[name]) != digest(after[name])}
