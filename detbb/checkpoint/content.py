"""Checkpoints: what is in one, starting from one.

A checkpoint is a dict of tensors and plain containers (every key: docs/checkpoints.md), written atomically and read
with `weights_only=True`.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detbb.checkpoint.untrusted import build_exactly, check_shapes, check_values
from detbb.config.loading import with_new_names
from detbb.config.schema import Config, DataConfig
from detbb.core.console import warn
from detbb.core.errors import UserError, some, unknown_name
from detbb.core.files import BadFile, load_tensors
from detbb.core.forms import Form
from detbb.detector import Detector, view
from detbb.freeze import part_of
from detbb.heads import HeadConfig
from detbb.heads.loading import config_from_dict
from detbb.structures.class_list import ClassList

FORMAT_VERSION = 2


class _HeadForm(Form, extra="allow"):
    type: str
    data: str


class _BackboneForm(Form, extra="allow"):
    arch: str


class ConfigForm(Form, extra="allow"):
    heads: dict[str, _HeadForm]
    backbone: _BackboneForm
    inherited_heads: list[str]


class ClassesForm(Form):
    names: list[str]
    category_ids: list[int]
    keypoints: list[str]


class _EmaForm(Form):
    updates: int
    tensors: dict[str, Tensor]


class _OptimizerForm(Form):
    type: str
    state: dict[str, dict[str, Any]]


class _RngForm(Form):
    seed: int
    torch: Tensor


class _DataForm(Form):
    images: dict[str, int]
    batch_size: int
    skipped_in_row: int


class _FrozenForm(Form):
    names: list[str]
    digests: dict[str, str]


class CheckpointForm(Form):
    """What is in a checkpoint; docs/checkpoints.md says what each key holds."""

    format_version: int
    config: ConfigForm
    step: int
    phase: int
    model: dict[str, Tensor]
    ema: _EmaForm | None
    optimizer: _OptimizerForm
    scaler: dict[str, Any]
    rng: _RngForm
    data: _DataForm
    frozen: _FrozenForm
    classes: dict[str, ClassesForm]
    versions: dict[str, str]


KEYS = tuple(CheckpointForm.model_fields)
MISFIT = "checkpoint: its tensors do not fit its own config"


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
    content = upgraded(load_tensors(path))
    if not isinstance(content, dict) or set(content) != set(KEYS):
        raise BadFile(f"{path}: not a detbb checkpoint (needs the keys {', '.join(KEYS)})")
    if not is_version(content["format_version"], FORMAT_VERSION):
        raise BadFile(f"{path}: checkpoint format {content['format_version']!r}, this version reads {FORMAT_VERSION}")
    wrong = CheckpointForm.find_error(content) or _contradiction(content)
    if wrong is not None:
        raise BadFile(f"{path}: not a whole detbb checkpoint: {wrong}")
    return content


def is_version(value: Any, version: int) -> bool:
    """Whether what a file calls its version is this one; anything may stand there, also a tensor."""
    return type(value) is int and value == version


def upgraded(content: Any) -> Any:
    """What an older version of detbb wrote, in today's form; anything else as it is."""
    old = isinstance(content, dict) and is_version(content.get("format_version"), 1)
    if old and isinstance(content.get("config"), dict):
        content["format_version"] = 2
        content["config"] = with_new_names(content["config"])
    return content


def _contradiction(content: Mapping[str, Any]) -> str | None:
    """What does not fit together in a checkpoint of the right form, as one phrase, or None."""
    model, classes = content["model"], content["classes"]
    averages = content["ema"]["tensors"] if content["ema"] else {}
    if content["step"] < 0:
        return f"step is {content['step']}"
    if set(classes) != set(content["config"]["heads"]):
        return f"classes of {', '.join(classes) or 'no head'} do not fit the heads of its config"
    parts = ("backbone.", "neck.", *(f"heads.{head}." for head in classes))
    if other := [name for name in model if not name.startswith(parts)]:
        return f"model.{other[0]} belongs to none of backbone, neck and its heads"
    if other := [n for n, t in averages.items() if n not in model or model[n].shape != t.shape]:
        return f"ema.tensors.{other[0]} is not as in model"
    return None


