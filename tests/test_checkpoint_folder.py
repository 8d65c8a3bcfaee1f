"""The checkpoints of a run survive kills, power loss and damage, and the newest valid one is found."""

from __future__ import annotations

import errno
import inspect
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detbb.checkpoint import folder as checkpoint_folder
from detbb.checkpoint.content import FORMAT_VERSION, KEYS, read_checkpoint
from detbb.checkpoint.folder import CheckpointFolder
from detbb.core import files
from detbb.core.errors import UserError
from detbb.core.files import BadFile


def content(step: int) -> dict[str, Any]:
    made: dict[str, Any] = {key: {} for key in KEYS}
    made |= {
        "format_version": FORMAT_VERSION,
        "step": step,
        "phase": 0,
        "ema": None,
        "config": {"backbone": {"arch": "resnet18"}, "heads": {}, "inherited_heads": []},
        "model": {"backbone.w": torch.full((300,), float(step))},
    }
    made |= {"optimizer": {"type": "sgd", "state": {}}, "rng": {"seed": 0, "torch": torch.zeros(1)}}
    made |= {"data": {"images": {}, "batch_size": 1, "skipped_in_row": 0}, "frozen": {"names": [], "digests": {}}}
    return made


def valid(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except BadFile:
        return False
    return True


def newest(folder: Path) -> int:
    found = CheckpointFolder(folder, 2).newest()
    return 0 if found is None else int(found[1]["step"])


class PowerLoss:
    """A folder's states after a power loss at any moment.

    Bytes are safe once their file was synced, names once the folder was. What was not may be lost, or the names kept
    and the bytes lost, as file systems do that write names first.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, after: Callable[[dict[str, bytes]], None]) -> None:
        self.folder, self.after = folder, after
        self.bytes: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        for name in ("fsync", "replace", "link", "unlink", "close"):
            self._observe(patch, name)

    def _observe(self, patch: pytest.MonkeyPatch, name: str) -> None:
        honest = getattr(os, name)

        def observed(*args: Any, **kwargs: Any) -> Any:
            synced = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else ""
            self.check()
            result = honest(*args, **kwargs)
            if synced == str(self.folder):
                self.names = self._listing()
            elif name == "fsync":
                self.bytes[os.fstat(args[0]).st_ino] = Path(synced).read_bytes()
            self.check()
            return result

        patch.setattr(os, name, observed)

    def _listing(self) -> dict[str, int]:
        return {p.name: p.stat().st_ino for p in self.folder.iterdir()}

    def check(self) -> None:
        if self.folder.is_dir():
            for names in (self.names, self._listing()):
                self.after({name: self.bytes.get(inode, b"") for name, inode in names.items()})


def mutated(old: str, new: str) -> type[CheckpointFolder]:
    """`CheckpointFolder` on a changed source of detbb.core.files and its own."""
    sources = {module: inspect.getsource(module) for module in (files, checkpoint_folder)}
    assert sum(source.count(old) for source in sources.values()) == 1, old
    made = {module: types.ModuleType(module.__name__) for module in sources}
    for module, source in sources.items():
        exec(compile(source.replace(old, new), module.__name__, "exec"), made[module].__dict__)
    for name in ("save_tensors", "link_atomically"):
        setattr(made[checkpoint_folder], name, getattr(made[files], name))
    return made[checkpoint_folder].CheckpointFolder


def save_under_power_loss(kind: type[CheckpointFolder], folder: Path, scratch: Path) -> None:
    """Five saves; after each moment of each, a power loss must leave the last completed one or better."""
    completed = 0
    seen: set[tuple[tuple[str, bytes], ...]] = set()

    def after(state: dict[str, bytes]) -> None:
        key = (("", bytes([completed])), *sorted(state.items()))
        if key in seen:
            return
        seen.add(key)
        with pytest.MonkeyPatch.context() as plain:
            for name, function in honest.items():
                plain.setattr(os, name, function)
            look = scratch / str(len(seen))
            look.mkdir()
            for name, data in state.items():
                (look / name).write_bytes(data)
            whole = [p for p in look.glob("*.pt") if valid(p)]
            assert len(whole) == len(list(look.glob("*.pt"))), "a half-written file under a checkpoint's name"
            assert newest(look) >= completed, f"step {completed} is lost"

    honest = {name: getattr(os, name) for name in ("fsync", "replace", "link", "unlink", "close")}
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        power = PowerLoss(folder, patch, after)
        for step in (2, 4, 6, 8, 10):
            kind(folder, 2).save(content(step))
            completed = step
            power.check()
    assert len(seen) > 20


def test_a_power_loss_leaves_every_completed_checkpoint(tmp_path):
    save_under_power_loss(CheckpointFolder, tmp_path / "run", tmp_path)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["last.pt", "step_0000008.pt", "step_0000010.pt"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("                os.fsync(file.fileno())\n", ""),
        ("        os.fsync(descriptor)\n", "        pass\n"),
        (
            "                file.flush()\n                os.fsync(file.fileno())\n",
            "                file.flush()\n                os.replace(temporary, path)\n"
            "                os.fsync(file.fileno())\n                os.link(path, temporary)\n",
        ),
        ("        save_tensors(path, content)\n        link", "        torch.save(content, path)\n        link"),
        (
            "        save_tensors(path, content)\n        link",
            "        for step in self.steps():\n            self.path(step).unlink()\n"
            "        (self.folder / 'last.pt').unlink(missing_ok=True)\n"
            "        save_tensors(path, content)\n        link",
        ),
    ],
    ids=[
        "no fsync of the file",
        "no fsync of the folder",
        "replace before fsync",
        "in place",
        "old ones deleted first",
    ],
)
def test_another_order_would_lose_one(tmp_path, old, new):
    kind = mutated(old, new)
    kind.save.__globals__["torch"] = torch
    with pytest.raises(AssertionError, match=r"is lost|half-written"):
        save_under_power_loss(kind, tmp_path / "run", tmp_path)


def filled(folder: Path, *steps: int) -> CheckpointFolder:
    made = CheckpointFolder(folder, 3)
    for step in steps:
        made.save(content(step))
    return made


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "not a whole PyTorch file"),
        (lambda data: data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :], "checksum"),
        (lambda data: b"", "cannot be read"),
        (lambda data: b"hello", "cannot be read"),
    ],
)
def test_a_damaged_last_checkpoint_is_passed_over_loudly(tmp_path, damage, reason):
    """`last.pt` is the newest step file under another name, so both are damaged."""
    made = filled(tmp_path, 2, 4, 10)
    last = tmp_path / "last.pt"
    last.write_bytes(damage(last.read_bytes()))
    path, found, passed = made.newest()
    assert (path.name, found["step"]) == ("step_0000004.pt", 4)
    assert len(passed) == 1 and "step_0000010.pt" in passed[0] and "last.pt" in passed[0] and reason in passed[0]


def test_a_foreign_last_checkpoint_is_passed_over(tmp_path):
    made = filled(tmp_path, 2, 4)
    (tmp_path / "last.pt").unlink()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "last.pt")
    path, _, passed = made.newest()
    assert path.name == "step_0000004.pt" and "last.pt: not a detbb checkpoint" in passed[0]
    torch.save(content(5), tmp_path / "last.pt")  # a copy, where file systems have no links
    assert made.newest()[1]["step"] == 5
    torch.save(content(3), tmp_path / "last.pt")  # the copy was not made yet
    assert made.newest()[1]["step"] == 4


def test_nothing_valid_is_an_error_and_no_file_at_all_is_none(tmp_path):
    assert CheckpointFolder(tmp_path / "none", 3).newest() is None
    made = filled(tmp_path, 2)
    (tmp_path / "step_0000002.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no valid checkpoint .*step_0000002\.pt"):
        made.newest()


def test_steps_count_as_numbers_and_the_newest_are_kept(tmp_path):
    made = filled(tmp_path, 9_999_998, 9_999_999, 10_000_000, 10_000_002)
    assert made.steps() == [9_999_999, 10_000_000, 10_000_002] and made.newest()[1]["step"] == 10_000_002


def test_resuming_an_earlier_checkpoint_sets_later_ones_aside(tmp_path):
    made = filled(tmp_path, 2, 4, 6)
    made.mark_best(6)
    lines = made.make_newest(made.path(4), 4)
    assert "2 other checkpoints are set aside" in lines[0]
    assert made.newest()[1]["step"] == 4 and read_checkpoint(tmp_path / "last.pt")["step"] == 4
    assert sorted(p.name for p in tmp_path.glob("*.aside")) == ["best.pt.aside", "step_0000006.pt.aside"]
    assert made.make_newest(made.path(4), 4) == []
    first = (tmp_path / "step_0000006.pt.aside").read_bytes()
    made.save(content(6) | {"phase": 1})
    assert made.make_newest(made.path(4), 4)[0].endswith("step_0000006.pt.aside2")
    assert (tmp_path / "step_0000006.pt.aside").read_bytes() == first  # nothing is destroyed
    assert read_checkpoint(tmp_path / "step_0000006.pt.aside2")["phase"] == 1


def test_resuming_a_checkpoint_from_elsewhere_brings_it_in(tmp_path):
    filled(tmp_path / "old", 4)
    made = CheckpointFolder(tmp_path / "new", 3)
    assert made.make_newest(tmp_path / "old" / "last.pt", 4) == [] and made.newest()[1]["step"] == 4
    other = filled(tmp_path / "other", 2, 4)
    kept = other.path(4).read_bytes()
    assert "1 other" in other.make_newest(tmp_path / "old" / "last.pt", 4)[0]
    assert other.path(4).samefile(tmp_path / "old" / "last.pt") and other.path(4).samefile(tmp_path / "other/last.pt")
    assert (tmp_path / "other" / "step_0000004.pt.aside").read_bytes() == kept


def test_what_kills_leave_half_written_is_removed_on_resume(tmp_path):
    ours = (".config.yaml.abc.tmp", "checkpoints/.step_0000002.pt.x1.tmp", "eval/step_0000002/a/.results.json.b.tmp")
    theirs = ("notes.tmp", ".notes.tmp", "other/.config.yaml.abc.tmp", "checkpoints/.mine.tmp")
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    files.remove_leftovers(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(theirs)


def test_saving_the_same_step_again_leaves_no_stray_file(tmp_path):
    made = filled(tmp_path, 2)
    made.mark_best(2)
    made.mark_best(2)
    made.save(content(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "step_0000002.pt"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    def unlink(path, **_):
        if path.name.startswith("step_"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        if path.exists():
            os.unlink(path)

    made = CheckpointFolder(tmp_path, 2)
    monkeypatch.setattr(Path, "unlink", unlink)
    said = [made.save(content(step)) for step in (1, 2, 3, 4)]
    assert [len(lines) for lines in said] == [0, 0, 1, 1] and "cannot remove" in said[2][0]  # each of them once
    assert made.steps() == [1, 2, 3, 4] and newest(tmp_path) == 4
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step_0000002.pt.x1.tmp").touch()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: os.rmdir("/"))
    assert "cannot remove" in files.remove_leftovers(tmp_path)[0]


def test_a_share_without_permissions_links_or_fsync_will_do(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def files_alone(descriptor, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", files_alone)
    made = filled(tmp_path, 2, 4)
    made.mark_best(2)
    assert made.newest()[1]["step"] == read_checkpoint(tmp_path / "last.pt")["step"] == 4


class Elsewhere(torch.Tensor):
    """Stands for a tensor on a GPU: only `cpu()` gives its values."""

    def cpu(self):  # type: ignore[override]
        return torch.arange(3.0)


def test_tensors_on_the_cpu_are_saved_without_a_copy(tmp_path, monkeypatch):
    there = torch.Tensor._make_subclass(Elsewhere, torch.empty(3, device="meta"))
    files.save_tensors(tmp_path / "x.pt", {"model": {"a": there}, "list": [there], "step": 3})
    found = files.load_tensors(tmp_path / "x.pt")
    assert found["model"]["a"].equal(torch.arange(3.0)) and found["list"][0].equal(torch.arange(3.0))
    here, saved = torch.zeros(3), {}
    monkeypatch.setattr(files.torch, "save", lambda content, _: saved.update(content))
    monkeypatch.setattr(files, "check_archive", lambda _: None)
    files.save_tensors(tmp_path / "y.pt", {"a": here})
    assert saved["a"] is here
