"""A detector on generated shapes and the stages that add branches to it, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detbb.config.schema import Config
from detbb.freeze import digest
from detbb.heads.loading import load_config
from detbb.inference.evaluate import evaluate

STAGE = """
output_dir: {out}
init_from: {base}
backbone: {{arch: resnet18, norm: bn, allow_random: true}}
neck: {{channels: 32, allow_random: true}}
data:
  boxes:
    format: shapes
    train: {{images: {data}, size: 16}}
    val: {{images: {data}, size: 6}}
    image_size: [64, 64]
  pixels:
    format: semantic
    train: {{images: {data}/train_16/images, annotations: {data}/train_16/masks}}
    val: {{images: {data}/val_6/images, annotations: {data}/val_6/masks}}
    classes: {data}/train_16/classes.json
    image_size: [64, 64]
train: {{steps: 6, batch_size: 4, workers: 0}}
optimizer: {{type: adamw, lr: 0.001, weight_decay: 0.1}}
schedule: {{type: cosine}}
ema: {{decay: 0.9, warmup_steps: 4}}
log: {{every: 1, images: 0}}
"""
FIRST = "{type: fcos, data: boxes, levels: [p3, p4, p5], num_convs: 1}"
SECOND = "{type: semantic, data: pixels, levels: [p3, p4], channels: 16, norm: bn}"
SMALL_FILES = ("optimizer.type=sgd", "optimizer.momentum=0")  # for runs that train a whole detector
THIRD = "{type: classify, data: boxes, multi_label: true}"


def stage(
    folder: Path, data: Path, heads: dict[str, str], *overrides: str, base: Path | str = "null", name: str = "run"
) -> Config:
    """A run of six steps in `folder/name` with these heads (as YAML), on one set of images."""
    file = folder / f"{name}.yaml"
    file.write_text(STAGE.format(out=folder / name, base=base, data=data))
    return load_config(file, [f"heads.{head}={value}" for head, value in heads.items()] + list(overrides))


def results(checkpoint: Path | str, folder: Path, *heads: str, **options: Any) -> dict[str, bytes]:
    """The bytes of `results.json` of every branch (or these) as `tools/eval.py` writes them."""
    evaluate(checkpoint, heads=heads or None, output_dir=folder, **options)
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/results.json"))}


def evaluated(content: dict[str, Any], *parts: str) -> dict[str, str]:
    """Digests of a checkpoint's tensors as evaluated, of these parts."""
    averages = content["ema"]["tensors"] if content["ema"] else {}
    return {n: digest(averages.get(n, t)) for n, t in content["model"].items() if n.startswith(parts)}
