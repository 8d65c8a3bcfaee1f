"""What a run says of itself before its first step and after its last."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from detbb.checkpoint.content import versions
from detbb.config.schema import Config
from detbb.report.writers import read_evaluations
from detbb.structures.annotations import Annotations


def opening(
    config: Config,
    train: Mapping[str, Annotations],
    val: Mapping[str, Annotations],
    *,
    steps: int,
    device: torch.device,
    best: str,
) -> list[str]:
    """Lines on the machine, the data, the length of the run and where it goes; best: the metric of best.pt, or ""."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    lines = [
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}; {device.type} ({machine})",
        f"command: {shlex.join(['python', *sys.argv])}{_commit()}",
    ]
    for split, sources in (("train", train), ("val", val)):
        lines += [f"data.{name}.{split}: {_contents(annotations)}" for name, annotations in sources.items()]
    images, schedule = images_per_epoch(config, train), config.schedule
    epoch = round(images / config.train.batch_size, 1)
    warmup = f", after {schedule.warmup_steps} steps of warm-up" if schedule.warmup_steps else ""
    lines.append(
        f"{images:g} images / batch {config.train.batch_size} = {epoch:g} steps an epoch; "
        f"{steps} steps with {config.optimizer.type}, lr {config.optimizer.lr:g}{warmup}, {schedule.type}"
    )
    every = f"every {config.eval.every} steps" if config.eval.every else "at the last step"
    follows = f"best.pt follows {best}, evaluated {every}" if best and val else "no val: not evaluated, no best.pt"
    return [*lines, f"output: {config.output_dir}; {follows}"]


def images_per_epoch(config: Config, train: Mapping[str, Annotations]) -> float:
    """How many images of all sources are learned from until every image was seen at least once."""
    turns = sum(config.data[name].weight for name in train)
    return max(len(annotations) * turns / config.data[name].weight for name, annotations in train.items())


def closing(config: Config, steps: int, elapsed: str, *, best: str) -> list[str]:
    """Lines on how long it took, which step was best by the metric `best`, and what to do next, as commands."""
    folder = Path(config.output_dir)
    lines = [f"{steps} steps; this took {elapsed}"]
    evaluations = [record for record in read_evaluations(folder / "metrics.jsonl") if record.get(best) is not None]
    if evaluations:
        top = max(evaluations, key=lambda record: record[best])
        lines[0] += f"; best: step {top['step']}, {best} {top[best]:.1f} ({top['weights']} weights)"
    name = "best" if (folder / "checkpoints" / "best.pt").exists() else "last"
    checkpoint = shlex.quote(str(folder / "checkpoints" / f"{name}.pt"))
    more = f"train.steps={2 * steps}" if config.train.epochs is None else f"train.epochs={2 * config.train.epochs:g}"
    resume = f"--config {shlex.quote(str(folder / 'config.yaml'))} --resume {more}"
    commands = [
        ("evaluate", "eval", f"{checkpoint} --output-dir {shlex.quote(str(folder / 'eval' / name))}"),
        ("predict", "predict", f"{checkpoint} IMAGES --output-dir {shlex.quote(str(folder / 'predicted'))}"),
        ("go on", "train", resume),
    ]
    installed = not Path("tools/train.py").exists()
    for what, tool, arguments in commands:
        lines.append(f"{what + ':':10}{f'detbb {tool}' if installed else f'python tools/{tool}.py'} {arguments}")
    return lines


def _contents(annotations: Annotations) -> str:
    classes = f"{len(annotations.classes):,} class{'es' if len(annotations.classes) != 1 else ''}"
    if not len(annotations.labels):
        return f"{len(annotations):,} images, {classes}"
    empty = np.count_nonzero(np.diff(annotations.first) == 0)
    return f"{len(annotations):,} images ({empty:,} without objects), {len(annotations.labels):,} objects, {classes}"


def _commit() -> str:
    """` (git 1a2b3c4-dirty)` of the current folder, if it is in a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" (git {found})"
