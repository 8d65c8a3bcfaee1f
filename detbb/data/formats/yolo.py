"""YOLO's txt labels to `Annotations`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from detbb.core.errors import UserError
from detbb.data.formats.base import annotations_of
from detbb.data.formats.faults import Faults, Rows
from detbb.data.images import list_images, read_text, readable_headers, safe_join
from detbb.structures.annotations import Annotations, Segments


def read_yolo(images: Path, labels: Path, classes: Mapping[int, str], *, faults: Faults | None = None) -> Annotations:
    """Every image below `images`; its objects are in the txt file of the same name below `labels`, if there is one.

    A line is `class x y w h` (centre and size, in parts of the image) or `class x1 y1 x2 y2 …` (a polygon). Image ids
    count the sorted files from 1, unusable ones too; category ids are YOLO's class numbers + 1. Raises UserError for
    what cannot be repaired, unless `faults` is not strict.
    """
    if not labels.is_dir():
        raise UserError(f"{labels} is not a folder")
    faults = faults or Faults(labels)
    listed = list_images(images)
    headers, bad = readable_headers(images, listed)
    faults.bad_images("image that cannot be read", bad)
    files = list(headers)
    sizes = np.array([headers[f] for f in files], dtype=np.int32).reshape(-1, 2)
    label_of = {number: label for label, number in enumerate(classes)}
    image, label, boxes, areas, polygons, unknown, wrong = [], [], [], [], [], [], []
    for index, file in enumerate(files):
        path = safe_join(labels, str(Path(file).with_suffix(".txt")))
        height, width = sizes[index].tolist()
        for where, number, values in _lines(path) if path.exists() else ():
            if len(values) != 4 and (len(values) < 6 or len(values) % 2):
                wrong.append(where)
                continue
            if number not in label_of:
                unknown.append(f"{where}: class {number}")
                continue
            points = values.reshape(-1, 2) * (width, height)
            corner, size = (
                (points[0] - points[1] / 2, points[1]) if len(points) == 2 else (points.min(0), np.ptp(points, 0))
            )
            image.append(index)
            label.append(label_of[number])
            boxes.append((*corner, *size))
            areas.append(_area(points) if len(points) > 2 else size.prod())
            polygons.append([] if len(points) == 2 else [points.ravel().tolist()])
    faults.refuse("line that is not `class x y w h` or `class x1 y1 x2 y2 x3 y3 …`:", wrong)
    faults.refuse(f"line of a class that is none of {len(label_of)}:", unknown)
    rows = Rows(
        image=np.array(image, dtype=np.int64),
        label=np.array(label, dtype=np.int64),
        boxes_xywh=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        area=np.nan_to_num(np.array(areas, dtype=np.float64)).clip(min=0),
        segments=Segments(polygons) if any(polygons) else None,
    )
    return annotations_of(
        images,
        files,
        sizes,
        rows,
        faults,
        classes=tuple(classes.values()),
        category_ids=np.array(list(classes), dtype=np.int64) + 1,
        image_ids=np.flatnonzero([name in headers for name in listed]) + 1,
    )


def _area(points: np.ndarray) -> float:
    """Of a polygon that does not cross itself (Gauss's formula)."""
    x, y = (points - points[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _lines(path: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """(place, class number, coordinates) of each line; no coordinates where it is none."""
    try:
        text = read_text(path)
    except UserError as e:
        yield str(e), -1, np.zeros(0)
        return
    for at, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {at}: {line[:80]!r}"
        try:
            number, *values = line.split()
            yield where, int(number), np.array(values, dtype=np.float64)
        except ValueError:
            yield where, -1, np.zeros(0)
