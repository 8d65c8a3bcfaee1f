"""What a run costs beyond its mathematics: whole steps against bare ones on a batch in memory, and Lightning's.

    python benchmarks/trainer.py                        # R18 FCOS, 256 x 256, batch 8, 2 workers
    python benchmarks/trainer.py --steps 20 --repeats 2 --json trainer.json

A bare step: forward, backward and optimizer step on the same detector, nothing else. A whole step: what a run logs as
`step_s`, with data, loss check, average, log and digests. Lightning's: the same detector, loader and optimizer, and its
log of every step. Then: the share of a run that waits for data, and that checks
digests; and the seconds of runs of several lengths over several numbers of images, with a straight line through them.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning
import numpy as np
import timing
import torch
from lightning.pytorch.loggers import CSVLogger

from detbb import load_config, train
from detbb.data.formats import read_split
from detbb.data.loader import train_loader
from detbb.detector import build_detector
from detbb.freeze import digests

CONFIG = """
device: cpu
output_dir: {out}
backbone: {{arch: {arch}, norm: bn}}
data: {{made: {{format: shapes, image_size: [{size}, {size}], augment: none, train: {{images: {data}, size: {images}}},
  val: {{images: {data}_val, size: 4}}}}}}
heads: {{it: {{type: fcos, data: made}}}}
train: {{steps: {steps}, batch_size: {batch}, workers: {workers}}}
optimizer: {{type: sgd, lr: 1.0e-6, weight_decay: 1.0e-4}}
log: {{every: 1}}
"""


def config_of(folder: Path, options: Any, *, images: int, steps: int, name: str) -> Any:
    path = folder / f"{name}.yaml"
    fields = {"arch": options.arch, "size": options.size, "batch": options.batch, "workers": options.workers}
    path.write_text(
        CONFIG.format(out=folder / name, data=folder / f"data_{images}", images=images, steps=steps, **fields)
    )
    return load_config(path)


def whole_run(config: Any) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the whole run, and its lines of training steps."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    seconds = time.perf_counter() - began
    lines = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines())
    return seconds, [line for line in lines if line["split"] == "train"]


def bare_steps(config: Any, count: int) -> list[float]:
    """Seconds of each."""
    data = {"made": read_split(config.data["made"], "train", "made")}
    batch = next(iter(train_loader(data, config, needs={"made": frozenset()}, start_step=0, end_step=1)))
    batch = batch.to(torch.device("cpu"))
    torch.manual_seed(0)
    detector = build_detector(config, {"it": data["made"].classes}).train()
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], 1e-6, 0.9, weight_decay=1e-4)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        total = sum(detector(batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds


class Peer(lightning.LightningModule):
    def __init__(self, detector: torch.nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        losses = self.detector(batch)
        self.log_dict({name: value.detach() for name, value in losses.items()}, batch_size=len(batch.targets))
        return sum(losses.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, 1e-6, 0.9, weight_decay=1e-4)


class Clock(lightning.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def lightning_steps(config: Any, count: int, folder: Path) -> list[float]:
    """Seconds of each step but the first."""
    data = {"made": read_split(config.data["made"], "train", "made")}
    loader = train_loader(data, config, needs={"made": frozenset()}, start_step=0, end_step=count)
    clock = Clock()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_steps=count, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=1, callbacks=[clock], **quiet
    )
    trainer.fit(Peer(build_detector(config, {"it": data["made"].classes}).train()), loader)
    return np.diff(clock.ends).tolist()


def overhead(folder: Path, options: Any) -> list[dict[str, Any]]:
    whole, bare, peer, waiting, checks = [], [], [], [], []
    for turn in range(options.repeats):
        config = config_of(folder, options, images=64, steps=options.steps, name=f"run_{turn}")
        seconds, lines = whole_run(config)
        skipped = len(lines) // 4  # the first steps warm up memory and workers
        whole.append(statistics.median(line["step_s"] for line in lines[skipped:]))
        waiting.append(
            sum(line["data_s"] for line in lines[skipped:]) / sum(line["step_s"] for line in lines[skipped:])
        )
        bare.append(statistics.median(bare_steps(config, options.steps)[skipped:]))
        peer.append(statistics.median(lightning_steps(config, options.steps, folder / f"peer_{turn}")[skipped:]))
        detector = build_detector(config, {"it": ["a"]})
        began = time.perf_counter()
        digests(detector, [name for name in detector.state_dict() if name.startswith("backbone.")])
        checks.append((time.perf_counter() - began) / seconds)
    row = timing.row(f"{options.arch}: step of a run against a bare one", {"whole run": whole, "bare": bare})
    against = timing.row(f"{options.arch}: Lightning's step against a run's", {"Lightning": peer, "detbb": whole})
    timing.show([row, against])
    shares = {"case": "share of a run", "waiting_for_data": statistics.median(waiting), "one_digest": max(checks)}
    print(f"waiting for data {shares['waiting_for_data']:.1%}, one check of the backbone's digests", end=" ")
    print(f"{shares['one_digest']:.3%} of the run")
    return [row, against, shares]


def growth(folder: Path, options: Any) -> dict[str, Any]:
    """Seconds = a + b steps + c images."""
    rows = []
    for images, steps in ((64, 10), (64, 20), (64, 40), (1024, 10), (1024, 40), (4096, 20)):
        config = config_of(folder, options, images=images, steps=steps, name=f"line_{images}_{steps}")
        read_split(config.data["made"], "train", "made")  # made once, not measured
        rows.append((images, steps, whole_run(config)[0]))
    images, steps, seconds = np.array(rows).T
    design = np.stack([np.ones(len(rows)), steps, images], axis=1)
    fit = np.linalg.lstsq(design, seconds, rcond=None)[0]
    left = np.abs(design @ fit - seconds) / seconds
    print(f"seconds = {fit[0]:.2f} + {fit[1]:.4f} steps + {fit[2]:.6f} images, largest deviation {left.max():.1%}")
    return {"case": "linear", "runs": rows, "fit": fit.tolist(), "largest_deviation": float(left.max())}


def main() -> None:
    parser = timing.arguments(__doc__ or "", repeats=3)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = overhead(Path(name), options)
        rows.append(growth(Path(name), options))
    timing.finish(options.json, rows)


if __name__ == "__main__":
    main()
