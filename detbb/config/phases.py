"""Which parts are frozen at which step: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from detbb.config.schema import Config, PhaseConfig
from detbb.core.errors import UserError


@dataclass(frozen=True)
class Phase:
    """Steps `start` (inclusive) to `end` (exclusive) with one set of frozen parts."""

    index: int
    start: int
    end: int
    freeze: tuple[str, ...]
    sources: tuple[str, ...] = ()  # the data that something learns from, once the detector has told


def plan_phases(config: Config, total_steps: int) -> list[Phase]:
    """The run's phases; they cover 0 … total_steps without gaps.

    Raises: UserError: the phases are longer than the run, or shorter with no open last one.
    """
    inherited = tuple(f"heads.{name}" for name in config.inherited_heads)
    phases: list[Phase] = []
    start = 0
    for index, entry in enumerate(config.phases or [PhaseConfig(freeze=config.freeze)]):
        end = total_steps if entry.steps is None else start + entry.steps
        phases.append(Phase(index, start, end, (*entry.freeze, *inherited)))
        start = end
    if start != total_steps or any(p.start >= p.end for p in phases):
        raise UserError(
            f"phases: the phases end at steps {[p.end for p in phases]}, the run at {total_steps}; "
            "each phase must be at least one step long, and the last must end with the run (or leave out `steps`)"
        )
    return phases


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase that trains step number `step` (counted from 0)."""
    return next(p for p in phases if p.start <= step < p.end)
