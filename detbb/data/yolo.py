"""YOLO's txt labels to `Annotations`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from detbb.data.annotations import Annotations, PackedStrings
from detbb.data.faults import Faults, Rows, arrange
from detbb.data.images import image_header, list_images, safe_join
from detbb.errors import UserError


def read_yolo(images: Path, labels: Path, classes: Mapping[int, str]) -> Annotations:
    """Every image below `images`; its objects are in the txt file of the same name below `labels`, if there is one.

    A line is `class x y w h` (centre and size, in parts of the image) or `class x1 y1 x2 y2 …` (a polygon). Image ids
    count the sorted files from 1; category ids are YOLO's class numbers + 1.
    """
    if not labels.is_dir():
        raise UserError(f"{labels} is not a folder")
    files = list_images(images)
    sizes = np.array([image_header(safe_join(images, f)) for f in files], dtype=np.int32).reshape(-1, 2)
    label_of = {number: label for label, number in enumerate(classes)}
    image, label, boxes, polygons = [], [], [], []
    for index, file in enumerate(files):
        path = safe_join(labels, str(Path(file).with_suffix(".txt")))
        height, width = sizes[index].tolist()
        for number, values in _lines(path) if path.exists() else ():
            if number not in label_of:
                raise UserError(
                    f"{path}: class {number} is not one of {len(label_of)} classes ({', '.join(map(str, label_of))})"
                )
            points = values.reshape(-1, 2) * (width, height)
            corner, size = (
                (points[0] - points[1] / 2, points[1]) if len(points) == 2 else (points.min(0), np.ptp(points, 0))
            )
            image.append(index)
            label.append(label_of[number])
            boxes.append((*corner, *size))
            polygons.append([] if len(points) == 2 else [points.ravel().tolist()])
    faults = Faults(labels)
    boxes_xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    rows = Rows(
        image=np.array(image, dtype=np.int64),
        label=np.array(label, dtype=np.int64),
        boxes_xywh=boxes_xywh,
        area=np.nan_to_num(boxes_xywh[:, 2] * boxes_xywh[:, 3]).clip(min=0),
        crowd=np.zeros(len(image), dtype=bool),
        ids=np.arange(1, len(image) + 1),
        segmentations=polygons if any(polygons) else None,
    )
    return Annotations(
        root=images,
        classes=tuple(classes.values()),
        category_ids=np.array(list(classes), dtype=np.int64) + 1,
        image_ids=np.arange(1, len(files) + 1),
        file_names=PackedStrings(files),
        sizes=sizes,
        **arrange(rows, sizes, faults),
        faults=faults.finish(),
    )


def _lines(path: Path) -> list[tuple[int, np.ndarray]]:
    """(class number, coordinates) of each line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    found = []
    for at, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            number, *values = line.split()
            coordinates = np.array(values, dtype=np.float64)
            found.append((int(number), coordinates))
        except ValueError:
            coordinates = np.zeros(0)
        if len(coordinates) != 4 and (len(coordinates) < 6 or len(coordinates) % 2):
            raise UserError(f"{path}, line {at}: {line[:80]!r} is not `class x y w h` or `class x1 y1 x2 y2 x3 y3 …`")
    return found
