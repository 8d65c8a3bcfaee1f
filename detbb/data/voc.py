"""Pascal VOC to `Annotations`: an image-set file, an XML file an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from detbb.data.annotations import Annotations, PackedStrings
from detbb.data.faults import Faults, Rows, arrange, choose_classes
from detbb.data.images import image_header, list_images, safe_join
from detbb.errors import UserError


def read_voc(
    images: Path, image_set: Path, *, classes: Sequence[str] | None = None, exact: bool = False
) -> Annotations:
    """The images that `image_set` lists (one name without suffix a line), with the XML files in `Annotations/`.

    `Annotations/` is looked for beside the image set, up to three folders above it, and beside the images. Coordinates
    count from 1 and include both ends: x of the box is `xmin` - 1, its right edge `xmax`. `difficult` objects are
    crowds. Image ids are the line numbers, from 1. Classes are sorted by name unless given; objects of others are left
    out, or with `exact` refused.
    """
    folder = _annotation_folder(images, image_set)
    stems = [line.split()[0] for line in _text(image_set).splitlines() if line.strip()]
    faults = Faults(image_set)
    files = {Path(name).stem: name for name in list_images(images)}
    faults.refuse("name without an image file:", [s for s in stems if s not in files])
    faults.refuse(
        "name listed twice:", sorted({s for s in stems if stems.count(s) > 1}) if len(set(stems)) < len(stems) else []
    )
    faults.finish()
    trees = [_parse(safe_join(folder, f"{stem}.xml")) for stem in stems]
    objects = [(i, o) for i, tree in enumerate(trees) for o in tree.iter("object")]
    names = [(o.findtext("name") or "").strip() for _, o in objects]
    used = choose_classes(sorted(set(names)) if classes is None else classes, None, image_set, exact=False)
    if exact:
        faults.refuse("class that the training split lacks:", sorted(set(names) - set(used)))
    faults.finish()
    sizes = np.array([_size(t, images, files[s]) for s, t in zip(stems, trees, strict=True)], dtype=np.int32).reshape(
        -1, 2
    )
    rows = Rows(
        image=np.array([i for i, _ in objects], dtype=np.int64),
        label=np.array([used.index(n) if n in used else -1 for n in names], dtype=np.int64),
        boxes_xywh=np.array([_box(o, stems[i]) for i, o in objects], dtype=np.float64).reshape(-1, 4),
        area=np.array([]),
        crowd=np.array([(o.findtext("difficult") or "0").strip() == "1" for _, o in objects], dtype=bool),
        ids=np.arange(1, len(objects) + 1),
    )
    rows.area = rows.boxes_xywh[:, 2] * rows.boxes_xywh[:, 3]
    return Annotations(
        root=images,
        classes=used,
        category_ids=np.arange(1, len(used) + 1),
        image_ids=np.arange(1, len(stems) + 1),
        file_names=PackedStrings(files[s] for s in stems),
        sizes=sizes,
        **arrange(rows, sizes, faults),
        faults=faults.finish(),
    )


def _annotation_folder(images: Path, image_set: Path) -> Path:
    places = [image_set.parent, *image_set.resolve().parents[1:4], images.resolve().parent]
    for place in places:
        if (place / "Annotations").is_dir():
            return place / "Annotations"
    raise UserError(f"{image_set}: no folder Annotations/ beside it, up to three folders above, or beside {images}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def _parse(path: Path) -> ElementTree.Element:
    text = _text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can grow without bound
        raise UserError(f"{path}: holds a document type or entities, which VOC files do not")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as e:
        raise UserError(f"{path}: is not XML: {e}") from None


def _size(tree: ElementTree.Element, images: Path, name: str) -> tuple[int, int]:
    try:
        height, width = (int(tree.findtext(f"size/{side}") or 0) for side in ("height", "width"))
    except ValueError:
        height = width = 0
    return (height, width) if 0 < height < 2**31 and 0 < width < 2**31 else image_header(safe_join(images, name))


def _box(element: ElementTree.Element, stem: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (
            float(element.findtext(f"bndbox/{k}") or "") for k in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        raise UserError(f"{stem}.xml: object {element.findtext('name')!r} has no bndbox of four numbers") from None
    return left - 1, top - 1, right - left + 1, bottom - top + 1
