"""The checkpoints of a run: saved so that no kill loses one, and the newest valid one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detbb.checkpoint import read_checkpoint
from detbb.errors import UserError
from detbb.files import BadFile, link_atomically, save_tensors

STEP_FILE = re.compile(r"step_(\d{7,})\.pt")


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
        last = self.folder / "last.pt"
        candidates = [self.path(step) for step in reversed(self.steps())]
        alone = last.exists() and not any(c.samefile(last) for c in candidates)
        passed: list[str] = []
        found: tuple[Path, dict[str, Any]] | None = None
        for path in [last, *candidates] if alone else candidates:
            try:
                content = read_checkpoint(path)
            except BadFile as error:
                passed.append(f"{error}{' (last.pt is this file)' if path != last and _same(path, last) else ''}")
                continue
            if found is None or content["step"] > found[1]["step"]:
                found = path, content
            if path != last:
                break
        if found is None and passed:
            raise UserError(f"--resume: no valid checkpoint in {self.folder}: {'; '.join(passed)}")
        return None if found is None else (*found, passed)

    def go_on_from(self, step: int) -> list[str]:
        """Make `step` the newest of the folder; a line if later checkpoints had to be set aside under another name."""
        later = [self.path(s) for s in self.steps() if s > step]
        if not later:
            return []
        last = self.folder / "last.pt"
        if self.path(step).exists():
            link_atomically(self.path(step), last)
        else:
            last.unlink(missing_ok=True)
        best = self.folder / "best.pt"
        if best.exists() and not _is_of(best, step):
            later.append(best)
        for path in later:
            path.rename(path.with_suffix(".pt.aside"))
        return [f"WARNING: {len(later)} later checkpoints are set aside: {', '.join(f'{p}.aside' for p in later)}"]


def _is_of(path: Path, step: int) -> bool:
    """Whether a checkpoint is of `step` or before."""
    try:
        return read_checkpoint(path)["step"] <= step
    except BadFile:
        return False


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
