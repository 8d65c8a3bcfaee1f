"""YOLO's txt labels to `Annotations`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from detbb.core.errors import UserError
from detbb.data.formats.base import Request, annotations_of
from detbb.data.formats.class_names import read_classes, read_keypoints
from detbb.data.formats.faults import Faults, Rows
from detbb.data.formats.partners import check_partners, readable_images
from detbb.data.formats.yolo_lines import Line, keypoints_of, readable
from detbb.data.images import read_text, safe_join
from detbb.structures.annotations import Annotations, Segments


def read_yolo(request: Request) -> Annotations:
    """Every image below `images`; its objects are in the txt file of the same name in `annotations`, if there is one.

    A line is `class x y w h` (centre and size, in parts of the image), `class x1 y1 x2 y2 …` (a polygon), or a box and
    keypoints; `yolo_lines` tells them apart. Image ids count the sorted files from 1, unusable ones too; category ids
    are YOLO's class numbers + 1. Raises UserError for what cannot be repaired, if the request is strict.
    """
    labels, faults = request.annotations, request.faults
    classes = read_classes(request.source.classes)
    keypoints = read_keypoints(request.source.keypoints, request.source.classes)
    if not labels.is_dir():
        raise UserError(f"{labels} is not a folder")
    listed, headers = readable_images(request.images, faults)
    files = list(headers)
    sizes = np.array([headers[f] for f in files], dtype=np.int32).reshape(-1, 2)
    partner = {name: Path(name).with_suffix(".txt").as_posix() for name in listed}
    labelled = check_partners(partner, labels, ".txt", faults, optional=True)
    links = faults.allow_links
    texts = {i: safe_join(labels, partner[f], links=links) for i, f in enumerate(files) if f in labelled}
    points = None if keypoints is None else len(keypoints.names)
    lines = readable(list(_lines(texts, list(classes), faults)), sizes, points, faults)
    shapes = [_shape(line, sizes[line.image].tolist(), points or 0) for line in lines]
    polygons = [polygon for _, _, polygon in shapes]
    rows = Rows(
        image=np.array([line.image for line in lines], dtype=np.int64),
        label=np.array([line.label for line in lines], dtype=np.int64),
        boxes_xywh=np.array([box for box, _, _ in shapes], dtype=np.float64).reshape(-1, 4),
        area=np.nan_to_num(np.array([area for _, area, _ in shapes], dtype=np.float64)).clip(min=0),
        segments=Segments([(polygons, None)]) if any(polygons) else None,
    )
    fields = {}
    if keypoints is not None and keypoints.names:
        given = [keypoints_of(line, len(keypoints.names), sizes[line.image]) for line in lines]
        rows.keypoints = np.array(given, dtype=np.float32).reshape(-1, len(keypoints.names), 3)
        fields = {"keypoint_names": keypoints.names, "flip_pairs": keypoints.flip_pairs}
    return annotations_of(
        request.images,
        files,
        sizes,
        rows,
        faults,
        classes=tuple(classes.values()),
        category_ids=np.array(list(classes), dtype=np.int64) + 1,
        image_ids=np.flatnonzero([name in headers for name in listed]) + 1,
        **fields,
    )


def _shape(line: Line, hw: Sequence[int], points: int) -> tuple[tuple[float, ...], float, list[list[float]]]:
    """Box (x, y, w, h) in pixels, area, and polygons of an object."""
    height, width = hw
    values = line.values[:4] if points else line.values
    xy = values.reshape(-1, 2) * (width, height)
    if len(xy) == 2:
        centre, size = xy
        return (*(centre - size / 2), *size), float(size.prod()), []
    return (*xy.min(0), *np.ptp(xy, 0)), _area(xy), [xy.ravel().tolist()]


def _area(points: np.ndarray) -> float:
    """Of a polygon that does not cross itself (Gauss's formula)."""
    x, y = (points - points[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _lines(texts: Mapping[int, Path], numbers: Sequence[int], faults: Faults) -> Iterator[Line]:
    """The lines of all label files (by image) that are numbers and name a class."""
    wrong, unknown = [], []
    for image, path in texts.items():
        try:
            text = read_text(path)
        except UserError as e:
            wrong.append(str(e))
            continue
        for at, words in enumerate(map(str.split, text.splitlines()), start=1):
            where = f"{path}, line {at}: {' '.join(words)[:80]!r}"
            try:
                number, *values = map(float, words) if words else (None,)
            except ValueError:
                wrong.append(where)
                continue
            if number in numbers:  # also as 0.0, which is how tables of floats are written
                yield Line(where, path.name, image, at, numbers.index(number), np.array(values))
            elif number is not None:
                unknown.append(f"{where}: class {number:g}")
    faults.refuse("line that is not a class number and coordinates:", wrong)
    faults.refuse(f"line of a class that is none of {len(numbers)}:", unknown)
