"""What the labels of a branch mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detbb.structures.annotations import Annotations


@dataclass(frozen=True)
class ClassList:
    """What the labels of a branch mean: names in label order, the ids of the annotation file, keypoint names."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    keypoints: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        ids = [int(i) for i in self.category_ids]
        return {"names": list(self.names), "category_ids": ids, "keypoints": list(self.keypoints)}

    @classmethod
    def of_data(cls, annotations: Annotations) -> ClassList:
        """What the labels of a data source mean."""
        return cls(annotations.classes, tuple(annotations.category_ids.tolist()), annotations.keypoint_names)

    @classmethod
    def of(cls, value: ClassList | Mapping[str, Any] | Sequence[str]) -> ClassList:
        """From `to_dict`'s form, or from names alone (ids 1, 2, …)."""
        if isinstance(value, ClassList):
            return value
        if isinstance(value, Mapping):
            return cls(tuple(value["names"]), tuple(value["category_ids"]), tuple(value.get("keypoints", ())))
        return cls(tuple(value), tuple(range(1, len(value) + 1)))
