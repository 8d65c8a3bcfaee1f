"""Pascal VOC to `Annotations`: an image-set file, an XML file an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from detbb.core.errors import UserError
from detbb.data.formats.base import Request, annotations_of
from detbb.data.formats.faults import Faults, Rows
from detbb.data.images import list_images, read_text, readable_headers, safe_join
from detbb.structures.annotations import Annotations


def read_voc(request: Request) -> Annotations:
    """The images that the image set lists (one name without suffix a line), with the XML files in `Annotations/`.

    `Annotations/` is looked for beside the image set, up to three folders above it, and beside the images. Coordinates
    count from 1 and include both ends: x of the box is `xmin` - 1, its right edge `xmax`. `difficult` objects are
    crowds. Image ids are the line numbers, from 1. Classes are sorted by name unless given. Raises UserError for what
    cannot be repaired, unless `faults` is not strict.
    """
    images, faults = request.images, request.faults
    folder = _annotation_folder(images, request.annotations)
    stems, files = _listed(images, request.annotations, faults)
    trees, wrong = _parse_all(folder, stems)
    faults.refuse("annotation file that cannot be used:", wrong)
    sizes, bad = _sizes(trees, images, files)
    faults.bad_images("image of unknown size that cannot be read", bad)
    used = [stem for stem in trees if stem in sizes]
    objects = [(i, o) for i, stem in enumerate(used) for o in trees[stem].iter("object")]
    boxes = [_box(o) for _, o in objects]
    bare = [f"{used[i]}.xml ({_name(o)!r})" for (i, o), box in zip(objects, boxes, strict=True) if box is None]
    faults.refuse("object without a bndbox of four numbers:", bare)
    objects = [o for o, box in zip(objects, boxes, strict=True) if box is not None]
    names = [_name(o) for _, o in objects]
    classes = request.choose_classes(sorted(set(names)))
    rows = Rows(
        image=np.array([i for i, _ in objects], dtype=np.int64),
        label=np.array([classes.index(n) if n in classes else -1 for n in names], dtype=np.int64),
        boxes_xywh=np.array([box for box in boxes if box is not None], dtype=np.float64).reshape(-1, 4),
        crowd=np.array([(o.findtext("difficult") or "0").strip() == "1" for _, o in objects], dtype=bool),
    )
    image_sizes = np.array([sizes[stem] for stem in used], dtype=np.int32).reshape(-1, 2)
    image_ids = np.array([stems[stem] for stem in used], dtype=np.int64)
    return annotations_of(
        images, [files[s] for s in used], image_sizes, rows, faults, classes=classes, image_ids=image_ids
    )


def _listed(images: Path, image_set: Path, faults: Faults) -> tuple[dict[str, int], dict[str, str]]:
    """The images of the set with their line numbers, and the files by name without suffix."""
    names = list_images(images)
    files = {Path(name).stem: name for name in names}
    lines = [line.strip() for line in read_text(image_set).splitlines() if line.strip()]
    lines = [line if line in files else line.split()[0] for line in lines]  # a name, or a name and a flag
    several = [stem for stem, count in Counter(Path(name).stem for name in names).items() if count > 1]
    faults.refuse("name that several image files have:", [s for s in several if s in lines])
    faults.refuse("name without an image file:", [s for s in lines if s not in files])
    faults.refuse("name listed twice:", sorted(name for name, count in Counter(lines).items() if count > 1))
    numbers = {stem: number for number, stem in reversed(list(enumerate(lines, start=1))) if stem in files}
    return dict(sorted(numbers.items(), key=lambda item: item[1])), files


def _annotation_folder(images: Path, image_set: Path) -> Path:
    places = [image_set.parent, *image_set.resolve().parents[1:4], images.resolve().parent]
    for place in places:
        if (place / "Annotations").is_dir():
            return place / "Annotations"
    raise UserError(f"{image_set}: no folder Annotations/ beside it, up to three folders above, or beside {images}")


def _parse_all(folder: Path, stems: Iterable[str]) -> tuple[dict[str, ElementTree.Element], list[str]]:
    """The XML of each image that has one which can be used, and what is wrong with the others."""
    trees, wrong = {}, []
    for stem in stems:
        try:
            trees[stem] = _parse(safe_join(folder, f"{stem}.xml"))
        except UserError as error:
            wrong.append(str(error))
    return trees, wrong


def _parse(path: Path) -> ElementTree.Element:
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can grow without bound
        raise UserError(f"{path}: holds a document type or entities, which VOC files do not")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as e:
        raise UserError(f"{path}: is not XML: {e}") from None


def _sizes(
    trees: dict[str, ElementTree.Element], images: Path, files: dict[str, str]
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(height, width) of each image, from its file where the XML has none; and the files that cannot be read."""
    sizes = {stem: size for stem, tree in trees.items() if (size := _size(tree)) is not None}
    headers, bad = readable_headers(images, (files[stem] for stem in trees if stem not in sizes))
    for stem in trees:
        if stem not in sizes and files[stem] in headers:
            sizes[stem] = headers[files[stem]]
    return sizes, bad


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    try:
        height, width = (int(tree.findtext(f"size/{side}") or 0) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if 0 < height < 2**31 and 0 < width < 2**31 else None


def _name(element: ElementTree.Element) -> str:
    return (element.findtext("name") or "").strip()


def _box(element: ElementTree.Element) -> tuple[float, float, float, float] | None:
    """x, y, width, height; None where the object has no box of four numbers."""
    try:
        left, top, right, bottom = (
            float(element.findtext(f"bndbox/{k}") or "") for k in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    return left - 1, top - 1, right - left + 1, bottom - top + 1
