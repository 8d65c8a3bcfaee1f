"""COCO JSON to `Annotations`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detbb.core.errors import UserError
from detbb.data.formats.annotation_cache import AnnotationCache
from detbb.data.formats.base import Request, annotations_of
from detbb.data.formats.coco_json import Category, CocoFile, Image, Object, no_garbage_collection
from detbb.data.formats.faults import MAX_COORDINATE, Faults, Rows
from detbb.data.images import BadImage, image_header, name_fault, safe_join
from detbb.structures.annotations import Annotations, Segments

_FIELDS = attrgetter(*Object.__struct_fields__)
_NO_BOX = (np.nan,) * 4
_SIDE = re.compile(r"left|right|(?<![^\W_])[lr](?![^\W_])")
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


def read_coco(request: Request) -> Annotations:
    """One COCO file with the images it names below `images`.

    Labels follow the category ids, or the order of `classes`; objects of other classes are left out. Crowds are kept
    and flagged. A file without any box says what whole images are: each object gets a box around its image. Raises
    UserError for what cannot be repaired, with the first ids, if the request is strict.
    What a large file became is kept for the next start, if no other file had a part in it.
    """
    cache = AnnotationCache(request.annotations, ("coco", request.classes, request.exact, request.may_lack))
    if (known := cache.load(request.images)) is not None:
        request.faults.found += known.faults
        return known
    found = _read(request)
    if all(f.repaired for f in found.faults) and not request.faults.of_images:
        cache.store(found)
    return found


@no_garbage_collection()  # around the function, so that its objects are gone when collecting goes on
def _read(request: Request) -> Annotations:
    file, faults = CocoFile(request.annotations), request.faults
    faults.refuse("category id used twice:", _repeated([c.id for c in file.categories]))
    categories = sorted({c.id: c for c in reversed(file.categories)}.values(), key=lambda c: c.id)
    root = file.root()
    others = [c.name for c in categories if c is not root]
    if root is not None and (root.name in others or root.name not in (request.classes or ())):
        categories.remove(root)
        faults.note(
            "category without objects that is the group of all others (left out):", [f"{root.name} (id {root.id})"]
        )
    ids: dict[str, list[int]] = {}
    for category in categories:
        ids.setdefault(category.name, []).append(category.id)
    twice = [f"{name} (ids {', '.join(map(str, own))})" for name, own in ids.items() if len(own) > 1]
    faults.refuse("class name used twice (--fix makes it one class):", twice)
    names = request.choose_classes(list(ids))
    for name in names:
        ids.setdefault(name, [max((number for own in ids.values() for number in own), default=0) + 1])
    images = _usable_images(request.images, file.images, faults)
    keypoint_names = _keypoint_names(categories, names, request.annotations)
    label_of = {number: names.index(name) for name, own in ids.items() if name in names for number in own}
    rows = _rows(file, images, label_of, len(keypoint_names), faults)
    keypoint_names = keypoint_names if rows.keypoints is not None else ()
    return annotations_of(
        request.images,
        images.names,
        images.sizes,
        rows,
        faults,
        classes=names,
        category_ids=np.array([ids[name][0] for name in names], dtype=np.int64),
        image_ids=images.ids,
        keypoint_names=keypoint_names,
        flip_pairs=flip_pairs(keypoint_names),
    )


def flip_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of keypoints whose names differ in left and right alone, or in the words l and r; the case is no matter."""
    rows = {n.casefold(): i for i, n in enumerate(names)}
    pairs = ((i, rows.get(_SIDE.sub(lambda side: _OTHER_SIDE[side[0]], n), i)) for n, i in rows.items())
    return tuple(sorted((a, b) for a, b in pairs if a < b))


class _Images(NamedTuple):
    """Those that can be used."""

    names: list[str]
    ids: np.ndarray
    sizes: np.ndarray  # (N, 2) height, width

    def sizes_of(self, ids: np.ndarray) -> np.ndarray:
        """(M, 2); 0 x 0 for an unknown image."""
        index, known = _lookup(self.ids, ids)
        return self.sizes[index] * known[:, None] if len(self.ids) else np.zeros((len(ids), 2), dtype=np.int32)


def _usable_images(root: Path, images: list[Image], faults: Faults) -> _Images:
    outside = [i for i in images if name_fault(i.file_name)]
    faults.refuse("file name that leaves the image folder, image ids", [i.id for i in outside])
    faults.refuse("image id used twice:", _repeated([i.id for i in images]))
    names: dict[str, int] = {}
    again = [i for i in images if names.setdefault(i.file_name, i.id) != i.id]
    faults.refuse("image file named by several images, image ids", [i.id for i in again])
    left_out = {id(i) for i in [*outside, *again]}
    first: dict[int, Image] = {}
    for image in images:
        if id(image) not in left_out:
            first.setdefault(image.id, image)
    used = list(first.values())
    sizes = np.array([(i.height, i.width) for i in used], dtype=np.float64).reshape(-1, 2)
    missing = (sizes == 0).any(axis=1)
    faults.of_images |= bool(missing.any())
    unread: list[int] = []
    for k in np.flatnonzero(missing).tolist():
        try:
            sizes[k] = image_header(safe_join(root, used[k].file_name, links=faults.allow_links))
        except BadImage:
            unread.append(k)
    faults.bad_images("image of unknown size that cannot be read", [used[k].file_name for k in unread])
    missing[unread] = False
    sizes[unread] = 1
    wrong = ~((sizes > 0) & (sizes <= 2**31 - 1) & (sizes == np.round(sizes))).all(axis=1)
    faults.refuse("width or height that is no pixel count, image ids", [used[k].id for k in np.flatnonzero(wrong)])
    faults.repair("missing width or height (from the file), image ids", [used[k].id for k in np.flatnonzero(missing)])
    wrong[unread] = True
    kept = [used[k] for k in np.flatnonzero(~wrong)]
    ids = np.array([i.id for i in kept], dtype=np.int64)
    return _Images([i.file_name for i in kept], ids, sizes[~wrong].astype(np.int32))


