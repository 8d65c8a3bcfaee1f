"""Data formats: `FORMATS` names every one that comes with detbb; `find_format` also finds those outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detbb.config.schema import DataConfig, SplitConfig
from detbb.core.doors import lookup
from detbb.core.errors import UserError
from detbb.data.formats.base import Format, Request
from detbb.data.formats.coco import read_coco
from detbb.data.formats.semantic import read_semantic
from detbb.data.formats.shapes import read_shapes
from detbb.data.formats.voc import read_voc
from detbb.data.formats.yolo import read_yolo
from detbb.structures.annotations import Annotations

FORMATS: dict[str, Format] = {
    "coco": Format(read_coco, ("boxes", "masks", "keypoints", "labels")),
    "voc": Format(read_voc, ("boxes", "labels")),
    "yolo": Format(read_yolo, ("boxes", "masks", "keypoints", "labels"), classes_from="config"),
    "semantic": Format(read_semantic, ("semantic",), classes_from="config"),
    "shapes": Format(read_shapes, ("boxes", "masks", "keypoints", "labels"), classes_from="format", generated=True),
}


def find_format(name: str, *, may_import: bool = True) -> Format:
    """A name in `FORMATS`, or `package.module:name` of a `Format`.

    may_import: False for a name from a file that may be anybody's. Raises: UserError: there is none.
    """
    check, what = (lambda found: isinstance(found, Format)), "detbb.data.formats.Format"
    return lookup(FORMATS, name, key="data format", check=check, what=what, may_import=may_import)


def read_split(
    source: DataConfig,
    split: str,
    name: str,
    *,
    classes: Sequence[str] | None = None,
    strict: bool = True,
    may_write: bool = True,
) -> Annotations | None:
    """The annotations of `data.<name>.<split>`, or None if that split is not configured.

    `classes`: the labels to use, in order, such as a checkpoint's; `val` otherwise takes those of `train`. A file whose
    classes differ from them is an error. Not `strict`: faults that are refused are in `faults` beside those repaired,
    and what has them is left out. Not `may_write`: a set that is generated on first use must be there.
    """
    data_format = find_format(source.format)
    config = {"train": source.train, "val": source.val}.get(split)
    if config is None or not (data_format.generated or config.images or config.annotations):
        return None
    if classes is None and follows_train(source, split):
        train = read_split(source, "train", name, strict=False)
        classes = None if train is None else train.classes
    place = f"data.{name}.{split}"
    try:
        if data_format.classes_from == "config" and source.classes is None:
            raise UserError(f"format {source.format} needs `classes`: a file with the class names, or a list")
        wanted = None if data_format.classes_from == "config" else classes or source.classes
        request = Request(
            *_paths(config, source.format, place, generated=data_format.generated),
            split,
            source,
            None if wanted is None else tuple(wanted),
            exact=classes is not None and source.classes is None,
            strict=strict,
            may_write=may_write,
        )
        annotations = data_format.read(request)
        if strict and classes is not None and annotations.classes != tuple(classes):
            raise UserError(f"classes {list(annotations.classes)} are not those wanted: {list(classes)}")
    except UserError as e:
        raise UserError(f"{place}: {e}") from None
    return annotations


def follows_train(source: DataConfig, split: str) -> bool:
    """Whether the classes of this split are those of `train`."""
    return split == "val" and source.classes is None and find_format(source.format).classes_from == "files"


def _paths(config: SplitConfig, format_name: str, place: str, *, generated: bool) -> tuple[Path, Path]:
    """The folder of images and the annotations. Raises UserError if they have to be there and are not."""
    if generated:
        return Path(config.images or "data/shapes"), Path(config.annotations or "")
    if not config.images or config.annotations is None:
        missing = "annotations" if config.images else "images"
        raise UserError(f"`{missing}` is missing; format {format_name} needs both")
    images, annotations = Path(config.images), Path(config.annotations)
    for key, path, is_there, what in (
        ("images", images, images.is_dir(), "a folder"),
        ("annotations", annotations, annotations.exists(), "there"),
    ):
        if not is_there:
            raise UserError(f"{key}: {path} is not {what} (looked in {path.absolute()}); give {place}.{key}=PATH")
    return images, annotations
