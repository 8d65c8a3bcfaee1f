"""What a machine does to a run: it ends with the cause and the cure, or goes on with a warning. It never hangs."""

from __future__ import annotations

import errno
import os
import re
import time
from importlib import import_module

import pytest
from crash import Job, newest_step
from planted import MACHINE_FAULTS, MachineFault

from detbb.core import machine
from detbb.core.errors import UserError
from detbb.data import images as data_images
from detbb.data import workers
from detbb.data.images import BadImage


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.mark.slow
@pytest.mark.parametrize("fault", MACHINE_FAULTS, ids=lambda f: f.title)
def test_a_fault_of_the_machine_has_its_documented_outcome(tmp_path, images, fault: MachineFault):
    options = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=2", "data.shapes.val=null", *fault.options)
    began = time.monotonic()
    job = Job(tmp_path, options, data=images, faults=[*fault.plant])
    assert job.wait(timeout_s=150) == [fault.code], (tmp_path / "out.txt").read_text()[-3000:]
    text = (tmp_path / "out.txt").read_text()
    assert re.search(fault.says, text), text[-3000:]
    assert fault.code == 0 or time.monotonic() - began < 120
    assert not fault.quiet or "Traceback" not in text
    if fault.step is not None:
        assert newest_step(tmp_path / "run") == fault.step


@pytest.mark.slow
def test_a_worker_that_drops_a_batch_would_hang_the_run(tmp_path, images):
    """The mutant of what ends a worker that cannot hand its batch over."""
    from planted import limit_files_to_a_batch

    options = ("train.steps=4", "train.workers=1", "data.shapes.val=null")
    job = Job(tmp_path, options, data=images, faults=[limit_files_to_a_batch, drop_silently])
    with pytest.raises(TimeoutError):
        job.wait(timeout_s=25)


def drop_silently() -> None:
    import_module("detbb.data.workers")._leave = lambda *_: None


@pytest.mark.parametrize(("free_mb", "workers_", "warned"), [(64, 4, True), (64, 0, False), (8000, 4, False)])
def test_the_shared_memory_that_batches_need_is_estimated(tmp_path, monkeypatch, free_mb, workers_, warned):
    from runs import tiny_config

    config = tiny_config(tmp_path, "train.batch_size=16", f"train.workers={workers_}", "eval.batch_size=8")
    config.data["shapes"].image_size = [800, 1333]
    monkeypatch.setattr(workers, "shared_memory", lambda: free_mb * 1_000_000)
    lines = workers.shared_memory_warning(config, world_size=1)
    assert len(lines) == warned
    if warned:  # 4 workers x 2 batches x (16 + 8) images x 3 x 800 x 1344
        assert "have 619 MB of images ready" in lines[0] and "--shm-size" in lines[0] and "train.workers: 0" in lines[0]


def test_shared_memory_is_measured_where_there_is_some():
    free = machine.shared_memory()
    assert free is None or free > 0
    assert machine.cores() >= 1 and machine.memory() > 2**28


def test_what_the_machine_cannot_open_is_no_bad_image(tmp_path, monkeypatch):
    """`on_bad_image: skip` would leave out sound images, and other ones in every run."""
    (tmp_path / "x.png").touch()
    for number, kind in ((errno.EMFILE, UserError), (errno.EIO, UserError), (errno.EACCES, BadImage)):

        def fail(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(data_images, "open", fail, raising=False)
        with pytest.raises(UserError, match="cannot be read") as refused:
            data_images.read_image(tmp_path / "x.png", 1000)
        assert type(refused.value) is kind
