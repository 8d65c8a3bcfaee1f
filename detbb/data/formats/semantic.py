"""Class-index PNG masks to `Annotations`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detbb.core.errors import UserError
from detbb.data.formats.base import Request, annotations_of
from detbb.data.formats.class_names import read_classes
from detbb.data.formats.faults import Rows
from detbb.data.formats.partners import check_partners, readable_images
from detbb.data.images import BadImage, read_index_png, safe_join
from detbb.structures.annotations import Annotations, PackedStrings

IGNORE, UNKNOWN = 255, 254  # labels that are no class


def read_semantic(request: Request) -> Annotations:
    """Every image below `images`, with the PNG of the same name in `annotations`.

    The numbers of the classes are mask values; a class whose value is `ignore_index` is left out. Image ids count the
    sorted files from 1, unusable ones too; category ids are the mask values. Raises UserError for what cannot be
    repaired, if the request is strict.
    """
    masks, faults, ignored = request.annotations, request.faults, (request.source.ignore_index, IGNORE)
    used = {value: name for value, name in read_classes(request.source.classes).items() if value not in ignored}
    if not used or max(used) > 255 or len(used) > UNKNOWN:
        raise UserError(
            f"classes: needs 1 … 254 classes of mask values 0 … 254; got {len(used)}, up to {max(used, default=None)}"
        )
    listed, headers = readable_images(request.images, faults)
    mask_of = {f: Path(f).with_suffix(".png").as_posix() for f in headers}
    stems = [Path(f).with_suffix("").as_posix() for f in listed]
    masked = check_partners(mask_of, masks, ".png", faults, optional=False, stems=stems)
    files = [f for f in headers if f in masked]
    mask_values = np.full(256, UNKNOWN, dtype=np.uint8)
    mask_values[list(used)] = np.arange(len(used))
    mask_values[list(ignored)] = IGNORE
    no_objects = np.zeros(0, dtype=np.int64)
    return annotations_of(
        request.images,
        files,
        np.array([headers[f] for f in files], dtype=np.int32).reshape(-1, 2),
        Rows(no_objects, no_objects, np.zeros((0, 4))),
        faults,
        classes=tuple(used.values()),
        category_ids=np.array(list(used), dtype=np.int64),
        image_ids=np.flatnonzero(np.isin(listed, files)) + 1,
        mask_files=PackedStrings(str(safe_join(masks, mask_of[f], links=faults.allow_links)) for f in files),
        mask_values=mask_values,
    )


def read_mask(annotations: Annotations, index: int) -> np.ndarray:
    """(h, w) uint8 labels of image `index`, 255 to ignore.

    Raises BadImage for a mask that cannot be decoded, is not as large as its image, or holds a value of no class.
    """
    assert annotations.mask_files is not None and annotations.mask_values is not None
    path = annotations.mask_files[index]
    height, width = annotations.sizes[index].tolist()
    values = read_index_png(path, height * width)
    if values.shape != (height, width):
        raise BadImage(path, f"is {values.shape[1]} x {values.shape[0]}, its image {width} x {height}")
    labels = annotations.mask_values[values]
    if (labels == UNKNOWN).any():
        unknown = np.unique(values[labels == UNKNOWN]).tolist()
        raise BadImage(path, f"holds values that no class has: {unknown[:10]}")
    return labels
