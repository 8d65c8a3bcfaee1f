"""Small whole runs for tests: a config on generated shapes, and ways to compare what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from detbb.config.schema import Config
from detbb.freeze import digest
from detbb.heads.loading import load_config

TINY = """
output_dir: {out}
backbone: {{arch: resnet18, norm: bn, allow_random: true}}
neck: {{channels: 32, allow_random: true}}
data:
  shapes:
    format: shapes
    train: {{images: {data}, size: 24}}
    val: {{images: {data}, size: 6}}
    image_size: [64, 64]
heads:
  shapes: {{type: fcos, data: shapes, levels: [p3, p4, p5], num_convs: 1}}
train: {{steps: 10, batch_size: 4, workers: 0}}
optimizer: {{lr: 0.01, weight_decay: 0.1}}
schedule: {{type: cosine, warmup_steps: 3}}
ema: {{decay: 0.9, warmup_steps: 5}}
checkpoint: {{every: 2}}
log: {{every: 1, images: 2}}
"""


def shrink(patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Give every ResNet an eighth of its channels, for tests of what does not depend on how wide a network is."""
    from torchvision.models.resnet import ResNet

    make_layer = ResNet._make_layer

    def thin(self: ResNet, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        return make_layer(self, block, planes // 8, *args, **kwargs)

    patch(ResNet, "_make_layer", thin)


def tiny_config(folder: Path, *overrides: str, name: str = "run", data: Path | None = None) -> Config:
    """A run of ten steps on 24 images; `data`: where the images are generated, once for several runs."""
    file = folder / f"{name}.yaml"
    file.write_text(TINY.format(out=folder / name, data=data or folder / "shapes"))
    return load_config(file, list(overrides))


def load(run: Path | str, name: str = "last") -> dict[str, Any]:
    return torch.load(Path(run) / "checkpoints" / f"{name}.pt", weights_only=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint by its path; tensors as digests."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}/{name}").items()}
    return {prefix: digest(value) if isinstance(value, torch.Tensor) else value}


def learned(run: Path | str, name: str = "last") -> dict[str, Any]:
    """What a run learned: every bit of model, average, optimizer and scaler, and the step."""
    content = load(run, name)
    return flat({key: content[key] for key in ("step", "phase", "model", "ema", "optimizer", "scaler", "frozen")})


def lines(run: Path | str, split: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what is measured in seconds."""
    records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    timed = ("data_s", "step_s", "images_per_s")
    return [{k: v for k, v in r.items() if k not in timed} for r in records if r["split"] == split]
