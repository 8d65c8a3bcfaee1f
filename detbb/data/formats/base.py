"""What a data format is: a function from one split's files to `Annotations`, and what these hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detbb.config.schema import DataConfig
from detbb.core.errors import unknown_name
from detbb.data.formats.faults import Faults, Rows, validate_objects
from detbb.structures.annotations import Annotations, PackedStrings

Gives = Literal["boxes", "masks", "keypoints", "labels", "semantic"]


@dataclass
class Request:
    """One split to read. Faults are given to `faults`, which repairs, refuses or leaves out as the user wants."""

    images: Path  # the folder of images, which is there
    annotations: Path  # what `data.<name>.<split>.annotations` says
    split: str = "train"
    source: DataConfig = field(default_factory=DataConfig)
    classes: tuple[str, ...] | None = None  # to use, in the order of the labels; None: all that are found
    exact: bool = False  # classes that are not among `classes` are refused, not left out
    strict: bool = True  # see Faults
    may_write: bool = True  # whether what is generated may be

    def __post_init__(self) -> None:
        self.faults = Faults(
            self.annotations,
            strict=self.strict,
            skip_bad_images=self.source.on_bad_image == "skip",
            allow_links=self.source.allow_links,
        )

    @property
    def may_lack(self) -> bool:
        """Whether some of `classes` may be missing: in `train`, each class that the user names has to be there."""
        return self.exact or self.split != "train"

    def choose_classes(self, found: Sequence[str]) -> tuple[str, ...]:
        """The classes to use, of those that the files hold: label -> name. Raises UserError for a missing one."""
        if self.classes is None:
            return tuple(found)
        lacks = [name for name in self.classes if name not in found]
        if lacks and not self.may_lack:
            raise unknown_name(f"{self.annotations}: classes", lacks[0], found)
        if self.exact:
            self.faults.refuse("class that the training split lacks:", sorted(set(found) - set(self.classes)))
        return self.classes


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
