"""The checkpoints of a run: saved so that no kill loses one, and the newest valid one of them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from detbb.checkpoint.content import read_checkpoint
from detbb.core.errors import UserError
from detbb.core.files import BadFile, link_atomically, save_tensors, tidy

STEP_FILE = re.compile(r"step_(\d{7,})\.pt")


class CheckpointFolder:
    """`checkpoints/` of a run: step files, `last.pt`, `best.pt`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._undeletable: set[int] = set()  # steps whose file could not be removed, said once

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.pt"

    def steps(self) -> list[int]:
        """Steps that have a file, ascending by number."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := STEP_FILE.fullmatch(p.name)))

    def save(self, content: dict[str, Any]) -> list[str]:
        """Write a step file, verify it, move `last.pt` to it, and only then delete what is too old.

        Gives a line for each old file that cannot be deleted, once.
        """
        path = self.path(content["step"])
        save_tensors(path, content)
        link_atomically(path, self.folder / "last.pt")
        old = [s for s in self.steps()[: -self.keep] if s != content["step"] and s not in self._undeletable]
        lines = tidy(self.path(step) for step in old)
        self._undeletable.update(step for step in old if self.path(step).exists())
        return lines

    def mark_best(self, step: int) -> None:
        """Make `best.pt` the checkpoint of `step`."""
        link_atomically(self.path(step), self.folder / "best.pt")

    def newest(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        """Path and content of the valid checkpoint with the highest step, and what is wrong with each invalid one.

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

    def make_newest(self, source: Path, step: int) -> list[str]:
        """Make `source`, a checkpoint file of `step`, the newest of the folder.

        Gives a line if later checkpoints, or another one of that step, were renamed for it.
        """
        own, best = self.path(step), self.folder / "best.pt"
        later = [p for s in self.steps() if s >= step and not _same(p := self.path(s), source)]
        if not later and own.exists():
            return []
        if best.exists() and not _is_of(best, step):
            later.append(best)
        aside = [_set_aside(path) for path in later]
        if not own.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            link_atomically(source, own)
        link_atomically(own, self.folder / "last.pt")
        return [f"WARNING: {len(aside)} other checkpoints are set aside: {', '.join(aside)}"] if aside else []


def _is_of(path: Path, step: int) -> bool:
    """Whether a checkpoint is of `step` or before."""
    try:
        return read_checkpoint(path)["step"] <= step
    except BadFile:
        return False


def _set_aside(path: Path) -> str:
    """Rename to the first free of `.aside`, `.aside2`, …"""
    names = (path.with_name(f"{path.name}.aside{number if number > 1 else ''}") for number in itertools.count(1))
    return str(path.rename(next(name for name in names if not name.exists())))


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
