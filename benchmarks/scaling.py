"""Steps per second on 1, 2, … processes of this machine, and the share of a step in communication and waiting.

    python benchmarks/scaling.py                                        # ResNet-18, FCOS, 4 images of 192 pixels a step
    python benchmarks/scaling.py --arch resnet50 --size 320 --repeats 20 --json scaling.json

The images of a step are the same whatever the number of processes, which divide them. Each process computes on its part
of the machine's cores (and on its own GPU where there are several). The share: in turn with real steps, the processes
compute the same steps side by side without telling each other anything; what the real ones take longer is communication
and waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timing
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detbb.config.schema import Config
from detbb.detector import build_detector
from detbb.distributed.processes import wrap
from detbb.heads import find_head
from detbb.structures.batch import Batch, ImageSize, Target
from detbb.training import optim
from detbb.training.step import TrainState, train_step

CASES = {"nothing frozen": [], "backbone frozen": ["backbone"]}
CLASSES = [f"class {i}" for i in range(80)]


def made_batch(size: int, images: slice) -> Batch:
    """Random pixels and seven boxes for each of these images."""
    pixels, targets = [], []
    for index in range(images.start, images.stop):
        g = torch.Generator().manual_seed(index)
        pixels.append(torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8))
        corner = torch.rand(7, 2, generator=g) * size * 0.6
        boxes = torch.cat([corner, corner + size * (0.05 + 0.3 * torch.rand(7, 2, generator=g))], dim=1)
        labels = torch.randint(0, len(CLASSES), (7,), generator=g)
        present = torch.zeros(len(CLASSES), dtype=torch.bool)
        targets.append(Target(index, ImageSize((size, size), (size, size)), index, boxes, labels, present))
    return Batch(torch.stack(pixels), targets, "made")


def make_state(arch: str, frozen: list[str], device: torch.device) -> TrainState:
    config = Config()
    config.backbone.arch, config.backbone.norm = arch, "frozen_bn"
    config.heads = {"objects": find_head("fcos").Config(type="fcos", data="made")}
    torch.manual_seed(0)
    detector = build_detector(config, {"objects": CLASSES}).freeze(frozen).train().to(device)
    state = TrainState(detector, None, config.train, device, torch.amp.GradScaler(device.type, enabled=False))
    state.optimizer = optim.build_optimizer(detector, config.optimizer)
    state.model = wrap(detector)
    return state


@contextmanager
def silence(state: TrainState) -> Iterator[None]:
    """Each process computes its share of a step as if it were alone."""
    wrapped, state.model = state.model, state.detector
    with mock.patch("detbb.distributed.collectives.is_distributed", lambda: False):  # `world_size` asks it
        yield
    state.model = wrapped


def measure(rank: int, processes: int, options: argparse.Namespace, folder: str) -> None:
    """Write the seconds of each step with and without communication, in each case, as this rank saw them."""
    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= processes else torch.device("cpu")
    if processes > 1:
        backend, store = "nccl" if device.type == "cuda" else "gloo", f"file://{folder}/store-{processes}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=processes)
    share = options.images // processes
    batch = made_batch(options.size, slice(rank * share, (rank + 1) * share))

    def seconds(state: TrainState, how: AbstractContextManager[None]) -> float:
        if processes > 1:
            dist.barrier()
        with how:
            began = time.perf_counter()
            train_step(state, [batch], lr=1e-5, stop=lambda: 0, folder=Path(folder), step=0)
            return time.perf_counter() - began

    found = {}
    for case, frozen in CASES.items():
        state = make_state(options.arch, frozen, device)
        turns = [(seconds(state, nullcontext()), seconds(state, silence(state))) for _ in range(2 + options.repeats)]
        trained = sum(p.numel() for p in state.detector.parameters() if p.requires_grad)
        found[case] = {"step_s": [a for a, _ in turns[2:]], "silent_s": [b for _, b in turns[2:]], "trained": trained}
    Path(folder, f"{processes}-{rank}.json").write_text(json.dumps(found))
    if processes > 1:
        dist.destroy_process_group()


def summary(case: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A step takes as long as it takes the slowest rank; silent steps wait for nobody."""
    step_s = statistics.median(max(times) for times in zip(*(r["step_s"] for r in ranks), strict=True))
    silent_s = statistics.median(t for r in ranks for t in r["silent_s"])
    together = len(ranks) > 1
    return {
        "case": case,
        "processes": len(ranks),
        "steps_per_s": 1 / step_s,
        "communication_share": max(1 - silent_s / step_s, 0.0) if together else 0.0,
        "reduced_mib": ranks[0]["trained"] * 4 / 2**20 if together else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=192, help="height and width of the images")
    parser.add_argument("--images", type=int, default=4, help="images of a step, over all processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=10, help="steps of each kind")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in options.processes:
            mp.start_processes(measure, (processes, options, folder), nprocs=processes, start_method="spawn")
            ranks = [json.loads(Path(folder, f"{processes}-{rank}.json").read_text()) for rank in range(processes)]
            rows += [summary(case, [rank[case] for rank in ranks]) for case in CASES]
    print(f"{'case':<16}  processes  steps/s  communication and waiting  gradients reduced")
    for row in sorted(rows, key=lambda row: (list(CASES).index(row["case"]), row["processes"])):
        shares = f"{row['communication_share']:25.0%}  {row['reduced_mib']:13.1f} MiB"
        print(f"{row['case']:<16}  {row['processes']:^9}  {row['steps_per_s']:7.2f}  {shares}")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"machine": timing.machine(), "settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
