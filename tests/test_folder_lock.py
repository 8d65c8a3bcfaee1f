"""One writer a folder: the second run is refused by the name of the first, and nobody leaves a lock behind."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from crash import Job, newest_step

from detbb.core import folder_lock
from detbb.core.errors import UserError
from detbb.core.folder_lock import LOCK_FILE, FolderLock

SHORT = ("train.steps=4", "data.shapes.val=null")


def wait_only(seconds: float) -> None:
    folder_lock.WAIT_S = seconds


def wait_shortly() -> None:
    wait_only(0.5)


def pause_in_step_3() -> None:
    from detbb.training import loop

    learn, calls = loop.train_step, iter(range(100))

    def slow(*args, **kwargs):
        if next(calls) == 2:
            time.sleep(60)
        return learn(*args, **kwargs)

    loop.train_step = slow


@pytest.mark.slow
def test_a_second_run_on_a_folder_is_told_which_is_the_first(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("images")
    first = Job(folder, SHORT, data=images, faults=[pause_in_step_3])
    while newest_step(folder / "run") < 2:
        time.sleep(0.05)
    assert Job(folder, SHORT, data=images, faults=[wait_shortly]).wait() == [2]
    said = (folder / "out.txt").read_text()
    assert f"is being written by process {first.processes[0].pid} on host" in said and "nothing was changed" in said
    first.kill(0)
    assert first.wait() == [-signal.SIGKILL]
    assert Job(folder, SHORT, data=images, faults=[wait_shortly]).wait() == [0]  # nothing is left to be removed


def test_a_run_that_ends_within_the_wait_is_waited_for(tmp_path):
    ready = os.pipe()
    if (child := os.fork()) == 0:
        lock = FolderLock()
        lock.take(tmp_path)
        os.write(ready[1], b"x")
        time.sleep(1)
        os._exit(0)
    os.read(ready[0], 1)
    with FolderLock() as lock:
        began = time.monotonic()
        assert lock.take(tmp_path) == [] and 0.3 < time.monotonic() - began < 5
        assert lock.take(tmp_path) == []  # has it already
    os.waitpid(child, 0)
    with FolderLock() as lock:
        assert lock.take(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', '{"process": null}', "\0" * 50])
def test_whatever_the_lock_file_holds_the_lock_decides(tmp_path: Path, monkeypatch, content):
    monkeypatch.setattr(folder_lock, "WAIT_S", 0.0)
    (tmp_path / LOCK_FILE).write_text(content)
    with FolderLock() as lock:
        assert lock.take(tmp_path) == []
        (tmp_path / LOCK_FILE).write_text(content)
        with FolderLock() as second, pytest.raises(UserError, match="being written by another process"):
            second.take(tmp_path)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FolderLock() as lock:
        (line,) = lock.take(tmp_path)
    assert line.startswith("WARNING: the file system of") and "nothing keeps a second run" in line
