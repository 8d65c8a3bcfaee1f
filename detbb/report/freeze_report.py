"""The freeze report: what is trained, what is frozen, and what does not fit together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table

from detbb.config.phases import Phase
from detbb.core.errors import UserError
from detbb.core.files import write_atomically
from detbb.detector import Detector
from detbb.freeze import frozen_names, parts, resolve, tensors_of
from detbb.modeling.norm import has_running_stats, norm_modules

# One number for all parameters of a module, or each that occurs; None where nothing is trained.
Numbers = float | list[float] | None


@dataclass(frozen=True)
class Row:
    """One module of the report; numbers of parameters are elements, not tensors."""

    module: str
    trained: int
    total: int
    norm: str  # types, "-" without norms
    statistics: str  # moving | fixed | mixed | -
    affine: str  # trained | fixed | mixed | -
    lr: Numbers  # after warm-up
    weight_decay: Numbers
    ema: str  # yes | no | mixed


def rows(detector: Detector, optimizer: torch.optim.Optimizer, *, lr: float, averaged: Sequence[str]) -> list[Row]:
    """A row for the stem, each stage, the neck and each head.

    lr: the base learning rate at the start of the phase, as if warm-up were over; averaged: the names that the EMA
    holds.
    """
    groups = {name: group for group in optimizer.param_groups for name in group["names"]}
    found = []
    for part in parts(detector):
        if part == "backbone":
            continue
        modules = resolve(detector, part)
        named = [(f"{prefix}.{n}", p) for prefix, m in modules for n, p in m.named_parameters()]
        norms = [norm for _, m in modules for _, norm in norm_modules(m)]
        in_groups = [groups[n] for n, _ in named if n in groups]
        moving = [norm.training and has_running_stats(norm) for norm in norms if hasattr(norm, "running_mean")]
        affine = [any(p.requires_grad for p in norm.parameters()) for norm in norms]
        found.append(
            Row(
                part,
                trained=sum(p.numel() for _, p in named if p.requires_grad),
                total=sum(p.numel() for _, p in named),
                norm="+".join(sorted({type(m).__name__ for m in norms})) or "-",
                statistics=_either(moving, "moving", "fixed"),
                affine=_either(affine, "trained", "fixed"),
                lr=_numbers(g["lr_mult"] * lr for g in in_groups),
                weight_decay=_numbers(g["weight_decay"] for g in in_groups),
                ema=_either([n in averaged for n, _ in named], "yes", "no"),
            )
        )
    return found


def findings(detector: Detector, phase: Phase) -> list[str]:
    """Warnings about the freeze list: names that add nothing, and frozen heads on features that still change."""
    lines = []
    tensors = {name: tensors_of(detector, name) for name in phase.freeze}
    for index, name in enumerate(phase.freeze):
        others = set().union(*(tensors[n] for i, n in enumerate(phase.freeze) if i != index and n != name))
        if not tensors[name]:
            lines.append(f"freeze {name}: holds no parameter and no buffer, so freezing it does nothing")
        elif tensors[name] <= others or name in phase.freeze[:index]:
            lines.append(f"freeze {name}: matches nothing new, the other names cover it")
    frozen = set(frozen_names(detector))
    heads = [f"heads.{name}" for name in detector.heads if tensors_of(detector, f"heads.{name}") <= frozen]
    trained = [part for part in ("backbone", "neck") if not tensors_of(detector, part) <= frozen]
    if heads and trained:
        lines.append(
            f"{', '.join(heads)}: frozen while {' and '.join(trained)} is trained, so its predictions may change"
        )
    return lines


@dataclass(frozen=True)
class PhaseTable:
    """The report as a table that fits its console: below 110 columns without weight decay and average."""

    phase: Phase
    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Table]:
        left_out = () if options.max_width >= 110 else ("weight_decay", "ema")
        names = [field.name for field in fields(Row) if field.name not in left_out]
        made = Table(title=_title(self.phase), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in names:
            title = "of" if name == "total" else name.replace("_", " ")
            is_number = name in ("trained", "total")
            made.add_column(title, justify="right" if is_number else "left", no_wrap=is_number or name == "module")
        for row in self.rows:
            made.add_row(*(_text(getattr(row, name)) for name in names))
        yield made


def markdown(phase: Phase, report: Sequence[Row], notes: Sequence[str]) -> str:
    """The table for the writers."""
    names = [field.name for field in fields(Row)]
    lines = [_title(phase), "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_text(getattr(row, name)) for name in names) + " |" for row in report]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


class Entry(BaseModel, strict=True):
    """One phase in `freeze.json`."""

    phase: int
    start: int  # step, inclusive
    end: int  # step, exclusive
    freeze: list[str]
    modules: list[dict[str, Any]]  # the rows
    findings: list[str]
    digests: dict[str, str]  # SHA-256 of every frozen tensor
    since: dict[str, int]  # the step from which on a tensor had its digest
    verified: list[int]  # the steps at which all digests were compared


class _File(BaseModel, strict=True):
    phases: list[Entry]


class FreezeJournal:
    """`freeze.json`: one entry a phase."""

    def __init__(self, path: Path, *, resumed: bool) -> None:
        """Raises: UserError: the journal of the run that is resumed cannot be read."""
        self._path = path
        self._phases: list[Entry] = []
        if resumed and path.exists():
            try:
                self._phases = _File.model_validate_json(path.read_bytes()).phases
            except ValidationError as error:
                first = error.errors()[0]
                wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
                raise UserError(
                    f"{path}: not a freeze journal ({wrong}); move it away to go on without its proof"
                ) from error

    def begin(
        self, phase: Phase, report: Sequence[Row], notes: Sequence[str], *, digests: dict[str, str], step: int
    ) -> None:
        """Add the entry of a phase that begins or goes on at `step`; one that goes on keeps what was verified."""
        for entry in self._phases:  # an interrupted run may have verified later steps, which come again
            entry.verified = [s for s in entry.verified if s <= step]
        before = [entry for entry in self._phases if entry.phase <= phase.index and step in entry.verified][-1:]
        known = {n: entry.since[n] for entry in before for n in digests if entry.digests.get(n) == digests[n]}
        verified = [entry.verified for entry in self._phases if entry.phase == phase.index]
        self._phases = [entry for entry in self._phases if entry.phase < phase.index]
        self._phases.append(
            Entry(
                phase=phase.index,
                start=phase.start,
                end=phase.end,
                freeze=list(phase.freeze),
                modules=[asdict(row) for row in report],
                findings=list(notes),
                digests=digests,
                since={name: known.get(name, step) for name in digests},
                verified=verified[0] if verified else [],
            )
        )
        self._write()

    def verified(self, step: int) -> None:
        entry = self._phases[-1]
        entry.verified = [*(s for s in entry.verified if s < step), step]
        self._write()

    def add_finding(self, note: str) -> None:
        self._phases[-1].findings.append(note)
        self._write()

    def unchanged(self, detector: Detector) -> list[str]:
        """A line for each step since which tensors have kept their digest: how many of which modules."""
        since: dict[str, int] = self._phases[-1].since if self._phases else {}
        tensors = {p: tensors_of(detector, p) for p in parts(detector) if not p.startswith("backbone.")}
        lines = []
        for step in sorted(set(since.values())):
            same, begin = {n for n, first in since.items() if first == step}, f"step {step}" if step else "the start"
            found = [
                f"{part} ({'all' if names <= same else f'{len(names & same)} of'} {len(names)} tensors)"
                for part, names in tensors.items()
                if names & same
            ]
            lines.append(f"unchanged to the bit since {begin} (SHA-256, freeze.json): {', '.join(found)}")
            whole = [part for part, names in tensors.items() if names <= same]
            heads = [part.removeprefix("heads.") for part in whole if part.startswith("heads.")]
            if heads and all(part in whole for part in tensors if not part.startswith("heads.")):
                lines[-1] += f"; so what it was at {begin}, in every prediction: {', '.join(heads)}"
        return lines

    def _write(self) -> None:
        content = _File(phases=self._phases).model_dump_json(indent=1).encode()
        write_atomically(self._path, lambda file: file.write(content))


def _either(values: Sequence[bool], yes: str, no: str) -> str:
    if not values:
        return "-"
    return yes if all(values) else "mixed" if any(values) else no


def _numbers(values: Iterable[float]) -> Numbers:
    different = sorted(set(values))
    return different if len(different) > 1 else different[0] if different else None


def _text(value: str | int | Numbers) -> str:
    """As a table shows it; names of norms are shortened."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, str):
        return value.replace("BatchNorm2d", "BN").replace("BatchNorm", "BN").replace("GroupNorm", "GN")
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else f"{value:,}"


def _title(phase: Phase) -> str:
    return f"phase {phase.index}: steps {phase.start} to {phase.end}, frozen: {', '.join(phase.freeze) or 'nothing'}"
