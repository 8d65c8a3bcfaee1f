"""Metrics as tables that fit where they are shown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from detbb.core.console import show
from detbb.core.errors import printable

MANY = 100  # classes; of more, only the best and worst are shown
_SHOWN = 10  # of each

Rows = Mapping[str, Mapping[str, float]]  # label -> {column: number}


@dataclass(frozen=True)
class NumberTable:
    """Numbers by row and column; rows go on beside each other where the console is wide enough."""

    title: str
    first: str
    rows: Rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Table]:
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        width = max(map(len, (self.first, *self.rows))) + 3 + sum(max(len(name), 5) + 3 for name in columns)
        beside = max(1, min(options.max_width // width, len(self.rows) // 5))
        height = -(-len(self.rows) // beside)
        made = Table(title=self.title, title_justify="left")
        for _ in range(beside):
            made.add_column(self.first)
            for name in columns:
                made.add_column(name, justify="right")
        cells: list[list[RenderableType]] = [
            [Text(label), *(f"{row[name]:.1f}" if name in row else "" for name in columns)]
            for label, row in self.rows.items()
        ]
        for line in range(height):
            made.add_row(*(cell for row in cells[line::height] for cell in row))
        yield made


def summary_table(metrics: Mapping[str, float], *, title: str = "") -> list[NumberTable]:
    """The metrics of each branch (`<head>/<metric>` or `<head>/<kind>/<metric>`), and those of each class."""
    whole: dict[str, dict[str, float]] = {}
    classes: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        head, *kind, metric = name.split("/", 2)
        measure, dash, of_class = metric.partition("-")
        if dash:
            classes.setdefault(f"{head} · {printable(of_class)}", {})["/".join([*kind, measure])] = value
        else:
            whole.setdefault("/".join([head, *kind]), {})[metric] = value
    tables = [("metrics", "branch", whole)]
    if len(classes) > MANY:
        ranked = sorted(classes, key=lambda label: -next(iter(classes[label].values())))
        for what, labels in (("best", ranked[:_SHOWN]), ("worst", ranked[-_SHOWN:])):
            rows = {label: classes[label] for label in labels}
            tables.append((f"by class, the {_SHOWN} {what} of {len(classes)} (all: metrics.json)", "class", rows))
    else:
        tables.append(("by class", "class", classes))
    return [NumberTable(f"{title} {what}".strip(), first, rows) for what, first, rows in tables if rows]


def print_summary(metrics: Mapping[str, float], *, output_dir: Path | None = None) -> None:
    """The summary tables on the terminal of the first process, and where the files are."""
    if os.environ.get("RANK", "0") != "0":
        return
    show(*summary_table(metrics), *([] if output_dir is None else [f"files: {output_dir}"]))
