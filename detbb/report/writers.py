"""Where the numbers, pictures and texts of a run go: `WRITERS` names what comes with detbb, and is open to others."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detbb.core.doors import lookup, subclass_of
from detbb.core.errors import UserError
from detbb.core.files import write_atomically


class Writer:
    """One place that a run writes to, on rank 0 alone; a method that a subclass leaves out does nothing.

        class Mine(detbb.Writer): ...  # then, in a configuration, `log: {to: [metrics, my_package.writers:Mine]}`

    folder: the run folder, which holds `config.yaml` already. resume_step: None for a fresh run, else the step of the
    checkpoint that the run goes on from: what a writer holds of later steps is to be dropped, as they come again.
    """

    def __init__(self, folder: Path, *, resume_step: int | None) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float], *, split: str, weights: str | None) -> None:
        """Numbers of one step by name, such as `objects/loss_cls` or `objects/bbox/AP`.

        split: `train`, or that of an evaluation; weights: `ema` or `model` as evaluated, None for `train`.
        """

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """A picture, (H, W, 3) uint8 RGB. It comes before the scalars of its evaluation."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text, such as the freeze report of the phase that begins at `step`."""

    def sync(self) -> None:
        """Make all that was written durable: a checkpoint that relies on it is about to be saved."""

    def close(self) -> None:
        """The run has ended; nothing comes after this."""


class MetricsFile(Writer):
    """`metrics.jsonl`: one object a line. A resumed run reads from it what was evaluated."""

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        path = folder / "metrics.jsonl"
        if resume_step is not None and path.exists():
            kept = b"".join(line for line, record in _whole_lines(path) if record["step"] <= resume_step)
            write_atomically(path, lambda file: file.write(kept))
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float], *, split: str, weights: str | None) -> None:
        head = {"step": step, "split": split} | ({} if weights is None else {"weights": weights})
        numbers = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        self._file.write(json.dumps(head | numbers, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard(Writer):
    """Event files in `tb/`."""

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tb"
        if resume_step is not None:
            self._drop_what_comes_again(resume_step, read_evaluations(folder / "metrics.jsonl"))
        self._board = SummaryWriter(str(self._folder))

    def scalars(self, step: int, values: Mapping[str, float], *, split: str, weights: str | None) -> None:
        for name, value in values.items():
            self._board.add_scalar("/".join([split, *([weights] if weights else []), name]), value, step)
        if split != "train":
            self._board.flush()

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._board.add_image(tag, pixels, step, dataformats="HWC")

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._board.add_text(tag, markdown, step)

    def sync(self) -> None:
        self._board.flush()
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        self._board.close()

    def _drop_what_comes_again(self, resume_step: int, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Rewrite the event files without it, and without a last record that a kill cut short.

        `SummaryWriter(purge_step=…)` cannot do this: an evaluation or a text of `resume_step` itself may come again
        while that step's training record does not, and TensorBoard's readers then show both.
        """
        evaluated = {(record["step"], record["split"], record.get("weights")) for record in evaluations}

        def keep(tag: str, step: int) -> bool:
            split, weights, *_ = [*tag.split("/"), ""]
            if tag.endswith("/text_summary"):
                return step < resume_step  # a phase that begins here is begun again
            return step <= resume_step and (split == "train" or (step, split, weights) in evaluated)

        for path in sorted(self._folder.glob("events.out.tfevents.*")):
            data = path.read_bytes()
            kept = b"".join(
                record for record, event in _records(data) if all(keep(v.tag, event.step) for v in event.summary.value)
            )
            if kept != data:
                write_atomically(path, lambda file, kept=kept: file.write(kept))  # type: ignore[misc]


def _records(data: bytes) -> Iterator[tuple[bytes, Any]]:
    """Each whole record of an event file (length, its checksum, an Event, its checksum) and the Event.

    TensorBoard's own reader computes the checksum of every picture in Python: seconds for a long run.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    start = 0
    while start + 16 <= len(data):
        length, checksum = struct.unpack_from("<QI", data, start)
        end = start + 16 + length
        if end > len(data) or checksum != masked_crc32c(data[start : start + 8]):
            return
        try:
            event = Event.FromString(data[start + 12 : end - 4])
        except DecodeError:
            return
        yield data[start:end], event
        start = end


WRITERS: dict[str, type[Writer]] = {"metrics": MetricsFile, "tensorboard": TensorBoard}


def find_writers(names: Sequence[str]) -> list[type[Writer]]:
    """The classes that `log.to` names; metrics.jsonl is written last.

    So a record in it was already given to all other writers, and a resumed run repeats only the evaluations that it
    lacks. Raises: UserError: a name is not known, or twice,
    or metrics.jsonl is not among them.
    """
    if names.count("metrics") != 1 or len(set(names)) < len(names):
        raise UserError(f"log.to: must name 'metrics', which a resumed run reads, and nothing twice; it is {names}")
    check, what = subclass_of(Writer), "subclass of detbb.Writer"
    ordered = sorted(names, key=lambda name: name == "metrics")
    return [lookup(WRITERS, n, key="log.to", check=check, what=what) for n in ordered]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluation records of a metrics.jsonl; none if there is no such file."""
    return [record for _, record in _whole_lines(path) if record["split"] != "train"]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics.jsonl, each with its record; not one that a kill cut short."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        known = isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("split"), str)
        if known and line.endswith(b"\n"):
            yield line, record
