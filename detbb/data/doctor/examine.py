"""The dataset doctor: one pass over the data of a configuration that finds every fault at once.

Faults of annotations are the readers' findings; this adds what only the whole set and the files can tell. Training
starts with it, and `tools/check_data.py` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from detbb.config.schema import DataConfig
from detbb.core.errors import UserError
from detbb.data.doctor.image_files import examine_files
from detbb.data.formats import follows_train, read_split
from detbb.data.formats.faults import Faults
from detbb.structures.annotations import Annotations, Fault

FEW = 10  # objects of a class, below which it is said


@dataclass
class Split:
    """One split as examined. annotations: without what is refused, None if it cannot be read."""

    source: str  # data.<source>
    split: str
    origin: str  # its annotation file or folder
    annotations: Annotations | None
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)  # nothing to repair, good to know
    bad: set[int] = field(default_factory=set)  # indices of images that cannot be used, or are in both splits


@dataclass
class Report:
    """The splits by their place in the configuration (`data.<name>.train`)."""

    splits: dict[str, Split] = field(default_factory=dict)

    def annotations(self, split: str) -> dict[str, Annotations]:
        """By source, with all faults found in `faults`."""
        return {
            found.source: replace(found.annotations, faults=tuple(found.faults), notes=tuple(found.notes))
            for found in self.splits.values()
            if found.annotations is not None and found.split == split
        }

    def refused(self) -> list[str]:
        """A phrase for each class of fault that is refused."""
        return [f"{p} ({s.origin}): {f}" for p, s in self.splits.items() for f in s.faults if not f.repaired]

    def check(self) -> None:
        """Raise UserError with everything that is refused."""
        if refused := self.refused():
            raise UserError("; ".join(refused))

    def rows(self) -> list[tuple[str, str, Fault]]:
        """(place, `refused`, `repaired` or `noted`, fault), the worst first."""
        rows = [(p, "repaired" if f.repaired else "refused", f) for p, s in self.splits.items() for f in s.faults]
        rows += [(p, "noted", f) for p, s in self.splits.items() for f in s.notes]
        return sorted(rows, key=lambda row: ("refused", "repaired", "noted").index(row[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for scripts."""
        outcomes = [outcome for _, outcome, _ in self.rows()]
        splits = {}
        for place, split in self.splits.items():
            a = split.annotations
            splits[place] = {
                "origin": split.origin,
                "images": None if a is None else len(a),
                "objects": None if a is None else len(a.labels),
                "classes": None if a is None else list(a.classes),
                "faults": [{"outcome": o, **asdict(f)} for p, o, f in self.rows() if p == place],
            }
        return {"refused": outcomes.count("refused"), "repaired": outcomes.count("repaired"), "splits": splits}

    def table(self) -> Table:
        table = Table("where", "outcome", "count", "what", "the first", title="Dataset doctor", title_justify="left")
        for place, outcome, fault in self.rows():
            style = {"refused": "red", "repaired": "yellow", "noted": ""}[outcome]
            first = ", ".join(map(str, fault.first)) + ", …" * (fault.count > len(fault.first))
            cells = (place, outcome, f"{fault.count:,}", fault.kind.rstrip(": "), first)
            table.add_row(*(Text(cell) for cell in cells), style=style)
        return table


def examine(data: Mapping[str, DataConfig], *, files: bool = True, max_detections: int = 100) -> Report:
    """Every fault of the train and val splits of these sources.

    files: look at the image files, too. max_detections: how many of an image and class evaluation counts.
    """
    report = Report()
    for name, source in data.items():
        found: dict[str, Split] = {}
        for split, config in (("train", source.train), ("val", source.val)):
            place = f"data.{name}.{split}"
            train = found["train"].annotations if "train" in found else None
            origin = "" if config is None else str(config.annotations or config.images or source.format)
            try:
                classes = train.classes if train is not None and follows_train(source, split) else None
                annotations = read_split(source, split, name, classes=classes, strict=False)
            except UserError as error:
                told = "train" in found and str(error).startswith(f"data.{name}.train: ")
                reason = str(error).removeprefix(f"{place}: ")
                faults = [] if told else [Fault("cannot be read:", 1, (reason,), False)]
                found[split] = Split(name, split, origin, None, faults)
            else:
                if annotations is not None:
                    own = _of_set(annotations, split, source.augment, max_detections)
                    faults, notes = [*annotations.faults, *own.found], [*annotations.notes, *own.notes]
                    found[split] = Split(name, split, origin, annotations, faults, notes)
        if files:
            splits = {split: s.annotations for split, s in found.items() if s.annotations is not None}
            for split, findings in examine_files(source, splits).items():
                found[split].faults += findings.faults
                found[split].bad |= findings.bad
        report.splits |= {f"data.{name}.{split}": result for split, result in found.items()}
    return report