def checkpoint_file(path: Path | str, *, key: str = "checkpoint") -> Path:
    """The file that the user means by `path`: itself; of a run folder best.pt, or last.pt where there is none.

    Raises: UserError: a folder that holds neither.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / inside / name for name in ("best.pt", "last.pt") for inside in ("checkpoints", "")]
    if (found := next((file for file in files if file.is_file()), None)) is None:
        raise UserError(
            f"{key} {path}: is a folder without checkpoints/best.pt or last.pt; name a run folder or a file"
        )
    return found


def open_checkpoint(path: Path | str, *, key: str = "checkpoint") -> dict[str, Any]:
    """`read_checkpoint` for what the user named, as `key`: what is wrong with it becomes a UserError.

    Says which file was taken of a run folder.
    """
    file = checkpoint_file(path, key=key)
    if file != Path(path):
        warn(f"{path}: {file.name} ({file})")
    try:
        return read_checkpoint(file)
    except BadFile as error:
        raise UserError(f"{key} {error}") from error


def stored_config(
    content: Mapping[str, Any], origin: str = "the checkpoint's stored config", *, overrides: Sequence[str] = ()
) -> Config:
    """The configuration that a checkpoint or branch file holds. Raises: UserError: it cannot be used."""
    check_values(content["config"], origin)
    return config_from_dict(content["config"], origin=origin, overrides=overrides)


def opened(path: Path | str, heads: Collection[str] | None) -> tuple[dict[str, Any], Config, list[str]]:
    """A checkpoint that the user named, its config, and the heads asked for (None: all). Raises: UserError."""
    content = open_checkpoint(path)
    config = stored_config(content)
    for name in heads or ():
        if name not in config.heads:
            raise unknown_name("--head", name, config.heads)
    return content, config, list(config.heads if heads is None else heads)


@dataclass
class InitReport:
    """What `init_from` gave each part: tensor names."""

    source: str
    loaded: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)  # not in the checkpoint
    reset: list[str] = field(default_factory=list)  # last layers whose class count changed
    inherited_heads: list[str] = field(default_factory=list)  # heads kept although the config does not list them
    averaged: bool = False  # the values are the checkpoint's averages, which is what it was evaluated with

    def lines(self) -> list[str]:
        kind = "its averages (EMA), what it was evaluated with" if self.averaged else "its weights"
        lines = [f"init_from {self.source}: {len(self.loaded)} tensors start from {kind}"]
        for title, names in (("start fresh", self.fresh), ("start fresh, the class count changed", self.reset)):
            if names:
                lines.append(f"  {len(names)} {title}: {', '.join(sorted({part_of(n) for n in names}))}")
        if self.inherited_heads:
            lines.append(f"  inherited untouched, not listed in this config: {', '.join(self.inherited_heads)}")
        return lines


def evaluated_state(checkpoint: Mapping[str, Any], weights: str | None = None) -> dict[str, Tensor]:
    """The tensors a checkpoint is evaluated with: averages where it has them (`ema`), else raw (`model`)."""
    model: dict[str, Tensor] = checkpoint["model"]
    if weights == "model" or checkpoint["ema"] is None:
        return dict(model)
    averages = checkpoint["ema"]["tensors"]
    return {name: averages[name].to(tensor.dtype) if name in averages else tensor for name, tensor in model.items()}


def add_inherited_heads(
    config: Config, checkpoint: Mapping[str, Any], *, only: Collection[str] | None = None
) -> dict[str, ClassList]:
    """Enter the checkpoint's heads that `config` does not list (of these, `only`) as inherited ones.

    Returns the classes of all inherited heads, also of those that `config` names already (a run's own config.yaml).
    """
    stored = stored_config(checkpoint)
    if added := [name for name in stored.heads if name not in config.heads and (only is None or name in only)]:
        check_shapes(stored, checkpoint["classes"], checkpoint["model"], MISFIT)
    for name in added:
        inherit_head(config, name, stored.heads[name], stored.data[stored.heads[name].data])
    return {n: ClassList.of(checkpoint["classes"][n]) for n in config.inherited_heads if n in checkpoint["classes"]}


def inherit_head(config: Config, name: str, head: HeadConfig, source: DataConfig) -> None:
    """Enter a head as an inherited one.

    Its data comes along under its own name, or `<head>_<name>` where that name means something else here.
    """
    while config.data.get(head.data, source) != source:
        head.data = f"{name}_{head.data}"
    config.data[head.data] = source
    config.heads[name] = head
    config.inherited_heads.append(name)


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
                f"init_from: {name} has shape {tuple(given[name].shape)} in {source}, {tuple(tensor.shape)} in this "
                "config; make backbone, neck and this head agree, or give the head another name"
            )
        else:
            tensor.copy_(given[name])
            report.loaded.append(name)
    return report


def restore_detector(checkpoint: Mapping[str, Any], *, weights: str | None = None) -> Detector:
    """The checkpoint's detector in eval mode on the CPU, averaged (`ema`, the default if it can be) or raw (`model`).

    Raises: UserError: `ema` is asked for but not there, or the tensors do not fit the stored config.
    """
    if weights == "ema" and checkpoint["ema"] is None:
        raise UserError("weights: 'ema', but this checkpoint holds no average; valid is 'model'")
    config, classes = stored_config(checkpoint), checkpoint["classes"]
    check_shapes(config, classes, checkpoint["model"], MISFIT)  # first, since averages of another type are converted
    return view(build_exactly(config, classes, evaluated_state(checkpoint, weights)))


def check_fit(detector: Detector, given: Mapping[str, Tensor], problem: str) -> None:
    """Raise UserError, with `problem` and their names, if tensors are missing, too many or of another shape."""
    own = detector.state_dict()
    if wrong := sorted(set(own) ^ set(given)) or [n for n in own if own[n].shape != given[n].shape]:
        raise UserError(f"{problem}: {some(wrong)}")


def load_detector(path: Path | str, *, weights: str | None = None, device: str = "cpu") -> Detector:
    """The detector of a checkpoint file, ready to predict: eval mode, averaged weights if it has them.

        detector = detbb.load_detector("runs/mine/checkpoints/best.pt")

    Raises: UserError: the file is not a valid checkpoint; `weights` is not in it.
    """
    return restore_detector(open_checkpoint(path), weights=weights).to(device)
