"""What a data format is: a function from one split's files to `Annotations`, and what these hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detbb.config.schema import DataConfig
from detbb.data.formats.faults import Faults, Rows, choose_classes, validate_objects
from detbb.structures.annotations import Annotations, PackedStrings

Gives = Literal["boxes", "masks", "keypoints", "labels", "semantic"]


@dataclass(frozen=True)
class Request:
    """One split to read. Faults are given to `faults`, which repairs, refuses or leaves out as the user wants."""

    images: Path  # the folder of images, which is there
    annotations: Path  # what `data.<name>.<split>.annotations` says
    split: str
    source: DataConfig
    faults: Faults
    classes: tuple[str, ...] | None = None  # to use, in the order of the labels; None: all that are found
    exact: bool = False  # objects of other classes are refused, not left out
    may_write: bool = True  # whether what is generated may be

    @property
    def may_lack(self) -> bool:
        """Whether some of `classes` may be missing: in `train`, each class that the user names has to be there."""
        return self.exact or self.split != "train"

    def choose_classes(self, found: Sequence[str]) -> tuple[str, ...]:
        """The classes to use, of those that the files hold: label -> name."""
        return choose_classes(found, self.classes, self.faults, exact=self.exact, may_lack=self.may_lack)


@dataclass(frozen=True)
class Format:
    """A value of `data.<name>.format`."""

    read: Callable[[Request], Annotations]
    gives: tuple[Gives, ...]
    classes_from: Literal["files", "config", "format"] = "files"
    """`files`: from the annotations, those of `val` as in `train`; `config`: `data.<name>.classes` has to name them,
    since the annotations hold numbers; `format`: always the same."""
    generated: bool = False
    """Made on first use: neither folders nor files have to be there."""


def annotations_of(
    root: Path,
    file_names: Sequence[str],
    sizes: np.ndarray,
    rows: Rows,
    faults: Faults,
    *,
    classes: Sequence[str],
    **fields: Any,
) -> Annotations:
    """The split of these images and objects, checked. Raises UserError for what is refused, if `faults` is strict.

    sizes: (N, 2) height, width. fields: others of `Annotations`; the ids of classes and images count from 1 by default.
    """
    fields = {"category_ids": np.arange(1, len(classes) + 1), "image_ids": np.arange(1, len(sizes) + 1)} | fields
    return Annotations(
        root=root,
        classes=tuple(classes),
        file_names=PackedStrings(file_names),
        sizes=sizes,
        **validate_objects(rows, sizes, faults),
        faults=faults.finish(),
        notes=tuple(faults.notes),
        **fields,
    )
