"""Checkpoints: what is in one, finding the newest valid one, starting from one.

A checkpoint is a dict of tensors and plain containers (DESIGN of the format: docs/checkpoints.md), written atomically and
read with `weights_only=True`.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detbb import freeze
from detbb.config import Config, DataConfig
from detbb.config_loading import config_from_dict
from detbb.detector import ClassList, Detector, build_detector
from detbb.ema import view
from detbb.errors import UserError
from detbb.files import BadFile, link_atomically, load_tensors, save_tensors
from detbb.heads import HeadConfig

FORMAT_VERSION = 1
KEYS = (
    "format_version",
    "config",
    "step",
    "phase",
    "model",
    "ema",
    "optimizer",
    "scaler",
    "rng",
    "data",
    "frozen",
    "classes",
    "versions",
)
STEP_FILE = re.compile(r"step_(\d{7,})\.pt")


def versions() -> dict[str, str]:
    import torchvision

    import detbb

    return {
        "detbb": detbb.__version__,
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """A checkpoint as a dict with the keys of `KEYS`, on the CPU.

    Raises: BadFile: not a whole detbb checkpoint; says why.
    """
    path = Path(path)
    content = load_tensors(path)
    if not isinstance(content, dict) or set(content) != set(KEYS):
        raise BadFile(f"{path}: not a detbb checkpoint (needs the keys {', '.join(KEYS)})")
    if content["format_version"] != FORMAT_VERSION:
        raise BadFile(f"{path}: checkpoint format {content['format_version']!r}, this version reads {FORMAT_VERSION}")
    model, frozen, step = content["model"], content["frozen"], content["step"]
    whole = (
        isinstance(model, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in model.items())
        and isinstance(step, int)
        and step >= 0
        and isinstance(content["config"], dict)
        and isinstance(content["classes"], dict)
        and isinstance(frozen, dict)
        and set(frozen) == {"names", "digests"}
        and (content["ema"] is None or set(content["ema"]) == {"updates", "tensors"})
    )
    if not whole:
        raise BadFile(f"{path}: not a whole detbb checkpoint (its entries have the wrong types)")
    return content


def open_checkpoint(path: Path | str) -> dict[str, Any]:
    """`read_checkpoint` for a file that the user named: what is wrong with it becomes a UserError."""
    try:
        return read_checkpoint(path)
    except BadFile as error:
        raise UserError(f"checkpoint {error}") from error


class CheckpointFolder:
    """`checkpoints/` of a run: step files, `last.pt`, `best.pt`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.pt"

    def steps(self) -> list[int]:
        """Steps that have a file, ascending by number."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := STEP_FILE.fullmatch(p.name)))

    def save(self, content: dict[str, Any]) -> Path:
        """Write a step file, verify it, move `last.pt` to it, and only then delete what is too old."""
        path = self.path(content["step"])
        save_tensors(path, content)
        link_atomically(path, self.folder / "last.pt")
        for step in self.steps()[: -self.keep]:
            if step != content["step"]:
                self.path(step).unlink(missing_ok=True)
        return path

    def mark_best(self, step: int, content: Callable[[], dict[str, Any]]) -> None:
        """Make `best.pt` the checkpoint of `step`; `content` is asked for if that step has no file."""
        if self.path(step).exists():
            link_atomically(self.path(step), self.folder / "best.pt")
        else:
            save_tensors(self.folder / "best.pt", content())

    def newest(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The valid checkpoint with the highest step, and a line about each file that was passed over.

        None if there is no file at all. Raises: UserError: there are files, but none is valid.
        """
        passed: list[str] = []
        candidates = [self.path(step) for step in reversed(self.steps())]
        last = self.folder / "last.pt"
        if last.exists() and not any(c.exists() and c.samefile(last) for c in candidates):
            candidates.insert(0, last)
        for path in candidates:
            try:
                return path, read_checkpoint(path), passed
            except BadFile as error:
                passed.append(str(error))
        if passed:
            raise UserError(f"--resume: no valid checkpoint in {self.folder}: {'; '.join(passed)}")
        return None


@dataclass
class InitReport:
    """What `init_from` gave each part: tensor names."""

    source: str
    loaded: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)  # not in the checkpoint
    reset: list[str] = field(default_factory=list)  # last layers whose class count changed
    carried: list[str] = field(default_factory=list)  # heads kept although the config does not list them
    averaged: bool = False  # the values are the checkpoint's averages, which is what it was evaluated with

    def lines(self) -> list[str]:
        kind = "its averages (EMA), what it was evaluated with" if self.averaged else "its weights"
        lines = [f"init_from {self.source}: {len(self.loaded)} tensors start from {kind}"]
        for title, names in (("start fresh", self.fresh), ("start fresh, the class count changed", self.reset)):
            if names:
                lines.append(f"  {len(names)} {title}: {', '.join(sorted({_part(n) for n in names}))}")
        if self.carried:
            lines.append(f"  carried along untouched, not listed in this config: {', '.join(self.carried)}")
        return lines


