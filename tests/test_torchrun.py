"""torchrun on this machine: whatever happens to one process, all end soon, say why, and lose nothing."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import run_ranks
from runs import TINY, learned, lines, load, shrink, tiny_config

from detbb.checkpoint.content import read_checkpoint
from detbb.data.formats import read_split
from detbb.data.loader import train_loader
from detbb.heads.loading import load_config
from detbb.training.loop import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 10
OPTIONS = ("train.steps=12", "train.workers=1", "checkpoint.every=1", f"train.timeout_s={TIMEOUT_S}")


@dataclass
class Job:
    """One torchrun, and what it wrote."""

    process: subprocess.Popen
    output: Path
    ended: float = 0.0

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def times(self, word: str) -> list[float]:
        """When a process on rank 1 said `FAULT`."""
        return [float(t) for t in re.findall(rf"^{word} ([\d.]+)$", self.text, re.MULTILINE)]

    def wait_for(self, happened: Callable[[], object]) -> None:
        end = time.monotonic() + 300
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.text
            time.sleep(0.05)

    def end(self) -> Job:
        try:
            self.process.wait(timeout=300)
        finally:
            self.ended = time.time()
            self.process.kill()
        return self

    @property
    def last_word(self) -> str:
        """What torchrun shows last: the root cause."""
        return self.text.rpartition("Root Cause (first observed failure):")[2]


def torchrun(file: Path, output: Path, *options: str, arguments: tuple[str, ...] = ()) -> Job:
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "tools" / "train.py")]
    command += ["--config", str(file), "--resume", *OPTIONS, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "support")}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int("--standalone" not in options))  # as the scripts do
    with output.open("w") as stream:
        return Job(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment), output)


def processes_of(file: Path) -> list[int]:
    """Processes with this file on their command line: torchrun, its workers, and their loaders."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(file).encode() in (entry / "cmdline").read_bytes():  # that of a zombie is empty
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    config = tiny_config(folder, data=folder / "shapes")
    for split in ("train", "val"):
        read_split(config.data["shapes"], split, "shapes")
    return folder / "shapes"


def config_file(folder: Path, images: Path) -> Path:
    file = folder / "job.yaml"
    file.write_text(TINY.format(out=folder / "run", data=images).replace("{type: fcos,", '{type: "faults:FaultyHead",'))
    return file


def _train(file: str) -> None:
    shrink()
    train(load_config(file, OPTIONS))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(_train, 2, str(config_file(folder, images)))
    return folder / "run"


def image_of(config_path: Path, *, step: int, rank: int) -> Path:
    """A file that this rank alone reads in this step."""
    config = load_config(config_path, OPTIONS, world_size=2)
    data = read_split(config.data["shapes"], "train", "shapes")
    loader = train_loader(
        {"shapes": data},
        config,
        needs={"shapes": frozenset()},
        start_step=step,
        end_step=step + 1,
        rank=rank,
        world_size=2,
    )
    (batch,) = loader
    ids = data.image_ids.tolist()
    return Path(data.path(ids.index(batch.targets[0].image_id)))


