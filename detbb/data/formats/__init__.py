"""Data sources: readers into one array form, augmentation, and loaders in step order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detbb.config.schema import DataConfig, SplitConfig
from detbb.core.errors import UserError
from detbb.data.formats.class_names import read_classes
from detbb.data.formats.coco import read_coco
from detbb.data.formats.faults import Faults
from detbb.data.formats.semantic import read_semantic
from detbb.data.formats.shapes import generate_shapes
from detbb.data.formats.voc import read_voc
from detbb.data.formats.yolo import read_yolo
from detbb.structures.annotations import Annotations


def read_split(
    source: DataConfig, split: str, name: str, *, classes: Sequence[str] | None = None, strict: bool = True
) -> Annotations | None:
    """The annotations of `data.<name>.<split>`, or None if that split is not configured.

    `classes`: the labels to use, in order, such as a checkpoint's; `val` otherwise takes those of `train`. A file whose
    classes differ from them is an error. Not `strict`: faults that are refused are in `faults` beside those repaired,
    and what has them is left out.
    """
    place = f"data.{name}.{split}"
    config = {"train": source.train, "val": source.val}.get(split)
    if config is None or (source.format != "shapes" and not config.images and not config.annotations):
        return None
    exact = source.classes is None
    if classes is None and exact and split == "val" and source.format in ("coco", "voc"):
        train = read_split(source, "train", name, strict=False)
        classes = train.classes if train is not None else None
    try:
        annotations = _read(source, config, split, classes, strict=strict)
        if strict and classes is not None and annotations.classes != tuple(classes):
            raise UserError(f"classes {list(annotations.classes)} are not those wanted: {list(classes)}")
    except UserError as e:
        raise UserError(f"{place}: {e}") from None
    return annotations


def _read(
    source: DataConfig, config: SplitConfig, split: str, classes: Sequence[str] | None, *, strict: bool
) -> Annotations:
    exact = classes is not None and source.classes is None
    classes = classes or source.classes if source.format in ("coco", "voc", "shapes") else None
    if source.format == "shapes":
        folder = generate_shapes(Path(config.images or "data/shapes"), split, config.size)
        return read_coco(folder / "images", folder / "annotations.json", classes=classes, exact=exact)
    if not config.images or not config.annotations:
        raise UserError(
            f"`{'annotations' if config.images else 'images'}` is missing; format {source.format} needs both"
        )
    images, annotations = Path(config.images), Path(config.annotations)
    if not images.is_dir():
        raise UserError(f"images: {images} is not a folder")
    faults = Faults(annotations, strict=strict, skip_bad_images=source.on_bad_image == "skip")
    if source.format == "coco":
        return read_coco(images, annotations, classes=classes, exact=exact, faults=faults)
    if source.format == "voc":
        found = read_voc(images, annotations, classes=classes, exact=exact, faults=faults)
        unused = np.flatnonzero(np.bincount(found.labels, minlength=len(found.classes)) == 0).tolist()
        if unused and split == "train" and source.classes is not None:
            raise UserError(f"classes: {found.classes[unused[0]]!r} has no object in {annotations}")
        return found
    if source.classes is None:
        raise UserError(f"format {source.format} needs `classes`: a file with the class names, or a list")
    names = read_classes(source.classes)
    if source.format == "yolo":
        return read_yolo(images, annotations, names, faults=faults)
    return read_semantic(images, annotations, names, ignore_index=source.ignore_index, faults=faults)
