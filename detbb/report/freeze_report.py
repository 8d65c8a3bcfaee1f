"""The freeze report: what is trained, what rests, and what does not fit together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from detbb.config.phases import Phase
from detbb.core.errors import UserError
from detbb.core.files import write_atomically
from detbb.core.schema import find_error
from detbb.detector import Detector
from detbb.freeze import frozen_names, parts, resolve, tensors_of
from detbb.modeling.norm import has_running_stats, norm_modules


@dataclass(frozen=True)
class Row:
    """One module of the report; numbers of parameters are elements, not tensors."""

    module: str
    trained: int
    total: int
    norm: str  # types, "-" without norms
    statistics: str  # moving | fixed | mixed | -
    affine: str  # trained | fixed | mixed | -
    lr: str
    weight_decay: str
    ema: str  # yes | no | mixed


def rows(detector: Detector, optimizer: torch.optim.Optimizer, *, lr: float, averaged: Sequence[str]) -> list[Row]:
    """A row for the stem, each stage, the neck and each head.

    lr: the base learning rate at this point; averaged: the names that the EMA holds.
    """
    groups = {name: group for group in optimizer.param_groups for name in group["names"]}
    held = set(averaged)
    found = []
    for part in parts(detector):
        if part == "backbone":
            continue
        modules = resolve(detector, part)
        named = [(f"{prefix}.{n}", p) for prefix, m in modules for n, p in m.named_parameters()]
        norms = [norm for _, m in modules for _, norm in norm_modules(m)]
        in_groups = [groups[n] for n, _ in named if n in groups]
        found.append(
            Row(
                part,
                sum(p.numel() for _, p in named if p.requires_grad),
                sum(p.numel() for _, p in named),
                "+".join(sorted({type(m).__name__ for m in norms})) or "-",
                _either([_moves(m) for m in norms if hasattr(m, "running_mean")], "moving", "fixed"),
                _either([_affine(m) for m in norms], "trained", "fixed"),
                _numbers({g["lr_mult"] * lr for g in in_groups}),
                _numbers({g["weight_decay"] for g in in_groups}),
                _either([n in held for n, _ in named], "yes", "no"),
            )
        )
    return found


def findings(detector: Detector, phase: Phase) -> list[str]:
    """What in the freeze list cannot be meant: names that add nothing."""
    lines = []
    tensors = {name: tensors_of(detector, name) for name in phase.freeze}
    for index, name in enumerate(phase.freeze):
        others = set().union(*(tensors[n] for i, n in enumerate(phase.freeze) if i != index and n != name))
        if not tensors[name]:
            lines.append(f"freeze {name}: holds no parameter and no buffer, so freezing it does nothing")
        elif tensors[name] <= others or name in phase.freeze[:index]:
            lines.append(f"freeze {name}: matches nothing new, the other names cover it")
    frozen = set(frozen_names(detector))
    rest = [f"heads.{name}" for name in detector.heads if tensors_of(detector, f"heads.{name}") <= frozen]
    moving = [part for part in ("backbone", "neck") if not tensors_of(detector, part) <= frozen]
    if rest and moving:
        lines.append(
            f"{', '.join(rest)}: frozen while {' and '.join(moving)} is trained, so its predictions may change"
        )
    return lines


def table(phase: Phase, report: Sequence[Row]) -> Table:
    made = Table(
        title=f"phase {phase.index}: steps {phase.start} to {phase.end}, frozen: {_names(phase)}", title_justify="left"
    )
    for title in ("module", "trained", "total", "norm", "statistics", "affine", "lr", "weight decay", "ema"):
        made.add_column(title, justify="right" if title in ("trained", "total") else "left")
    for row in report:
        made.add_row(*(f"{v:,}" if isinstance(v, int) else v for v in asdict(row).values()))
    return made


def markdown(phase: Phase, report: Sequence[Row], notes: Sequence[str]) -> str:
    """The table for TensorBoard's text tab."""
    titles = list(asdict(report[0])) if report else []
    lines = [f"phase {phase.index}: steps {phase.start} to {phase.end}, frozen: {_names(phase)}", ""]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(str(v) for v in asdict(row).values()) + " |" for row in report]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


_FORM = {"phase": int, "digests": {str: str}, "since": {str: int}, "verified": [int], "findings": [str]}


class FreezeJournal:
    """`freeze.json`: one entry a phase, with its report, its digests, the step (`since`) from which on a tensor had its
    digest, and the steps at which the digests were verified.
    """

    def __init__(self, path: Path, *, resumed: bool) -> None:
        """Raises: UserError: the journal of the run that is resumed cannot be read."""
        self._path = path
        self._entries: list[dict[str, Any]] = []
        if resumed and path.exists():
            try:
                self._entries = json.loads(path.read_bytes())["phases"]
                wrong = find_error([{k: entry[k] for k in _FORM} for entry in self._entries], [_FORM])
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                raise UserError(f"{path}: not a freeze journal ({wrong}); move it away to go on without its proof")

    def begin(
        self, phase: Phase, report: Sequence[Row], notes: Sequence[str], *, digests: dict[str, str], step: int
    ) -> None:
        """Enter a phase at `step`; one that was begun before an interruption keeps what was verified."""
        for entry in self._entries:  # of a run that had gone further than where this one goes on
            entry["verified"] = [s for s in entry["verified"] if s <= step]
        before = [e for e in self._entries if e["phase"] <= phase.index and step in e["verified"]][-1:]
        known = {n: entry["since"][n] for entry in before for n in digests if entry["digests"].get(n) == digests[n]}
        verified = [e["verified"] for e in self._entries if e["phase"] == phase.index]
        self._entries = [e for e in self._entries if e["phase"] < phase.index]
        self._entries.append(
            {
                "phase": phase.index,
                "start": phase.start,
                "end": phase.end,
                "freeze": list(phase.freeze),
                "modules": [asdict(row) for row in report],
                "findings": list(notes),
                "digests": digests,
                "since": {name: known.get(name, step) for name in digests},
                "verified": verified[0] if verified else [],
            }
        )
        self._write()

    def verified(self, step: int) -> None:
        steps = self._entries[-1]["verified"]
        steps[:] = [*(s for s in steps if s < step), step]
        self._write()

    def add_finding(self, note: str) -> None:
        self._entries[-1]["findings"].append(note)
        self._write()

    def unchanged(self, detector: Detector) -> list[str]:
        """A line on the tensors that have one and the same digest since the start, and since each later step."""
        since: dict[str, int] = self._entries[-1]["since"] if self._entries else {}
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
        text = json.dumps({"phases": self._entries}, indent=1, ensure_ascii=False)
        write_atomically(self._path, lambda file: file.write(text.encode()))


def _moves(norm: torch.nn.Module) -> bool:
    return norm.training and has_running_stats(norm)


def _affine(norm: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in norm.parameters())


def _either(values: Sequence[bool], yes: str, no: str) -> str:
    if not values:
        return "-"
    return yes if all(values) else "mixed" if any(values) else no


def _numbers(values: set[float]) -> str:
    return ", ".join(f"{v:g}" for v in sorted(values)) or "-"


def _names(phase: Phase) -> str:
    return ", ".join(phase.freeze) or "nothing"
