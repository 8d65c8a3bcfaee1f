"""A COCO file's images, categories and objects, with every type checked.

The objects are decoded a thousand at a time: millions of Python numbers at once would take most of the time to find
memory for, and several times the file's size of it.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from detbb.core.errors import UserError
from detbb.data.images import read_bytes
from detbb.structures.annotations import Annotations

T = TypeVar("T")
Id = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]  # leaves room for new ones
OwnId = Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # what engines of evaluation take
AT_ONCE = 1024  # the numbers of so many objects stay in a core's cache until they are in arrays
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Image(msgspec.Struct, gc=False):
    id: OwnId
    file_name: str
    width: float = 0
    height: float = 0


class Category(msgspec.Struct, gc=False):
    id: OwnId
    name: str
    keypoints: list[str] = []
    supercategory: Any = None


class Object(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    id: Id | None = 0
    bbox: tuple[float, float, float, float] | None = None
    area: float | None = None
    iscrowd: int | bool | None = None
    segmentation: list[list[float]] | dict[str, Any] | None = None
    keypoints: list[float] | None = None


class _CategoryOf(msgspec.Struct, gc=False):
    category_id: Id


class _Document(msgspec.Struct, gc=False):
    images: list[Image]
    annotations: list[msgspec.Raw]
    categories: list[Category]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Millions of new objects and no cycles: the collector would search through them again and again, for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CocoFile:
    """The parts of a COCO file that are read; anything else in it is passed over.

    Making one and `runs` raise UserError with the place in the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        document = self._decode(read_bytes(path), _Document)
        self.images, self.categories, self._objects = document.images, document.categories, document.annotations

    def runs(self) -> Iterator[list[Object]]:
        """All objects, at most AT_ONCE at a time; at least one list."""
        for start in range(0, max(len(self._objects), 1), AT_ONCE):
            yield self._decode(b"[" + b",".join(self._objects[start : start + AT_ONCE]) + b"]", list[Object], start)

    def root(self) -> Category | None:
        """The category that is only the name of all others' group and has no object (as in Roboflow's files)."""
        for category in self.categories:
            others = [c for c in self.categories if c.id != category.id]
            if others and all(c.supercategory == category.name for c in others) and not self._has_objects(category.id):
                return category
        return None

    def _has_objects(self, category_id: int) -> bool:
        try:
            objects = (msgspec.json.decode(item, type=_CategoryOf) for item in self._objects)
            return any(o.category_id == category_id for o in objects)
        except _NOT_JSON:  # `runs` will say what is wrong
            return True

    def _decode(self, data: bytes, kind: type[T], start: int = 0) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except _NOT_JSON as first:
            try:  # Python's reader also takes NaN and Infinity, which deserve an error with their ids
                return _decode_by_python(data, kind)
            except msgspec.ValidationError as e:
                place = re.sub(r"`\$\[(\d+)\]", lambda row: f"`$.annotations[{start + int(row[1])}]", str(e))
                raise UserError(f"{self._path}: is not a COCO file: {place}") from None
            except (ValueError, RecursionError):
                raise UserError(f"{self._path}: is not a COCO file: {first}") from None


def _decode_by_python(data: bytes, kind: type[T]) -> T:
    content = json.loads(data)
    if kind is _Document and isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content["annotations"] = [msgspec.Raw(json.dumps(o).encode()) for o in content["annotations"]]
    made = msgspec.convert(content, kind)
    msgspec.json.encode(made)  # lone surrogates, which Python's reader takes as well, are no text
    return made


def coco_dict(a: Annotations, *, masks: bool = False, keypoints: bool = False) -> dict[str, Any]:
    """The split as the content of a COCO file; masks, keypoints: with them, where there are any."""
    columns = (a.object_ids, np.repeat(a.image_ids, np.diff(a.first)), a.category_ids[a.labels], a.boxes_xywh, a.areas)
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    values = zip(*(c.tolist() for c in (*columns, a.crowd.astype(int))), strict=True)
    objects: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in values]
    for row, item in enumerate(objects):
        if masks and a.segments is not None:
            item["segmentation"] = a.segments.coco(row)
        if keypoints and a.keypoints is not None:
            item["keypoints"] = a.keypoints[row].ravel().tolist()
            item["num_keypoints"] = int((a.keypoints[row, :, 2] > 0).sum())
    images = [
        {"id": number, "height": height, "width": width, "file_name": name}
        for number, (height, width), name in zip(a.image_ids.tolist(), a.sizes.tolist(), a.file_names, strict=True)
    ]
    points = {"keypoints": list(a.keypoint_names)} if keypoints and a.keypoint_names else {}
    categories = [{"id": n, "name": name, **points} for n, name in zip(a.category_ids.tolist(), a.classes, strict=True)]
    return {"images": images, "annotations": objects, "categories": categories}
