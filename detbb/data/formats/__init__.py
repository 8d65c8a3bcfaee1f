"""Data formats: `FORMATS` names every one that comes with detbb; `find_format` also finds those outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from detbb.config.schema import DataConfig, SplitConfig
from detbb.core.doors import lookup, refuse_import
from detbb.core.errors import UserError
from detbb.data.formats.base import Format, Request
from detbb.data.formats.class_names import read_classes, read_keypoints
from detbb.data.formats.coco import read_coco
from detbb.data.formats.faults import Faults
from detbb.data.formats.semantic import read_semantic
from detbb.data.formats.shapes import generate_shapes
from detbb.data.formats.voc import read_voc
from detbb.data.formats.yolo import read_yolo
from detbb.structures.annotations import Annotations


def _coco(r: Request) -> Annotations:
    return read_coco(r.images, r.annotations, classes=r.classes, exact=r.exact, may_lack=r.may_lack, faults=r.faults)


def _shapes(r: Request) -> Annotations:
    config = r.source.train if r.split == "train" else r.source.val
    folder = generate_shapes(r.images, r.split, config.size if config is not None else None, may_write=r.may_write)
    return read_coco(folder / "images", folder / "annotations.json", classes=r.classes, exact=r.exact)


def _yolo(r: Request) -> Annotations:
    classes, keypoints = read_classes(r.source.classes), read_keypoints(r.source.keypoints, r.source.classes)
    return read_yolo(r.images, r.annotations, classes, keypoints=keypoints, faults=r.faults)


def _semantic(r: Request) -> Annotations:
    classes = read_classes(r.source.classes)
    return read_semantic(r.images, r.annotations, classes, ignore_index=r.source.ignore_index, faults=r.faults)


FORMATS: dict[str, Format] = {
    "coco": Format(_coco, ("boxes", "masks", "keypoints", "labels")),
    "voc": Format(read_voc, ("boxes", "labels")),
    "yolo": Format(_yolo, ("boxes", "masks", "keypoints", "labels"), classes_from="config"),
    "semantic": Format(_semantic, ("semantic",), classes_from="config"),
    "shapes": Format(_shapes, ("boxes", "masks", "keypoints", "labels"), classes_from="format", generated=True),
}


def find_format(name: str) -> Format:
    """A name in `FORMATS`, or `package.module:name` of a `Format`. Raises UserError if there is none."""
    return lookup(
        FORMATS,
        name,
        key="data format",
        check=lambda found: isinstance(found, Format),
        what="detbb.data.formats.Format",
    )


def known_format(name: str) -> Format:
    """`find_format` for what a file names that may be anybody's: imports nothing."""
    refuse_import(name, key="data format")
    return find_format(name)


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
        classes = train.classes if train is not None else None
    place = f"data.{name}.{split}"
    try:
        request = _request(source, split, classes, place, strict=strict)
        annotations = data_format.read(replace(request, may_write=may_write))
        if strict and classes is not None and annotations.classes != tuple(classes):
            raise UserError(f"classes {list(annotations.classes)} are not those wanted: {list(classes)}")
    except UserError as e:
        raise UserError(f"{place}: {e}") from None
    return annotations


def follows_train(source: DataConfig, split: str) -> bool:
    """Whether the classes of this split are those of `train`."""
    return split == "val" and source.classes is None and find_format(source.format).classes_from == "files"


def _request(source: DataConfig, split: str, classes: Sequence[str] | None, place: str, *, strict: bool) -> Request:
    config = source.train if split == "train" else source.val
    assert config is not None
    exact = classes is not None and source.classes is None
    data_format = find_format(source.format)
    if data_format.classes_from == "config":
        if source.classes is None:
            raise UserError(f"format {source.format} needs `classes`: a file with the class names, or a list")
        classes = None
    else:
        classes = classes or source.classes
    if data_format.generated:
        config = SplitConfig(images=config.images or "data/shapes", annotations=config.annotations or "")
    if not config.images or config.annotations is None:
        missing = "annotations" if config.images else "images"
        raise UserError(f"`{missing}` is missing; format {source.format} needs both")
    images, annotations = Path(config.images), Path(config.annotations)
    if not data_format.generated:
        for key, path, there in (
            ("images", images, images.is_dir()),
            ("annotations", annotations, annotations.exists()),
        ):
            if not there:
                what = "a folder" if key == "images" else "there"
                raise UserError(f"{key}: {path} is not {what} (looked in {path.absolute()}); give {place}.{key}=PATH")
    return Request(
        images,
        annotations,
        split,
        source,
        Faults(
            annotations,
            strict=strict,
            skip_bad_images=source.on_bad_image == "skip",
            allow_links=source.allow_links,
        ),
        None if classes is None else tuple(classes),
        exact,
    )
