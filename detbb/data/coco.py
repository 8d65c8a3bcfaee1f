"""COCO JSON to `Annotations`."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from detbb.data.annotations import Annotations, PackedStrings
from detbb.data.faults import FARTHEST, Faults, Rows, arrange, choose_classes
from detbb.data.images import BadImage, image_header, name_fault, read_bytes, safe_join
from detbb.errors import UserError

Id = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]  # leaves room for new ones
OwnId = Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # what engines of evaluation take
_SIDE = re.compile(r"left|right|(?<![^\W_])[lr](?![^\W_])")
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


class _Image(msgspec.Struct, gc=False):
    id: OwnId
    file_name: str
    width: float = 0
    height: float = 0


class _Category(msgspec.Struct, gc=False):
    id: OwnId
    name: str
    keypoints: list[str] = []


class _Object(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    id: Id | None = 0
    bbox: tuple[float, float, float, float] | None = None
    area: float | None = None
    iscrowd: int | bool | None = None
    segmentation: list[list[float]] | dict[str, Any] | None = None
    keypoints: list[float] | None = None


class CocoFile(msgspec.Struct, gc=False):
    """The parts of a COCO file that are read; anything else in it is passed over."""

    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


def read_coco(
    images: Path,
    annotations: Path,
    *,
    classes: Sequence[str] | None = None,
    exact: bool = False,
    faults: Faults | None = None,
) -> Annotations:
    """One COCO file with the images it names below `images`.

    Labels follow the category ids, or the order of `classes` (objects of other classes are left out; with `exact` there
    may be none). Crowds are kept and flagged. A file without any box says what whole images are: each object gets a box
    around its image. Raises UserError for what cannot be repaired, with the first ids, unless `faults` is not strict.
    """
    faults = faults or Faults(annotations)
    with _no_garbage_collection():
        file = parse_coco(annotations)
        faults.refuse("category id used twice:", _repeated([c.id for c in file.categories]))
        categories = sorted({c.id: c for c in reversed(file.categories)}.values(), key=lambda c: c.id)
        names = choose_classes([c.name for c in categories], classes, faults, exact=exact)
        category_ids = _category_ids(categories, names)
        used, sizes = _usable_images(images, file.images, faults)
        image_ids = np.array([i.id for i in used], dtype=np.int64)
        keypoint_names = _keypoint_names(categories, names, annotations)
        objects, rows = _rows(file, image_ids, sizes, category_ids, faults)
        if keypoint_names and any(o.keypoints for o in file.annotations):
            rows.keypoints = _keypoints(objects, rows, len(keypoint_names), faults)
        else:
            keypoint_names = ()
        fields = arrange(rows, sizes, faults)
    return Annotations(
        root=images,
        classes=names,
        category_ids=category_ids,
        image_ids=image_ids,
        file_names=PackedStrings(i.file_name for i in used),
        sizes=sizes,
        keypoint_names=keypoint_names,
        flip_pairs=flip_pairs(keypoint_names),
        faults=faults.finish(),
        **fields,
    )


def parse_coco(path: Path) -> CocoFile:
    """The file's contents with every type checked. Raises UserError with the place in the file."""
    data = read_bytes(path)
    try:
        return msgspec.json.decode(data, type=CocoFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as first:
        try:  # Python's reader also takes NaN and Infinity, which deserve an error with their ids
            file = msgspec.convert(json.loads(data), CocoFile)
            msgspec.json.encode(file)  # it also takes lone surrogates, which are no text
            return file
        except msgspec.ValidationError as e:
            raise UserError(f"{path}: is not a COCO file: {e}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}: is not a COCO file: {first}") from None


def flip_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of keypoints whose names differ in left and right alone, or in the words l and r; the case is no matter."""
    rows = {n.casefold(): i for i, n in enumerate(names)}
    pairs = ((i, rows.get(_SIDE.sub(lambda side: _OTHER_SIDE[side[0]], n), i)) for n, i in rows.items())
    return tuple(sorted((a, b) for a, b in pairs if a < b))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of new objects and no cycles: the collector would only search through them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _category_ids(categories: list[_Category], names: Sequence[str]) -> np.ndarray:
    """The id of each class; a new one for a class that the file lacks."""
    ids: dict[str, int] = {}
    for category in categories:
        ids.setdefault(category.name, category.id)
    for name in names:
        ids.setdefault(name, max(ids.values(), default=0) + 1)
    return np.array([ids[name] for name in names], dtype=np.int64)


def _usable_images(root: Path, images: list[_Image], faults: Faults) -> tuple[list[_Image], np.ndarray]:
    """The images that can be used, and their (height, width)."""
    outside = [i for i in images if name_fault(i.file_name)]
    faults.refuse("file name that leaves the image folder, image ids", [i.id for i in outside])
    faults.refuse("image id used twice:", _repeated([i.id for i in images]))
    names: dict[str, int] = {}
    again = [i for i in images if names.setdefault(i.file_name, i.id) != i.id]
    faults.refuse("image file named by several images, image ids", [i.id for i in again])
    left_out = {id(i) for i in [*outside, *again]}
    seen: set[int] = set()
    used = [i for i in images if id(i) not in left_out and i.id not in seen and not seen.add(i.id)]  # type: ignore[func-returns-value]
    sizes = np.array([(i.height, i.width) for i in used], dtype=np.float64).reshape(-1, 2)
    missing = (sizes == 0).any(axis=1)
    unread: list[int] = []
    for k in np.flatnonzero(missing).tolist():
        try:
            sizes[k] = image_header(safe_join(root, used[k].file_name))
        except BadImage:
            unread.append(k)
    faults.bad_images("image of unknown size that cannot be read", [used[k].file_name for k in unread])
    missing[unread] = False
    sizes[unread] = 1
    wrong = ~((sizes > 0) & (sizes <= 2**31 - 1) & (sizes == np.round(sizes))).all(axis=1)
    faults.refuse("width or height that is no pixel count, image ids", [used[k].id for k in np.flatnonzero(wrong)])
    faults.repair("missing width or height (from the file), image ids", [used[k].id for k in np.flatnonzero(missing)])
    wrong[unread] = True
    return [i for i, w in zip(used, wrong.tolist(), strict=True) if not w], sizes[~wrong].astype(np.int32)


def _rows(
    file: CocoFile, image_ids: np.ndarray, sizes: np.ndarray, category_ids: np.ndarray, faults: Faults
) -> tuple[list[_Object], Rows]:
    """The objects of images that can be used."""
    ids = np.fromiter((o.id or 0 for o in file.annotations), np.int64, len(file.annotations))
    images = np.fromiter((o.image_id for o in file.annotations), np.int64, len(ids))
    categories = np.fromiter((o.category_id for o in file.annotations), np.int64, len(ids))
    known_image = _lookup(np.array([i.id for i in file.images], dtype=np.int64), images)[1]
    faults.refuse("annotation of an unknown image, annotation ids", ids[~known_image])
    known_category = _lookup(np.array([c.id for c in file.categories], dtype=np.int64), categories)[1]
    faults.refuse("annotation of an unknown category, annotation ids", ids[~known_category])
    bare = np.fromiter((o.bbox is None for o in file.annotations), bool, len(ids))
    if not bare.all():
        faults.refuse("annotation without a bbox, annotation ids", ids[bare])
    image, used = _lookup(image_ids, images)
    used &= known_category & (~bare | bare.all())
    objects = [file.annotations[k] for k in np.flatnonzero(used)]
    image, count = image[used], len(objects)
    label, wanted = _lookup(category_ids, categories[used])
    faults.repair("missing iscrowd (taken as 0), annotation ids", [o.id for o in objects if o.iscrowd is None])
    if bare.all():
        boxes = np.stack([np.zeros(count), np.zeros(count), sizes[image, 1], sizes[image, 0]], axis=1)
    else:
        boxes = np.fromiter(chain.from_iterable(o.bbox for o in objects if o.bbox), np.float64, 4 * count)
    return objects, Rows(
        image=image,
        label=np.where(wanted, label, -1),
        boxes_xywh=boxes.reshape(-1, 4),
        area=np.fromiter((np.nan if o.area is None else o.area for o in objects), np.float64, count),
        crowd=np.fromiter((bool(o.iscrowd) for o in objects), bool, count),
        ids=ids[used],
        segmentations=[o.segmentation for o in objects] if any(o.segmentation for o in objects) else None,
    )


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


def _keypoint_names(categories: list[_Category], classes: Sequence[str], origin: Path) -> tuple[str, ...]:
    kinds = {tuple(c.keypoints) for c in categories if c.keypoints and c.name in classes}
    if len(kinds) > 1:
        raise UserError(
            f"{origin}: categories name different keypoints; one list for all is supported, or use `classes`"
        )
    return next(iter(kinds), ())


def _keypoints(objects: list[_Object], rows: Rows, points: int, faults: Faults) -> np.ndarray:
    """(M, K, 3) float32; objects without keypoints have K absent ones."""
    result = np.zeros((len(objects), points, 3), dtype=np.float32)
    wrong = []
    for k, o in enumerate(objects):
        if o.keypoints:
            if len(o.keypoints) == 3 * points and (np.abs(o.keypoints) <= FARTHEST).all():
                result[k] = np.reshape(o.keypoints, (points, 3))
            elif rows.label[k] >= 0:
                wrong.append(k)
    faults.refuse(f"keypoints that are not {points} finite x, y, visibility, annotation ids", rows.ids[wrong])
    rows.label[wrong] = -1
    return result
