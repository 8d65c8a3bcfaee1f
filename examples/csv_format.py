"""A data format of one's own: boxes in a CSV file, one object a row: `file,class,x1,y1,x2,y2` in pixels."""

import csv

import numpy as np

from detbb.data.formats.base import Format, Request, annotations_of
from detbb.data.formats.faults import Rows
from detbb.data.images import readable_headers
from detbb.structures.annotations import Annotations


def read(request: Request) -> Annotations:
    """The images that the file names, with their boxes."""
    with open(request.annotations, newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    headers, unreadable = readable_headers(request.images, dict.fromkeys(row["file"] for row in table))
    request.faults.bad_images("image that cannot be read", unreadable)
    table = [row for row in table if row["file"] in headers]
    files = list(headers)  # those that can be read: name -> (height, width)
    classes = request.choose_classes(sorted({row["class"] for row in table}))
    corners = np.array([[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in table]).reshape(-1, 4)
    rows = Rows(
        image=np.array([files.index(row["file"]) for row in table], dtype=np.int64),
        label=np.array([classes.index(c) if (c := row["class"]) in classes else -1 for row in table], dtype=np.int64),
        boxes_xywh=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
    )
    sizes = np.array(list(headers.values()), dtype=np.int32).reshape(-1, 2)
    return annotations_of(request.images, files, sizes, rows, request.faults, classes=classes)


CSV = Format(read, gives=("boxes", "labels"))
