"""What a person sees, and what is kept of it: terminal, log.txt, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from detbb.files import write_atomically


class RunLog:
    """One writer to the terminal, `log.txt`, `metrics.jsonl` and `tb/`; on ranks other than 0 every call does nothing.

    resume_step: the step of the checkpoint that the run goes on from; what later steps wrote is dropped, so no step
    is there twice. None for a fresh run.
    """

    def __init__(self, output_dir: Path, *, resume_step: int | None = None, rank: int = 0) -> None:
        self._writes = rank == 0
        if not self._writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        output_dir.mkdir(parents=True, exist_ok=True)
        metrics = output_dir / "metrics.jsonl"
        if resume_step is not None and metrics.exists():
            drop_later_steps(metrics, resume_step)
        self._console = Console() if sys.stdout.isatty() else Console(width=140)
        self._text = (output_dir / "log.txt").open("a", encoding="utf-8")
        self._plain = Console(file=self._text, width=140, no_color=True, force_terminal=False)
        self._metrics = metrics.open("a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._tb = SummaryWriter(str(output_dir / "tb"), purge_step=purge)
        self._live: Live | None = None
        self._speed = _Speed()
        self._total = 0

    def info(self, text: str) -> None:
        """A line (or a few) on the terminal and in log.txt."""
        self._show(Text(text))

    def table(self, table: Table) -> None:
        self._show(table)

    def progress(
        self, step: int, total: int, *, losses: Mapping[str, float], images: int, step_s: float, data_s: float
    ) -> None:
        """Renew the live line; call at every step.

        images: of this step over all ranks. step_s: the whole step, of which data_s was spent waiting for data.
        """
        if not self._writes:
            return
        self._speed.add(images, step_s, data_s)
        self._total = total
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(
                Text(f"{self._status(step)}  {_numbers(losses)}", style="cyan", no_wrap=True, overflow="ellipsis")
            )

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """One training record: `{"step", "split": "train", …values}`; also a line of text."""
        if not self._writes:
            return
        self._record({"step": step, "split": "train"}, values)
        shown = {name: value for name, value in values.items() if name not in ("data_s", "step_s", "images_per_s")}
        self._show(Text(f"{self._status(step)}  {_numbers(shown)}"))

    def evaluation(
        self,
        step: int,
        weights: str,
        metrics: Mapping[str, float],
        *,
        split: str = "val",
        images: Mapping[str, np.ndarray | Path] | None = None,
    ) -> None:
        """One record `{"step", "split", "weights": "ema" | "model", …metrics}` and a line; nothing without metrics.

        images: pictures for TensorBoard by name, (H, W, 3) uint8 RGB or a file.
        """
        if not self._writes or not metrics:
            return
        self._record({"step": step, "split": split, "weights": weights}, metrics)
        whole = {name: value for name, value in metrics.items() if "-" not in name.split("/", 2)[-1]}
        self._show(Text(f"step {step}  {split} ({weights})  {_numbers(whole)}"))
        for name, image in (images or {}).items():
            pixels = image if isinstance(image, np.ndarray) else np.asarray(Image.open(image).convert("RGB"))
            self._tb.add_image(f"{name}/{weights}", pixels, step, dataformats="HWC")
        self._tb.flush()

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Text for TensorBoard alone, such as the freeze report."""
        if self._writes:
            self._tb.add_text(tag, markdown, step)

    def close(self) -> None:
        if not self._writes:
            return
        self._stop_live()
        self._tb.close()
        self._metrics.close()
        self._text.close()

    def _show(self, content: RenderableType) -> None:
        if self._writes:
            self._console.print(content, highlight=False, soft_wrap=isinstance(content, Text))
            self._plain.print(content, highlight=False, soft_wrap=isinstance(content, Text))
            self._text.flush()

    def _record(self, head: dict[str, Any], values: Mapping[str, float]) -> None:
        line = head | {name: _finite(value) for name, value in values.items()}
        self._metrics.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._metrics.flush()
        prefix = "/".join(str(v) for name, v in head.items() if name != "step")
        for name, value in values.items():
            self._tb.add_scalar(f"{prefix}/{name}", value, head["step"])

    def _status(self, step: int) -> str:
        if not self._total:
            return f"step {step}"
        return f"step {step}/{self._total}  eta {self._speed.eta(self._total - step)}  {self._speed}  {_memory()}"

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class _Speed:
    """Means over about the last 20 steps."""

    def __init__(self) -> None:
        self._images = self._step_s = self._data_s = self._weight = 0.0

    def add(self, images: int, step_s: float, data_s: float) -> None:
        keep = 0.95 if self._weight else 0.0
        self._images = keep * self._images + images
        self._step_s = keep * self._step_s + step_s
        self._data_s = keep * self._data_s + data_s
        self._weight = keep * self._weight + 1

    def eta(self, steps: int) -> str:
        return str(timedelta(seconds=round(steps * self._step_s / self._weight)))

    def __str__(self) -> str:
        step_s = max(self._step_s, 1e-9)
        return f"{self._images / step_s:.1f} images/s  waiting for data {self._data_s / step_s:.0%}"


def drop_later_steps(path: Path, step: int) -> None:
    """Rewrite a metrics.jsonl atomically without the lines after `step`, nor a last line that a kill cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            whole = line.endswith("\n") and json.loads(line)["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError):
            whole = False
        kept += [line] * whole
    write_atomically(path, lambda file: file.write("".join(kept).encode()))


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluation records of a metrics.jsonl; none if there is no such file."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["split"] != "train"]


def summary_table(metrics: Mapping[str, float], *, title: str = "") -> list[Table]:
    """Two tables: the metrics of each branch (`<head>/<kind>/<metric>`) side by side, and those of each class."""
    whole: dict[str, dict[str, float]] = {}
    classes: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        head, kind, metric = name.split("/", 2)
        measure, dash, of_class = metric.partition("-")
        if dash:
            classes.setdefault(f"{head} · {of_class}", {})[f"{kind}/{measure}"] = value
        else:
            whole.setdefault(f"{head}/{kind}", {})[metric] = value
    tables = ((whole, "metrics", "branch"), (classes, "by class", "class"))
    return [_rows(rows, title=f"{title} {what}".strip(), first=first) for rows, what, first in tables if rows]


def print_summary(metrics: Mapping[str, float], *, output_dir: Path | None = None) -> None:
    """The summary tables on the terminal of the first process, and where the files are."""
    if os.environ.get("RANK", "0") != "0":
        return
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for table in summary_table(metrics):
        console.print(table)
    if output_dir is not None:
        console.print(f"files: {output_dir}", highlight=False, markup=False, soft_wrap=True)


def _rows(rows: dict[str, dict[str, float]], *, title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in columns:
        table.add_column(name, justify="right")
    for label, row in rows.items():
        table.add_row(Text(label), *(f"{row[name]:.1f}" if name in row else "" for name in columns))
    return table


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _memory() -> str:
    """The most that was in use: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
