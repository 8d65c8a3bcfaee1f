"""A writer of one's own: the metrics of each evaluation as rows of `metrics.csv`, for a spreadsheet."""

import csv
from collections.abc import Mapping
from pathlib import Path

from detbb import Writer


class CsvWriter(Writer):
    """One row a metric: step, split, weights, name, value; an evaluation that comes again replaces its rows."""

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        self.path = folder / "metrics.csv"
        self.rows: dict[tuple[str, ...], str] = {}
        if resume_step is not None and self.path.exists():
            with self.path.open(newline="") as file:
                rows = {tuple(key): value for *key, value in csv.reader(file)}
            self.rows = {key: value for key, value in rows.items() if int(key[0]) <= resume_step}

    def scalars(self, step: int, values: Mapping[str, float], *, split: str, weights: str | None) -> None:
        if split == "train":
            return
        self.rows |= {(str(step), split, str(weights), name): str(value) for name, value in values.items()}
        unfinished = self.path.with_suffix(".tmp")
        with unfinished.open("w", newline="") as file:
            csv.writer(file).writerows((*key, value) for key, value in self.rows.items())
        unfinished.replace(self.path)  # whole at any moment, whenever the run is killed
