"""What a person sees, and what is kept of it: terminal, log.txt, and the writers of `log.to`."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from detbb.core.files import writing
from detbb.report.writers import find_writers


class RunLog:
    """The terminal, `log.txt` and the writers of a run; on ranks other than 0 every call does nothing.

    writers: names as `log.to` has them. resume_step: the step of the checkpoint that the run goes on from; what later
    steps wrote is dropped, so no step is there twice. None for a fresh run.
    """

    def __init__(
        self,
        output_dir: Path,
        writers: Sequence[str] = ("metrics", "tensorboard"),
        *,
        resume_step: int | None = None,
        rank: int = 0,
    ) -> None:
        """Raises: UserError: a writer is not known, or the folder cannot be written."""
        self._writes = rank == 0
        if not self._writes:
            return
        self._folder = output_dir
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            self._text = (output_dir / "log.txt").open("a", encoding="utf-8")
            self._writers = [writer(output_dir, resume_step=resume_step) for writer in find_writers(writers)]
        self._console = Console() if sys.stdout.isatty() else Console(width=140)
        self._plain = Console(file=self._text, width=140, no_color=True, force_terminal=False)
        self._live: Live | None = None
        self._speed = _Speed()
        self._total = 0

    def info(self, text: str) -> None:
        """A line (or a few) on the terminal and in log.txt."""
        self._show(Text(text))

    def table(self, table: RenderableType) -> None:
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
            for writer in self._writers:
                writer.scalars(step, values, split="train", weights=None)
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

        images: pictures for the writers by name, (H, W, 3) uint8 RGB or a file.
        """
        if not self._writes or not metrics:
            return
        with writing(self._folder):
            for name, image in (images or {}).items():
                pixels = image if isinstance(image, np.ndarray) else np.asarray(Image.open(image).convert("RGB"))
                for writer in self._writers:
                    writer.image(f"{split}/{weights}/{name}", pixels, step)
            for writer in self._writers:
                writer.scalars(step, metrics, split=split, weights=weights)
        whole = {name: value for name, value in metrics.items() if "-" not in name.split("/", 2)[-1]}
        self._show(Text(f"step {step}  {split} ({weights})  {_numbers(whole)}"))

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Text for the writers alone, such as the freeze report."""
        if self._writes:
            with writing(self._folder):
                for writer in self._writers:
                    writer.text(tag, markdown, step)

    def sync(self) -> None:
        """Make everything logged so far durable; call it before a checkpoint that relies on it is saved."""
        if self._writes:
            with writing(self._folder):
                for writer in self._writers:
                    writer.sync()

    def close(self) -> None:
        if not self._writes:
            return
        self._stop_live()
        with writing(self._folder), ExitStack() as stack:  # all of them, whichever fails
            stack.callback(self._text.close)
            for writer in self._writers:
                stack.callback(writer.close)

    def _show(self, content: RenderableType) -> None:
        if self._writes:
            self._console.print(content, highlight=False, soft_wrap=isinstance(content, Text))
            with writing(self._folder / "log.txt"):
                self._plain.print(content, highlight=False, soft_wrap=isinstance(content, Text))
                self._text.flush()

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


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _memory() -> str:
    """The most that was in use: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
