"""COCO JSON to `Annotations`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from detbb.data.annotations import Annotations, PackedStrings
from detbb.data.faults import Faults, Rows, arrange, choose_classes
from detbb.data.images import image_header, name_fault, safe_join
from detbb.errors import UserError

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str
    width: float = 0
    height: float = 0


class _Category(msgspec.Struct, gc=False):
    id: Id
    name: str
    keypoints: list[str] = []


class _Object(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    id: Id | None = 0
    bbox: tuple[float, float, float, float] | None = None
    area: float | None = None
    iscrowd: int | bool | None = 0
    segmentation: list[list[float]] | dict[str, Any] | None = None
    keypoints: list[float] | None = None


class CocoFile(msgspec.Struct, gc=False):
    """The parts of a COCO file that are read; anything else in it is passed over."""

    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


def read_coco(
    images: Path, annotations: Path, *, classes: Sequence[str] | None = None, exact: bool = False
) -> Annotations:
    """One COCO file with the images it names below `images`.

    Labels follow the category ids, or the order of `classes` (objects of other classes are left out; with `exact` there
    may be none). Crowds are kept and flagged. A file without any box says what whole images are: each object gets a box
    around its image. Raises UserError for what cannot be repaired, with the first ids.
    """
    faults = Faults(annotations)
    with _no_garbage_collection():
        file = parse_coco(annotations)
        categories = sorted(file.categories, key=lambda c: c.id)
        names = choose_classes([c.name for c in categories], classes, annotations, exact=exact)
        category_ids = np.array([next(c.id for c in categories if c.name == n) for n in names], dtype=np.int64)
        image_ids = np.array([i.id for i in file.images], dtype=np.int64)
        sizes = _check_images(images, file.images, faults)
        faults.refuse("image id used twice:", _repeated(image_ids))
        faults.refuse("category id used twice:", _repeated(np.array([c.id for c in categories], dtype=np.int64)))
        faults.finish()
        keypoint_names = _keypoint_names(categories, names, annotations)
        rows = _rows(file, image_ids, sizes, category_ids, faults)
        if keypoint_names and any(o.keypoints for o in file.annotations):
            rows.keypoints = _keypoints(file, rows, len(keypoint_names), faults)
        else:
            keypoint_names = ()
        fields = arrange(rows, sizes, faults)
    return Annotations(
        root=images,
        classes=names,
        category_ids=category_ids,
        image_ids=image_ids,
        file_names=PackedStrings(i.file_name for i in file.images),
        sizes=sizes,
        keypoint_names=keypoint_names,
        flip_pairs=flip_pairs(keypoint_names),
        faults=faults.finish(),
        **fields,
    )


def parse_coco(path: Path) -> CocoFile:
    """The file's contents with every type checked. Raises UserError with the place in the file."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    try:
        return msgspec.json.decode(data, type=CocoFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as first:
        try:  # Python's reader also takes NaN and Infinity, which deserve an error with their ids
            return msgspec.convert(json.loads(data), CocoFile)
        except msgspec.ValidationError as e:
            raise UserError(f"{path}: is not a COCO file: {e}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}: is not a COCO file: {first}") from None


def flip_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of keypoints whose names differ in left and right alone."""
    swapped = {n: n.replace("left", "\0").replace("right", "left").replace("\0", "right") for n in names}
    pairs = [(i, names.index(swapped[n])) for i, n in enumerate(names) if swapped[n] in names]
    return tuple((a, b) for a, b in pairs if a < b)


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


def _check_images(root: Path, images: list[_Image], faults: Faults) -> np.ndarray:
    faults.refuse(
        "file name that leaves the image folder, image ids", [i.id for i in images if name_fault(i.file_name)]
    )
    sizes = np.array([(i.height, i.width) for i in images], dtype=np.float64).reshape(-1, 2)
    missing = (sizes == 0).any(axis=1)
    wrong = ~missing & ~((sizes > 0) & (sizes <= 2**31 - 1) & (sizes == np.round(sizes))).all(axis=1)
    faults.refuse("width or height that is no pixel count, image ids", [images[i].id for i in np.flatnonzero(wrong)])
    faults.repair("missing width or height (from the file), image ids", [images[i].id for i in np.flatnonzero(missing)])
    for i in np.flatnonzero(missing):
        if not name_fault(images[i].file_name):
            sizes[i] = image_header(safe_join(root, images[i].file_name))
    return np.where(wrong[:, None], 1, sizes).astype(np.int32)


def _rows(file: CocoFile, image_ids: np.ndarray, sizes: np.ndarray, category_ids: np.ndarray, faults: Faults) -> Rows:
    objects = file.annotations
    count = len(objects)
    ids = np.fromiter((o.id or 0 for o in objects), np.int64, count)
    image, known_image = _lookup(image_ids, np.fromiter((o.image_id for o in objects), np.int64, count))
    faults.refuse("annotation of an unknown image, annotation ids", ids[~known_image])
    in_file = np.array([c.id for c in file.categories], dtype=np.int64)
    categories = np.fromiter((o.category_id for o in objects), np.int64, count)
    faults.refuse("annotation of an unknown category, annotation ids", ids[~_lookup(in_file, categories)[1]])
    label, wanted = _lookup(category_ids, categories)
    faults.finish()
    if any(o.bbox is not None for o in objects):
        bare = [k for k, o in enumerate(objects) if o.bbox is None]
        faults.refuse("annotation without a bbox, annotation ids", ids[bare])
        faults.finish()
        boxes = np.fromiter(chain.from_iterable(o.bbox for o in objects if o.bbox), np.float64, 4 * count)
    else:
        boxes = np.stack([np.zeros(count), np.zeros(count), sizes[image, 1], sizes[image, 0]], axis=1)
    return Rows(
        image=image,
        label=np.where(wanted, label, -1),
        boxes_xywh=boxes.reshape(-1, 4),
        area=np.fromiter((np.nan if o.area is None else o.area for o in objects), np.float64, count),
        crowd=np.fromiter((bool(o.iscrowd) for o in objects), bool, count),
        ids=ids,
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


def _repeated(ids: np.ndarray) -> np.ndarray:
    values, counts = np.unique(ids, return_counts=True)
    return values[counts > 1]


def _keypoint_names(categories: list[_Category], classes: Sequence[str], origin: Path) -> tuple[str, ...]:
    kinds = {tuple(c.keypoints) for c in categories if c.keypoints and c.name in classes}
    if len(kinds) > 1:
        raise UserError(
            f"{origin}: categories name different keypoints; one list for all is supported, or use `classes`"
        )
    return next(iter(kinds), ())


def _keypoints(file: CocoFile, rows: Rows, points: int, faults: Faults) -> np.ndarray:
    """(M, K, 3) float32; objects without keypoints have K absent ones."""
    result = np.zeros((len(file.annotations), points, 3), dtype=np.float32)
    wrong = []
    for k, o in enumerate(file.annotations):
        if o.keypoints:
            if len(o.keypoints) == 3 * points and np.isfinite(o.keypoints).all():
                result[k] = np.reshape(o.keypoints, (points, 3))
            elif rows.label[k] >= 0:
                wrong.append(k)
    faults.refuse(f"keypoints that are not {points} finite x, y, visibility, annotation ids", rows.ids[wrong])
    return result
