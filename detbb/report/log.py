"""What a person sees, and what is kept of it: terminal, log.txt, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
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

from detbb.core.files import write_atomically, writing
from detbb.core.schema import find_error
from detbb.report.event_files import keep_events

_HEAD = {"step": int, "split": str}  # what every line of metrics.jsonl has


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

        self._folder = output_dir
        metrics = output_dir / "metrics.jsonl"
        if resume_step is not None:
            drop_later_steps(metrics, resume_step)
            keep_events(output_dir / "tb", _from_before(resume_step, read_evaluations(metrics)))
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            self._text = (output_dir / "log.txt").open("a", encoding="utf-8")
            self._metrics = metrics.open("a", encoding="utf-8")
            self._tb = SummaryWriter(str(output_dir / "tb"))
        self._console = Console() if sys.stdout.isatty() else Console(width=140)
        self._plain = Console(file=self._text, width=140, no_color=True, force_terminal=False)
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
        with writing(self._folder):
            self._scalars("train", step, values)
        self._line({"step": step, "split": "train"}, values)
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
        with writing(self._folder):
            self._scalars(f"{split}/{weights}", step, metrics)
            for name, image in (images or {}).items():
                pixels = image if isinstance(image, np.ndarray) else np.asarray(Image.open(image).convert("RGB"))
                self._tb.add_image(f"{split}/{weights}/{name}", pixels, step, dataformats="HWC")
            self._tb.flush()
        # The line comes last: a resumed run makes up for evaluations that have none, after dropping their events.
        self._line({"step": step, "split": split, "weights": weights}, metrics)
        whole = {name: value for name, value in metrics.items() if "-" not in name.split("/", 2)[-1]}
        self._show(Text(f"step {step}  {split} ({weights})  {_numbers(whole)}"))

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Text for TensorBoard alone, such as the freeze report."""
        if self._writes:
            with writing(self._folder):
                self._tb.add_text(tag, markdown, step)

    def sync(self) -> None:
        """Make everything logged so far durable; call it before a checkpoint that relies on it is saved."""
        if not self._writes:
            return
        with writing(self._folder):
            self._tb.flush()
            for path in (self._folder / "metrics.jsonl", *(self._folder / "tb").iterdir()):
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        if not self._writes:
            return
        self._stop_live()
        with writing(self._folder), closing(self._text), closing(self._metrics):
            self._tb.close()

    def _show(self, content: RenderableType) -> None:
        if self._writes:
            self._console.print(content, highlight=False, soft_wrap=isinstance(content, Text))
            with writing(self._folder / "log.txt"):
                self._plain.print(content, highlight=False, soft_wrap=isinstance(content, Text))
                self._text.flush()

    def _line(self, head: dict[str, Any], values: Mapping[str, float]) -> None:
        line = head | {name: _finite(value) for name, value in values.items()}
        with writing(self._folder / "metrics.jsonl"):
            self._metrics.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._metrics.flush()

    def _scalars(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tb.add_scalar(f"{prefix}/{name}", value, step)

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
    kept = [line for line, record in _lines(path) if record["step"] <= step]
    if path.exists():
        write_atomically(path, lambda file: file.write(b"".join(kept)))


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluation records of a metrics.jsonl; none if there is no such file."""
    return [record for _, record in _lines(path) if record["split"] != "train"]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a metrics.jsonl, each with its record."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith(b"\n") and not find_error(
            {k: record.get(k) for k in _HEAD} if isinstance(record, dict) else 0, _HEAD
        ):
            yield line, record


def _from_before(step: int, evaluations: list[dict[str, Any]]) -> Callable[[str, int], bool]:
    """Which TensorBoard records a run that goes on after `step` keeps: what it will not write again."""
    evaluated = {(record["step"], record["split"], record.get("weights")) for record in evaluations}

    def wanted(tag: str, at: int) -> bool:
        split, weights, *_ = [*tag.split("/"), ""]
        if split == "train":
            return at <= step
        return (at, split, weights) in evaluated or (tag.endswith("/text_summary") and at < step)

    return wanted


def summary_table(metrics: Mapping[str, float], *, title: str = "") -> list[Table]:
    """Two tables: the metrics of each branch (`<head>/<metric>` or `<head>/<kind>/<metric>`), and of each class."""
    whole: dict[str, dict[str, float]] = {}
    classes: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        head, *kind, metric = name.split("/", 2)
        measure, dash, of_class = metric.partition("-")
        if dash:
            classes.setdefault(f"{head} · {of_class}", {})["/".join([*kind, measure])] = value
        else:
            whole.setdefault("/".join([head, *kind]), {})[metric] = value
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