@dataclass
class End:
    """How a job ended that had something happen to it."""

    job: Job
    saved: int  # the newest checkpoint's step
    left: list[int]
    after_s: float = 0.0  # from the fault until torchrun was gone


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, End]:
    """One run of 12 steps that fails in every way, each time going on from the last checkpoint."""
    folder = tmp_path_factory.mktemp("story")
    file = config_file(folder, images)
    ends: dict[str, End] = {}

    def tell(name: str, faults: str, *, restarts: int = 0, act: Callable[[Job], object] = lambda job: None) -> None:
        options = ("--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}")
        job = torchrun(file, folder / f"{name}.txt", *options, arguments=(f"heads.shapes.faults={faults}",))
        act(job)
        job.end()
        ends[name] = End(job, load(folder / "run")["step"], processes_of(file))
        last = (folder / "run" / "checkpoints" / "last.pt").stat().st_mtime  # a broken image comes right after it
        ends[name].after_s = job.ended - max([last, *job.times("FAULT")])

    tell("raise", "[raise@2]")
    tell("kill", "[exit@2, kill@2]", restarts=1)
    tell("stop", "[stop@2]")
    path = image_of(file, step=5, rank=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    tell("bad image", "[]")
    path.write_bytes(whole)
    tell("nan", "[nan@2]")
    tell("nan gradient", "[nan_gradient@1]")
    tell("sigterm", "[pause@2]", act=lambda job: (job.wait_for(lambda: job.times("FAULT")), job.process.terminate()))
    tell("restart", "[sigterm@2, none@0]", restarts=1)
    return ends


LOST = rf"rank 1 \(pid \d+ on .*\) gave no answer within train.timeout_s \({TIMEOUT_S} s\)"
NOT_FINITE = r"step 6: a loss or gradient is not finite \(rank 1: losses \{[^(]*nan[^(]*; no weight was changed, .*"
FAILURES = {
    "raise": (1, r"rank +: 1 [\s\S]*ZeroDivisionError: planted in rank 1"),
    "kill": (3, r"rank +: 1 [\s\S]*Signal 9 \(SIGKILL\) received by PID \d+"),
    "stop": (4, r"rank +: 1 [\s\S]*" + LOST),
    "bad image": (5, r"rank +: 1 [\s\S]*exitcode +: 2 [\s\S]*traceback : error: [^\n]*\.png[^\n]*"),
    "nan": (6, NOT_FINITE),
    "nan gradient": (6, NOT_FINITE.replace("[^(]*nan[^(]*", "[^(]*")),
}  # the newest checkpoint's step; what is shown last


@pytest.mark.parametrize("name", FAILURES)
def test_all_end_soon_after_one_failed_and_its_error_comes_last(story: dict[str, End], name: str) -> None:
    saved, last = FAILURES[name]
    end = story[name]
    assert end.job.process.returncode not in (0, None), end.job.text
    assert re.search(last + r"\n=+\n$", end.job.last_word), end.job.text
    assert end.saved == saved and end.left == []
    assert end.after_s <= (TIMEOUT_S if name == "stop" else 0) + 15
    assert end.job.text.count("Traceback (most recent call last)") <= 3  # the error, the summary, and torchrun's own
    print(f"{name}: gone after {end.after_s:.1f} s")


def test_a_process_that_exits_early_is_missed_and_named(story: dict[str, End]) -> None:
    """It failed nowhere, so torchrun alone would wait for the others for ever."""
    job = story["kill"].job
    first = job.text.split("FAULT")[1]
    assert re.search(r"\[rank 0\] error: rank 1 \(pid \d+ on .*\) ended before its time", first)
    assert "at step 2" in first
    began, after_two_steps = job.times("FAULT")
    print(f"exit: started again and two steps further after {after_two_steps - began:.1f} s")


def test_sigterm_saves_at_the_step_boundary_on_all_ranks(story: dict[str, End]) -> None:
    end = story["sigterm"]
    assert end.job.process.returncode != 0 and end.saved == 8 and end.left == []
    assert (
        "Traceback"
        not in end.job.text.partition("torch.distributed.elastic.multiprocessing.api.SignalException")[0].partition(
            "Received 15"
        )[0]
    )
    assert end.after_s < 3 + 15


def test_after_all_failures_the_run_ends_with_the_same_bits(story: dict[str, End], undisturbed: Path) -> None:
    """The last part: SIGTERM to one process alone; all save and leave, torchrun starts them again, they finish."""
    job = story["restart"].job
    assert job.process.returncode == 0, job.text
    assert "at step 10" in job.text and story["restart"].left == []
    run = job.output.parent / "run"
    assert learned(run) == learned(undisturbed)
    assert lines(run, "train") == lines(undisturbed, "train") and lines(run, "val") == lines(undisturbed, "val")
    for path in (run / "checkpoints").iterdir():
        read_checkpoint(path)


def test_two_nodes_restart_after_a_kill_and_end_with_same_bits(tmp_path: Path, images: Path, undisturbed: Path) -> None:
    file = config_file(tmp_path, images)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}")
    options += ("--rdzv-id=two", "--max-restarts=2", "--local-addr=localhost")
    quick = "keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=1,is_host="

    def node(name: str, host: bool = False) -> Job:
        conf = f"--rdzv-conf={quick}{int(host)}"
        return torchrun(file, tmp_path / f"{name}.txt", *options, conf, arguments=("heads.shapes.faults=[pause@3]",))

    stays, dies = node("stays", host=True), node("dies")
    stays.wait_for(lambda: stays.times("FAULT") or dies.times("FAULT"))
    dies.process.kill()
    killed = time.time()
    comes = node("comes")
    stays.end(), comes.end(), dies.end()
    assert (stays.process.returncode, comes.process.returncode) == (0, 0), stays.text + comes.text
    assert processes_of(file) == []
    assert learned(tmp_path / "run") == learned(undisturbed)
    print(f"finished {stays.ended - killed:.1f} s after the kill")
