"""What a person sees, and what is kept of it: terminal, log.txt, and the writers of `log.to`."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from detbb.core.console import console
from detbb.core.files import writing
from detbb.report.writers import Writer, find_writers

_SHORT = {"box_reg": "box", "centerness": "ctr", "rpn_cls": "rpn", "rpn_loc": "rpn-box", "keypoint": "kpt"}


class RunLog:
    """The terminal, `log.txt` and the writers of a run; on ranks other than 0 every call does nothing.

    writers: names as `log.to` has them. resume_step: the step of the checkpoint that the run goes on from; what later
    steps wrote is dropped, so no step is there twice. None for a fresh run. epoch_steps: steps that an epoch takes; 0:
    lines do not name the epoch.
    """

    def __init__(
        self,
        output_dir: Path,
        writers: Sequence[str] = ("metrics", "tensorboard"),
        *,
        resume_step: int | None = None,
        epoch_steps: float = 0,
        rank: int = 0,
    ) -> None:
        """Raises: UserError: a writer is not known, or the folder cannot be written."""
        self._began = time.monotonic()
        self._folder = output_dir
        self._writers: list[Writer] = []
        self._text: TextIO | None = None
        if rank == 0:
            with writing(output_dir):
                output_dir.mkdir(parents=True, exist_ok=True)
                self._text = (output_dir / "log.txt").open("a", encoding="utf-8")
                self._writers = [writer(output_dir, resume_step=resume_step) for writer in find_writers(writers)]
        self._console, self._plain = console(), console(self._text)
        self._live: Live | None = None
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=20)  # images, step_s and data_s of the last steps
        self._steps, self._epoch_steps = 0, epoch_steps

    @property
    def elapsed(self) -> str:
        """Since the log was opened, as hours:minutes:seconds."""
        return str(timedelta(seconds=round(time.monotonic() - self._began)))

    def info(self, *contents: RenderableType) -> None:
        """Lines on the terminal, and in log.txt with the time before each; or tables, without the time."""
        if self._text is None:
            return
        for content in contents:
            shown = Text(content) if isinstance(content, str) else content  # not markup: names may hold brackets
            line = isinstance(shown, Text)
            self._console.print(shown, highlight=False, soft_wrap=line)
            with writing(self._folder / "log.txt"):
                if line:
                    self._plain.print(f"{datetime.now():%Y-%m-%d %H:%M:%S}  ", end="", highlight=False)
                self._plain.print(shown, highlight=False, soft_wrap=line)
                self._text.flush()

    def progress(
        self, step: int, total: int, *, losses: Mapping[str, float], images: int, step_s: float, data_s: float
    ) -> None:
        """Renew the live line; call at every step.

        images: of this step over all ranks. step_s: the whole step, of which data_s was spent waiting for data.
        """
        self._recent.append((images, step_s, data_s))
        self._steps = total
        if self._text is not None and self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            line = f"{self._status(step)}  {_losses(losses)}"
            self._live.update(Text(line, style="cyan", no_wrap=True, overflow="ellipsis"))

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """One training record: `{"step", "split": "train", …values}`; also a line of text."""
        with writing(self._folder):
            for writer in self._writers:
                writer.scalars(step, values, split="train", weights=None)
        self.info(f"{self._status(step)}  {_losses(values)}")

    def evaluation(
        self, step: int, weights: str, metrics: Mapping[str, float], *, images: Mapping[str, Path] | None = None
    ) -> None:
        """One record `{"step", "split": "val", "weights": "ema" | "model", …metrics}` and a line; none without metrics.

        images: files of pictures for the writers, by name.
        """
        if self._text is None or not metrics:
            return
        with writing(self._folder):
            for name, image in (images or {}).items():
                pixels = np.asarray(Image.open(image).convert("RGB"))
                for writer in self._writers:
                    writer.image(f"val/{weights}/{name}", pixels, step)
            for writer in self._writers:
                writer.scalars(step, metrics, split="val", weights=weights)
        kinds: dict[str, str] = {}  # `<head>/<kind>` -> its metrics over all classes
        for name, value in metrics.items():
            *parts, metric = name.split("/", 2)
            if "-" not in metric:
                kind = "/".join(parts)
                kinds[kind] = f"{kinds.get(kind, kind)} {metric} {value:.4g}"
        self.info(f"step {step}  val ({weights})  {'  '.join(kinds.values())}")

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Text for the writers alone, such as the freeze report."""
        with writing(self._folder):
            for writer in self._writers:
                writer.text(tag, markdown, step)

    def sync(self) -> None:
        """Make everything logged so far durable; call it before a checkpoint that relies on it is saved."""
        with writing(self._folder):
            for writer in self._writers:
                writer.sync()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        with writing(self._folder), ExitStack() as stack:  # all of them, whichever fails
            if self._text is not None:
                stack.callback(self._text.close)
            for writer in self._writers:
                stack.callback(writer.close)

    def _status(self, step: int) -> str:
        if not self._steps:
            return f"step {step}"
        epoch = ""
        if self._epoch_steps:
            now, last = (math.ceil(n / self._epoch_steps - 1e-9) for n in (step, self._steps))
            epoch = f"epoch {now}/{last}  "
        images, step_s, data_s = map(sum, zip(*self._recent, strict=True))
        eta = timedelta(seconds=round((self._steps - step) * step_s / len(self._recent)))
        speed = f"{images / step_s:.1f} images/s  data wait {data_s / step_s:.0%}"
        return f"{epoch}step {step}/{self._steps}  eta {eta}  {speed}  {_memory()}"


def _losses(values: Mapping[str, float]) -> str:
    """`loss 1.20 (cls 0.26 box 0.33 ctr 0.61)  grad 3.1  lr 0.001`."""
    heads: dict[str, list[str]] = {}
    for name, value in values.items():
        head, slash, loss = name.partition("/")
        if slash:
            loss = loss.removeprefix("loss_")
            heads.setdefault(head, []).append(f"{_SHORT.get(loss, loss)} {value:.2f}")
    groups = [" ".join([*([f"{head}:"] if len(heads) > 1 else []), *parts]) for head, parts in heads.items()]
    shown = [f"loss {values['loss']:.2f}"] if "loss" in values else []
    shown += [f"({', '.join(groups)})"] if groups else []
    shown += [f" {s} {values[n]:.3g}" for n, s in (("grad_norm", "grad"), ("lr", "lr")) if n in values]
    return " ".join(shown)


def _memory() -> str:
    """The most that was in use: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return f"GPU mem {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"mem {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
