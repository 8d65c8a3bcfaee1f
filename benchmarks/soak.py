"""Kill training at random and inside saves, and run it for long: what tests/test_crash.py does in small.

python benchmarks/soak.py            # about ten minutes on two cores; prints JSON, exits with 1 if anything was lost
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]
os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the thread count

import numpy as np
from crash import SAVING, Job, differences, train_to_end

from detbb.checkpoint.folder import CheckpointFolder

OPTIONS = (
    "phases=[{steps: 40, freeze: [backbone, neck]}, {steps: 80, freeze: [backbone.stem]}, {freeze: [neck]}]",
    "train.steps=160",
    "train.accumulate=2",
    "train.grad_clip=1.0",
    "ema.warmup_steps=100",
    "eval.every=40",
    "eval.batch_size=2",
    "checkpoint.every=5",
    "log.images=1",
)


def random_kills(root: Path, images: Path, kills: int, processes: int) -> dict[str, Any]:
    """SIGKILL at random times to a random process (half the time with its workers), until there were `kills`."""
    chance = random.Random(processes)
    undisturbed = root / f"undisturbed_{processes}"
    undisturbed.mkdir()
    train_to_end(undisturbed, OPTIONS, data=images, processes=processes)
    found: dict[str, Any] = {"processes": processes, "kills": 0, "runs": 0, "lost": []}
    while found["kills"] < kills:
        folder = root / f"random_{processes}_{found['runs']}"
        folder.mkdir()
        ended = False
        while not ended:
            workers = chance.choice([0, 2])
            job = Job(folder, (*OPTIONS, f"train.workers={workers}"), data=images, processes=processes)
            deadline = time.monotonic() + chance.uniform(0.3, 5)
            while time.monotonic() < deadline and any(p.exitcode is None for p in job.processes):
                time.sleep(0.01)
            if found["kills"] < kills:
                job.kill(chance.randrange(processes), group=chance.random() < 0.5)
            codes = job.wait(600)
            ended = set(codes) == {0}
            found["kills"] += -signal.SIGKILL in codes
            if not ended and -signal.SIGKILL not in codes:
                raise RuntimeError(f"exit codes {codes}: {(folder / 'out.txt').read_text()[-2000:]}")
        found["runs"] += 1
        found["lost"] += differences(folder / "run", undisturbed / "run")
    return found


def kills_inside_saves(root: Path, images: Path, kills: int) -> dict[str, Any]:
    """Each moment of a save in turn, at a random save; a valid checkpoint, no older than before, must be found."""
    chance = random.Random(0)
    folder, newest = root / "saves", 0
    folder.mkdir()
    found: dict[str, Any] = {"kills": 0, "valid": 0, "steps": [], "lost": []}
    options = (*OPTIONS, "data.shapes.val=null", "checkpoint.every=2")
    Job(folder, options, data=images, faults=[("between reading and learning", 8)]).wait()
    for moment in itertools.islice(itertools.cycle(SAVING), kills):
        job = Job(folder, options, data=images, faults=[(moment, chance.randint(1, 3))])
        found["kills"] += job.wait(600) == [-signal.SIGKILL]
        valid = CheckpointFolder(folder / "run" / "checkpoints", 3).newest()
        step = 0 if valid is None else int(valid[1]["step"])
        found["valid"] += step >= newest > -1 and step > 0
        found["steps"].append(newest := step)
    train_to_end(folder, options, data=images)
    other = root / "saves_undisturbed"
    other.mkdir()
    train_to_end(other, options, data=images)
    return found | {"lost": differences(folder / "run", other / "run")}


def measure() -> None:
    """Let this process note its memory and open files at every 50th step."""
    training = import_module("detbb.training.loop")
    log_step = training.log_step

    def measured(run: Any, *args: Any, **kwargs: Any) -> None:
        log_step(run, *args, **kwargs)
        if run.step % 50 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            line = {"step": run.step, "resident": resident, "files": len(os.listdir("/proc/self/fd"))}
            with (run.folder.parent / "measured.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    training.log_step = measured


def long_run(root: Path, images: Path, steps: int) -> dict[str, Any]:
    """Memory and open files over a run that evaluates and saves every 50 steps; slopes over its last three quarters."""
    folder = root / "long"
    folder.mkdir()
    options = (f"train.steps={steps}", "train.workers=2", "eval.every=50", "checkpoint.every=50", "log.every=10")
    job = Job(folder, options, data=images, faults=[measure])
    if job.wait(3600) != [0]:
        raise RuntimeError((folder / "out.txt").read_text()[-2000:])
    lines = [json.loads(line) for line in (folder / "measured.jsonl").read_text().splitlines()]
    late = lines[len(lines) // 4 :]
    step = [line["step"] for line in late]
    slope = {key: float(np.polyfit(step, [line[key] for line in late], 1)[0]) for key in ("resident", "files")}
    return {
        "steps": steps,
        "resident_mb": [round(line["resident"] / 1e6, 1) for line in lines],
        "open_files": [line["files"] for line in lines],
        "resident_bytes_a_step": round(slope["resident"], 1),
        "open_files_a_step": round(slope["files"], 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = root / "images"
        found = {
            "random kills": [random_kills(root, images, options.kills // 2, n) for n in (1, 2)],
            "kills inside saves": kills_inside_saves(root, images, options.saves),
            "long run": long_run(root, images, options.steps),
        }
    print(json.dumps(found, indent=1))
    lost = [*found["random kills"][0]["lost"], *found["random kills"][1]["lost"], *found["kills inside saves"]["lost"]]
    sys.exit(bool(lost) or found["kills inside saves"]["valid"] != options.saves)


if __name__ == "__main__":
    main()
