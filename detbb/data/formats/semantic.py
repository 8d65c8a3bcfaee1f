"""Class-index PNG masks to `Annotations`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from detbb.core.errors import UserError
from detbb.data.formats.faults import Faults
from detbb.data.formats.partners import check_partners, listed_images
from detbb.data.images import BadImage, read_index_png, readable_headers, safe_join
from detbb.structures.annotations import Annotations, PackedStrings

IGNORE, UNKNOWN = 255, 254  # labels that are no class


def read_semantic(
    images: Path,
    masks: Path,
    classes: Mapping[int, str],
    *,
    ignore_index: int = IGNORE,
    faults: Faults | None = None,
) -> Annotations:
    """Every image below `images`, with the PNG of the same name below `masks`.

    `classes` maps mask values to names, with or without gaps; a class whose value is `ignore_index` is left out. Image
    ids count the sorted files from 1, unusable ones too; category ids are the mask values. Raises UserError for what
    cannot be repaired, unless `faults` is not strict.
    """
    used = {value: name for value, name in classes.items() if value not in (ignore_index, IGNORE)}
    if not used or max(used) > 255 or len(used) > UNKNOWN:
        raise UserError(
            f"classes: needs 1 … 254 classes of mask values 0 … 254; got {len(used)}, up to {max(used, default=None)}"
        )
    faults = faults or Faults(masks)
    listed = listed_images(images, faults)
    headers, bad = readable_headers(images, listed, links=faults.allow_links)
    faults.bad_images("image that cannot be read", bad)
    mask_of = {f: Path(f).with_suffix(".png").as_posix() for f in headers}
    stems = [Path(f).with_suffix("").as_posix() for f in listed]
    masked = check_partners(mask_of, masks, ".png", faults, optional=False, stems=stems)
    files = [f for f in headers if f in masked]
    mask_values = np.full(256, UNKNOWN, dtype=np.uint8)
    mask_values[list(used)] = np.arange(len(used))
    mask_values[[i for i in (ignore_index, IGNORE) if 0 <= i <= 255]] = IGNORE
    return Annotations(
        root=images,
        classes=tuple(used.values()),
        category_ids=np.array(list(used), dtype=np.int64),
        image_ids=np.flatnonzero(np.isin(listed, files)) + 1,
        file_names=PackedStrings(files),
        sizes=np.array([headers[f] for f in files], dtype=np.int32).reshape(-1, 2),
        first=np.zeros(len(files) + 1, dtype=np.int64),
        boxes_xywh=np.zeros((0, 4)),
        labels=np.zeros(0, dtype=np.int32),
        crowd=np.zeros(0, dtype=bool),
        areas=np.zeros(0),
        object_ids=np.zeros(0, dtype=np.int64),
        mask_files=PackedStrings(str(safe_join(masks, mask_of[f], links=faults.allow_links)) for f in files),
        mask_values=mask_values,
        faults=faults.finish(),
        notes=tuple(faults.notes),
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