def _rows(file: CocoFile, images: _Images, label_of: dict[int, int], points: int, faults: Faults) -> Rows:
    """The objects of images that can be used, with `points` keypoints each."""
    parts = []

    def segmentations() -> Iterator[tuple[list[Any], np.ndarray]]:
        for objects in file.runs():
            parts.append(_columns(objects, points))
            yield [o.segmentation for o in objects], images.sizes_of(parts[-1]["image"])

    segments = Segments(segmentations())
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ids = columns["id"]
    known_image = _lookup(np.array([i.id for i in file.images], dtype=np.int64), columns["image"])[1]
    faults.refuse("annotation of an unknown image, annotation ids", ids[~known_image])
    known_category = _lookup(np.array([c.id for c in file.categories], dtype=np.int64), columns["category"])[1]
    faults.refuse("annotation of an unknown category, annotation ids", ids[~known_category])
    bare = columns["bare"]
    if not bare.all():
        faults.refuse("annotation without a bbox, annotation ids", ids[bare])
    image, used = _lookup(images.ids, columns["image"])
    used &= known_category & (~bare | bare.all())
    image, columns = image[used], {name: column[used] for name, column in columns.items()}
    place, wanted = _lookup(np.array(list(label_of), dtype=np.int64), columns["category"])
    label = np.where(wanted, np.array([*label_of.values(), -1])[place], -1)
    faults.repair("missing iscrowd (taken as 0), annotation ids", columns["id"][columns["no_crowd"]])
    wrong = columns["wrong_points"] & wanted
    faults.refuse(f"keypoints that are not {points} finite x, y, visibility, annotation ids", columns["id"][wrong])
    label[wrong] = -1
    if bare.all():
        columns["box"][:, :2], columns["box"][:, 2:] = 0, images.sizes[image, ::-1]
    return Rows(
        image=image,
        label=label,
        boxes_xywh=columns["box"],
        area=columns["area"],
        crowd=columns["crowd"],
        ids=columns["id"],
        segments=segments.take(np.flatnonzero(used)) if columns["shaped"].any() else None,
        keypoints=columns["keypoints"] if columns["has_points"].any() else None,
    )


def _columns(objects: list[Object], points: int) -> dict[str, Any]:
    image, category, number, box, area, crowd, shape, pointed = (
        zip(*map(_FIELDS, objects), strict=True) if objects else [()] * 8
    )
    keypoints, wrong = np.zeros((len(objects), points, 3), dtype=np.float32), np.zeros(len(objects), dtype=bool)
    has_points = np.array([*map(bool, pointed)], dtype=bool) & (points > 0)
    for row in np.flatnonzero(has_points).tolist():
        own = np.array(pointed[row])
        if len(own) == 3 * points and (np.abs(own) <= MAX_COORDINATE).all():
            keypoints[row] = own.reshape(points, 3)
        else:
            wrong[row] = True
    columns = {"image": np.array(image, dtype=np.int64), "category": np.array(category, dtype=np.int64)}
    return columns | {
        "id": np.array([n or 0 for n in number] if None in number else number, dtype=np.int64),
        "bare": _is_none(box),
        "box": np.fromiter(chain.from_iterable(b or _NO_BOX for b in box), np.float64, 4 * len(box)).reshape(-1, 4),
        "area": np.array(area, dtype=np.float64),  # NaN for None
        "crowd": np.array(crowd, dtype=bool),
        "no_crowd": _is_none(crowd),
        "shaped": np.array([*map(bool, shape)], dtype=bool),
        "keypoints": keypoints,
        "has_points": has_points,
        "wrong_points": wrong,
    }


def _is_none(values: Sequence[object]) -> np.ndarray:
    if None not in values:
        return np.zeros(len(values), dtype=bool)
    return np.array([value is None for value in values], dtype=bool)


def _lookup(ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index in `ids` of every value (0 where there is none), and whether it is there."""
    if not len(ids):
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values), dtype=bool)
    order = np.argsort(ids, kind="stable")
    index = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
    found = ids[index] == values
    return np.where(found, index, 0), found


def _repeated(ids: list[int]) -> np.ndarray:
    values, counts = np.unique(np.array(ids, dtype=np.int64), return_counts=True)
    return values[counts > 1]


def _keypoint_names(categories: list[Category], classes: Sequence[str], origin: Path) -> tuple[str, ...]:
    kinds = {tuple(c.keypoints) for c in categories if c.keypoints and c.name in classes}
    if len(kinds) > 1:
        raise UserError(
            f"{origin}: categories name different keypoints; one list for all is supported, or use `classes`"
        )
    return next(iter(kinds), ())