def evaluated_state(checkpoint: Mapping[str, Any], weights: str | None = None) -> dict[str, Tensor]:
    """The tensors a checkpoint is evaluated with: averages where it has them (`ema`), else raw (`model`)."""
    model: dict[str, Tensor] = checkpoint["model"]
    if weights == "model" or checkpoint["ema"] is None:
        return dict(model)
    averages = checkpoint["ema"]["tensors"]
    return {name: averages[name].to(tensor.dtype) if name in averages else tensor for name, tensor in model.items()}


def add_carried_heads(
    config: Config, checkpoint: Mapping[str, Any], *, only: Collection[str] | None = None
) -> dict[str, ClassList]:
    """Enter the checkpoint's heads that `config` does not list (of these, `only`) as carried ones.

    Returns the classes of all carried heads, those included that `config` names already (a run's own config.yaml does).
    """
    stored = config_from_dict(checkpoint["config"], origin="the checkpoint's stored config")
    for name, head in stored.heads.items():
        if name not in config.heads and (only is None or name in only):
            carry(config, name, head, stored.data[head.data])
    return {n: ClassList.of(checkpoint["classes"][n]) for n in config.carried if n in checkpoint["classes"]}


def carry(config: Config, name: str, head: HeadConfig, source: DataConfig) -> None:
    """Enter a head as a carried one.

    Its data comes along under its own name, or `<head>_<name>` where that name means something else here.
    """
    while config.data.get(head.data, source) != source:
        head.data = f"{name}_{head.data}"
    config.data[head.data] = source
    config.heads[name] = head
    config.carried.append(name)


def init_from(detector: Detector, checkpoint: Mapping[str, Any], source: str) -> InitReport:
    """Start every matching tensor from the checkpoint's evaluated weights.

    A head's last layer starts fresh where the class count (or its names) changed. Raises: UserError: another tensor
    has another shape.
    """
    report = InitReport(source, averaged=checkpoint["ema"] is not None and bool(checkpoint["ema"]["tensors"]))
    given = evaluated_state(checkpoint)
    own = detector.state_dict()
    last_layers = {
        f"heads.{name}.{tensor}"
        for name in detector.heads
        if name in checkpoint["classes"]
        and ClassList.of(checkpoint["classes"][name]).names != detector.classes[name].names
        for tensor in detector.head(name).class_tensors()
    }
    for name, tensor in own.items():
        if name not in given:
            report.fresh.append(name)
        elif name in last_layers:
            report.reset.append(name)
        elif given[name].shape != tensor.shape:
            raise UserError(
                f"init_from: {name} has shape {tuple(given[name].shape)} in {source}, {tuple(tensor.shape)} in this config; "
                "make backbone, neck and this head agree, or give the head another name"
            )
        else:
            tensor.copy_(given[name])
            report.loaded.append(name)
    return report


def restore_detector(checkpoint: Mapping[str, Any], *, weights: str | None = None) -> Detector:
    """The checkpoint's detector in eval mode on the CPU, with its averages (`ema`, default if there are) or raw (`model`).

    Raises: UserError: `ema` is asked for but not there, or the tensors do not fit the stored config.
    """
    if weights == "ema" and checkpoint["ema"] is None:
        raise UserError("weights: 'ema', but this checkpoint holds no average; valid is 'model'")
    config = config_from_dict(checkpoint["config"], origin="the checkpoint's stored config")
    detector = build_detector(config, {name: ClassList.of(c) for name, c in checkpoint["classes"].items()})
    own, given = detector.state_dict(), evaluated_state(checkpoint, weights)
    if set(own) != set(given) or any(own[n].shape != given[n].shape for n in own):
        wrong = sorted(set(own) ^ set(given)) or [n for n in own if own[n].shape != given[n].shape]
        raise UserError(f"checkpoint: its tensors do not fit its own config: {', '.join(wrong[:5])}")
    detector.load_state_dict(given)
    return view(detector)


def load_detector(path: Path | str, *, weights: str | None = None, device: str = "cpu") -> Detector:
    """The detector of a checkpoint file, ready to predict: eval mode, averaged weights if it has them.

    Raises: UserError: the file is not a valid checkpoint; `weights` is not in it.
    """
    return restore_detector(open_checkpoint(path), weights=weights).to(device)


def frozen_entry(detector: Detector, known: Mapping[str, str]) -> dict[str, Any]:
    """A checkpoint's `frozen`: the freeze names, and the digest of every tensor they keep."""
    return {"names": list(detector.frozen), "digests": {n: known[n] for n in freeze.frozen_names(detector)}}


def _part(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] in ("heads", "backbone") else pieces[0]
