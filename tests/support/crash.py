"""Training in processes of their own that are killed at a chosen moment, and what they leave."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from runs import flat, lines, load, shrink, tiny_config

from detbb.checkpoint.folder import CheckpointFolder

PRELOAD = [
    "detbb.training.loop",
    "detbb.heads.fcos",
    "detbb.metrics.evaluators",
    "hotcoco",
    "torch.utils.tensorboard",
    "runs",
]
TIMED = ("data_s", "step_s", "images_per_s")

# moment -> what is replaced by a function that kills its process: module, attribute, and which call it is
Trigger = tuple[str, str, Callable[..., bool]]


def _any(*_: Any, **__: Any) -> bool:
    return True


def _of(name: str) -> Callable[..., bool]:
    return lambda *paths, **_: any(Path(p).name.startswith(name) for p in paths)


def _open_file(name: str) -> Callable[..., bool]:
    return lambda descriptor, **_: name in os.readlink(f"/proc/self/fd/{descriptor}")


def _from(caller: str) -> Callable[..., bool]:
    return lambda *_, **__: sys._getframe(2).f_code.co_name == caller


def _is_evaluation(*_: Any, split: str, **__: Any) -> bool:
    return split == "val"


MOMENTS: dict[str, Trigger] = {
    "between reading and learning": ("detbb.training.loop", "train_step", _any),
    "between backward and optimizer": ("detbb.training.step", "_update", _any),
    "between optimizer and average": ("detbb.training.ema", "Ema.update", _any),
    "between learning and logging": ("detbb.training.loop", "log_step", _any),
    "while saving: before the temporary file": ("detbb.checkpoint.folder", "save_tensors", _any),
    "while saving: the temporary file is half written": ("detbb.core.files", "torch.save", _any),
    "while saving: before its fsync": ("detbb.core.files", "os.fsync", _open_file(".step_")),
    "while saving: before it is verified": ("detbb.core.files", "check_archive", _from("write_atomically")),
    "while saving: before it is renamed": ("detbb.core.files", "os.replace", _of(".step_")),
    "while saving: before the fsync of the folder": ("detbb.core.files", "sync_folder", _of("checkpoints")),
    "while saving: before last.pt": ("detbb.checkpoint.folder", "link_atomically", _any),
    "while saving: the link is there, last.pt is not renamed": ("detbb.core.files", "os.replace", _of(".last.pt")),
    "while saving: before old ones are deleted": ("detbb.checkpoint.folder", "CheckpointFolder.steps", _from("save")),
    "between saving and evaluating": ("detbb.training.loop", "evaluate_run", _any),
    "while evaluating": ("detbb.inference.evaluate", "_Branch.take", _any),
    "evaluated, before best.pt": ("detbb.checkpoint.folder", "CheckpointFolder.mark_best", _any),
    "evaluated, before it is logged": ("detbb.report.log", "RunLog.evaluation", _any),
    "evaluated, TensorBoard has it and metrics.jsonl not": (
        "detbb.report.writers",
        "MetricsFile.scalars",
        _is_evaluation,
    ),
}
SAVING = [moment for moment in MOMENTS if moment.startswith("while saving")]


def plant(moment: str, number: int) -> None:
    """Let this process kill itself at the `number`-th time (from 1) that it comes to the moment."""
    module, attribute, is_it = MOMENTS[moment]
    *path, name = attribute.split(".")
    owner: Any = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    honest, left = getattr(owner, name), [number]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if is_it(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if name == "save":
                    whole = io.BytesIO()
                    honest(args[0], whole)
                    args[1].write(whole.getvalue()[: whole.tell() // 2])
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args, **kwargs)

    setattr(owner, name, deadly)


def child(
    folder: Path, overrides: Sequence[str], data: Path, environment: dict[str, str], faults: Sequence[Any]
) -> None:
    """One process of a run, as `tools/train.py --resume`.

    faults: (moment, number) to die at, the most bytes that a file may have, or a function to call before the start.
    """
    os.setsid()
    out = os.open(folder / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    from detbb.core.cli import run
    from detbb.training.loop import train

    shrink()
    for fault in faults:
        if isinstance(fault, tuple):
            plant(*fault)
        elif isinstance(fault, int):
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault, fault))
        else:
            fault()
    try:
        run(lambda: train(tiny_config(folder, *overrides, data=data), resume="auto"))
    except SystemExit as left:
        sys.stdout.flush()
        os._exit(int(left.code or 0))


class Job:
    """A run of one or more processes; `faults` are those of process `victim`."""

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str],
        *,
        data: Path,
        processes: int = 1,
        victim: int = 0,
        faults: Any = (),
    ) -> None:
        context = multiprocessing.get_context("forkserver")  # torch is imported once, and every run forks from there
        context.set_forkserver_preload(PRELOAD)
        port = str(_free_port())
        self.processes = []
        for rank in range(processes):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            own = tuple(faults) if rank == victim else ()
            arguments = (folder, overrides, data, environment if processes > 1 else {}, own)
            self.processes.append(context.Process(target=child, args=arguments))
            self.processes[-1].start()

    def kill(self, victim: int, *, group: bool = False) -> None:
        pid = self.processes[victim].pid
        assert pid is not None
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(pid, signal.SIGKILL)

    def wait(self, timeout_s: float = 600) -> list[int]:
        """The exit codes. When one process is killed the others are, too, as torchrun does."""
        end = time.monotonic() + timeout_s
        while any(p.exitcode is None for p in self.processes):
            ended = [p.exitcode for p in self.processes if p.exitcode is not None]
            if any(code < 0 for code in ended) or time.monotonic() > end:
                for process in self.processes:
                    process.kill()
                if time.monotonic() > end:
                    raise TimeoutError(f"still running after {timeout_s} s")
            time.sleep(0.01)
        return [int(p.exitcode or 0) for p in self.processes]


def train_to_end(folder: Path, overrides: Sequence[str], **options: Any) -> None:
    assert set(Job(folder, overrides, **options).wait()) == {0}, (folder / "out.txt").read_text()[-4000:]


def newest_step(run: Path) -> int:
    """The step of the newest valid checkpoint, 0 without one."""
    found = CheckpointFolder(run / "checkpoints", 3).newest()
    return 0 if found is None else int(found[1]["step"])


def left_by(run: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on how often it was killed."""
    names = [name for name in ("last", "best") if (run / "checkpoints" / f"{name}.pt").exists()]
    found: dict[str, Any] = {f"{name}.pt{key}": value for name in names for key, value in _learned(run, name).items()}
    found |= {f"metrics.jsonl {split}": lines(run, split) for split in ("train", "val")}
    found["checkpoints"] = sorted(p.name for p in (run / "checkpoints").iterdir())
    found["freeze.json"] = (run / "freeze.json").read_text()
    found |= {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("eval/*/*/*.json"))}
    found["stray files"] = [str(p) for p in run.rglob(".*")]
    return found | {"TensorBoard": board(run)}


def _learned(run: Path, name: str) -> dict[str, Any]:
    content = load(run, name)
    return flat(
        {key: content[key] for key in ("step", "phase", "model", "ema", "optimizer", "scaler", "rng", "frozen")}
    )


def board(run: Path) -> dict[tuple[str, int], list[bytes]]:
    """Every record of the event files as they lie there: (tag, step) -> values, without what is measured in seconds."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[tuple[str, int], list[bytes]] = {}
    for path in sorted((run / "tb").iterdir()):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag.rsplit("/", 1)[-1] not in TIMED:
                    found.setdefault((value.tag, event.step), []).append(value.SerializeToString())
    return found


def differences(run: Path, undisturbed: Path) -> list[str]:
    """What of `left_by` two runs do not have in common, and what the first holds twice."""
    own, other = left_by(run), left_by(undisturbed)
    found = [key for key in {**own, **other} if own.get(key) != other.get(key)]
    steps = Counter((r["step"], r.get("weights")) for split in ("train", "val") for r in lines(run, split))
    found += [f"step {step} is {count} times in metrics.jsonl" for step, count in steps.items() if count > 1]
    return found + [f"{key} is {len(v)} times in TensorBoard" for key, v in board(run).items() if len(v) > 1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