def _of_set(annotations: Annotations, split: str, augment: object, max_detections: int) -> Faults:
    """What only the whole split tells: its faults, and its notes."""
    faults = Faults("", strict=False)
    objects = annotations.has("boxes") and len(annotations.labels)
    why = [f"{fault.count} x {fault.kind.rstrip(':')}" for fault in (*annotations.faults, *annotations.notes)] or [""]
    if any(not fault.repaired for fault in annotations.faults):
        pass  # which may be all that an empty set is about
    elif not len(annotations):
        faults.refuse("empty set: no image that can be used", why)
    elif split == "train" and annotations.has("boxes") and not objects:
        faults.refuse("empty set: no object to learn from", why)
    names = annotations.keypoint_names
    mirrors = split == "train" and re.search("default|Flip|Transpose|D4|SquareSymmetry", str(augment))
    if mirrors and len(names) > 1 and not annotations.flip_pairs:
        faults.repair("keypoint name without left and right (in mirrored images they do not change places):", names)
    if split == "val" and annotations.has("boxes") and len(annotations) and not objects:
        faults.note("no object: there is nothing to measure", [""])
    ids = np.sort(annotations.category_ids)
    if len(ids) and not np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids))):
        faults.note("category ids with gaps (labels count from 0, results have these ids):", ids)
    if objects:
        labels = annotations.labels[~annotations.crowd]
        counts = np.bincount(labels, minlength=len(annotations.classes)).tolist()
        named = list(zip(annotations.classes, counts, strict=True))
        faults.note("class without any object:", [name for name, count in named if count == 0])
        few = [f"{name} ({count})" for name, count in named if 0 < count < FEW]
        faults.note(f"class of fewer than {FEW} objects:", few)
    faults.note("crowd (evaluation knows it, training leaves it out), ids", annotations.object_ids[annotations.crowd])
    if annotations.segments is not None:
        unmasked = annotations.object_ids[annotations.segments.empty() & ~annotations.crowd]
        faults.note("object without a mask (not trained for segm), annotation ids", unmasked)
    faults.note("file name beyond ASCII:", [name for name in annotations.file_names if not name.isascii()])
    if split == "val" and annotations.has("boxes"):
        _note_limit(annotations, max_detections, faults)
    return faults


def _note_limit(annotations: Annotations, limit: int, faults: Faults) -> None:
    """Say how high AP can become where images have more objects of a class than detections count."""
    owners = np.repeat(np.arange(len(annotations)), np.diff(annotations.first))[~annotations.crowd]
    counts = np.zeros((len(annotations), len(annotations.classes)), dtype=np.int64)
    np.add.at(counts, (owners, annotations.labels[~annotations.crowd]), 1)
    full = np.flatnonzero((counts > limit).any(axis=1))
    if not len(full):
        return
    totals = counts.sum(axis=0)
    recall = counts.clip(max=limit).sum(axis=0)[totals > 0] / totals[totals > 0]
    highest = 100 * np.mean((np.floor(recall * 100 + 1e-9) + 1) / 101)  # of COCO's 101 recalls, those that are reached
    faults.note(
        f"image with more than {limit} objects of a class, of which {limit} detections count: AP can reach "
        f"{highest:.1f}, recall {100 * recall.mean():.1f} (raise eval.max_detections, and the head's "
        "detections_per_image with it):",
        [annotations.file_names[index] for index in full[:10].tolist()] + [""] * (len(full) - 10),
    )
