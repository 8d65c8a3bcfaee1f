"""Where a run starts: its folder, and the checkpoint that it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detbb.checkpoint import content as checkpoints
from detbb.checkpoint.folder import CheckpointFolder
from detbb.config.loading import config_to_dict, save_config
from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.core.files import check_folder, remove_leftovers, writing
from detbb.core.folder_lock import FolderLock
from detbb.detector import Detector
from detbb.distributed.collectives import all_gather_objects, raise_on_all_ranks, rank
from detbb.freeze import changed
from detbb.structures.annotations import Annotations
from detbb.structures.class_list import ClassList
from detbb.training import optim


@dataclass
class ResumePoint:
    """The checkpoint a run goes on from (None: a fresh start), and lines about files that were passed over."""

    checkpoint: dict[str, Any] | None
    notes: list[str]
    step: int | None = None  # what the logs hold of later steps is dropped; None: there is nothing to drop
    path: Path | None = None  # the checkpoint's


def open_run_folder(config: Config, resume: str | None, lock: FolderLock) -> ResumePoint:
    """Where the run starts, in a folder that can be written: `resume` is None, `auto`, or a checkpoint file.

    Raises: UserError: the folder holds a run and `resume` is None, or it is another process's; it or the named
    checkpoint cannot be used.
    """
    notes: list[str] = []
    with raise_on_all_ranks():
        check_folder(Path(config.output_dir))
        if resume is not None and rank() == 0 and Path(config.output_dir).is_dir():
            notes = lock.take(Path(config.output_dir))  # before what may change is read
    with raise_on_all_ranks():
        start = _find_start(config, resume)
    start.notes += notes
    with raise_on_all_ranks():
        if len(steps := set(all_gather_objects(start.step))) > 1:
            raise UserError(
                f"output_dir: the processes find checkpoints of steps {sorted(steps)} in {config.output_dir!r}; "
                "it must be one folder that all of them share"
            )
    return start


def _find_start(config: Config, resume: str | None) -> ResumePoint:
    folder = CheckpointFolder(Path(config.output_dir) / "checkpoints", config.checkpoint.keep)
    if resume is None:
        if (Path(config.output_dir) / "config.yaml").exists() or folder.steps():
            raise _holds_a_run(config)
        return ResumePoint(None, [])
    if resume != "auto":
        content = checkpoints.open_checkpoint(resume, key="--resume")
        return ResumePoint(
            content, [f"resuming from {resume} at step {content['step']}"], content["step"], Path(resume)
        )
    found = folder.newest()
    if found is None:
        return ResumePoint(None, [f"--resume: no checkpoint in {folder.folder} yet, so this is a fresh start"], 0)
    path, content, passed = found
    notes = [f"WARNING: passed over an unusable checkpoint: {line}" for line in passed]
    return ResumePoint(content, [*notes, f"resuming from {path} at step {content['step']}"], content["step"], path)


def _holds_a_run(config: Config) -> UserError:
    return UserError(
        f"output_dir: {config.output_dir!r} already holds a run; go on with --resume, "
        "or give another output_dir (nothing was changed)"
    )


def claim_run_folder(config: Config, start: ResumePoint, folder: CheckpointFolder, lock: FolderLock) -> list[str]:
    """Make the folder this run's own: the first change in it but the lock, on rank 0.

    Gives lines about what was set aside. Raises: UserError: another start was faster.
    """
    output_dir = Path(config.output_dir)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    lines = lock.take(output_dir)
    if start.step is None:
        try:
            (output_dir / "config.yaml").open("x").close()
        except FileExistsError:
            raise _holds_a_run(config) from None
    else:
        lines += remove_leftovers(output_dir)
        lines += folder.make_newest(start.path, start.step) if start.path is not None else []
    save_config(config, output_dir / "config.yaml")
    return lines


def load(detector: Detector, checkpoint: dict[str, Any], *, classes: dict[str, ClassList]) -> None:
    """Give the detector every tensor of the checkpoint. Raises: UserError: a tensor or class list is another."""
    for name, now in classes.items():
        stored = checkpoint["classes"].get(name)
        if stored is not None and ClassList.of(stored).names != now.names:
            raise UserError(
                f"--resume: heads.{name} learned {list(stored['names'])[:8]}, the data now has {list(now.names)[:8]}; "
                "a changed class list is a new run: use init_from"
            )
    advice = "resume with the run's own config.yaml, or start another run with init_from"
    checkpoints.load_exactly(detector, checkpoint["model"], f"--resume: this config does not fit ({advice})")


def check(
    config: Config, checkpoint: dict[str, Any], detector: Detector, train: dict[str, Annotations], *, steps: int
) -> list[str]:
    """Lines about what differs from what the checkpoint, whose tensors `detector` has, was trained with.

    steps: of the whole run. Raises: UserError: it cannot go on with this config.
    """
    if (was := checkpoint["optimizer"]["type"]) != (optimizer := config.optimizer.type):
        raise UserError(
            f"--resume: optimizer.type is {optimizer!r}, the checkpoint's is {was!r}; use init_from to change it"
        )
    if (step := checkpoint["step"]) > steps:
        epochs = config.train.epochs
        length = f"train.steps: {steps}" if epochs is None else f"train.epochs: {epochs:g} ({steps} steps)"
        raise UserError(f"{length}, but the checkpoint is of step {step}; valid is {step} or more")
    optim.check_state(detector, checkpoint["optimizer"]["state"])
    if names := changed(detector, checkpoint["frozen"]["digests"]):
        raise UserError(f"--resume: the checkpoint contradicts its own digests: {', '.join(names[:5])}")
    lines = []
    data = checkpoint["data"]
    order = {f"data.{n}.train": (data["images"].get(n), len(a)) for n, a in train.items()}
    order["train.batch_size"] = (data["batch_size"], config.train.batch_size)
    if other := [f"{key} {a} before, {b} now" for key, (a, b) in order.items() if a not in (None, b)]:
        lines.append(f"WARNING: images come in another order from here on: {'; '.join(other)}")
    now, then = _flat(config_to_dict(config)), _flat(checkpoint["config"])
    for key in dict.fromkeys([*now, *then]):
        if now.get(key) != then.get(key) and key != "output_dir":
            lines.append(f"WARNING: resuming with another {key}: {then.get(key)!r} before, {now.get(key)!r} now")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}
