"""Pascal VOC to `Annotations`: an image-set file, an XML file an image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from detbb.core.errors import UserError
from detbb.data.formats.base import Request, annotations_of
from detbb.data.formats.faults import Faults, Rows
from detbb.data.formats.partners import check_partners, listed_images
from detbb.data.images import SUFFIXES, read_bytes, read_text, readable_headers, safe_join
from detbb.structures.annotations import Annotations


def read_voc(request: Request) -> Annotations:
    """The images that the image set lists (one name without suffix a line), with the XML files in `Annotations/`.

    `Annotations/` is looked for beside the image set, up to three folders above it, and beside the images. Coordinates
    count from 1 and include both ends: x of the box is `xmin` - 1, its right edge `xmax`. `difficult` objects are
    crowds. Image ids are the line numbers, from 1. Classes are sorted by name unless given. Raises UserError for what
    cannot be repaired, if the request is strict.
    """
    images, faults = request.images, request.faults
    folder = _annotation_folder(images, request.annotations)
    stems, files = _listed(images, request.annotations, faults)
    partners = {stem: f"{stem}.xml" for stem in stems}
    found = check_partners(partners, folder, ".xml", faults, optional=False, stems=files)
    trees, wrong = _parse_all(folder, [stem for stem in stems if stem in found], links=faults.allow_links)
    faults.refuse("annotation file that cannot be used:", wrong)
    sizes = {stem: size for stem, tree in trees.items() if (size := _size(tree)) is not None}
    unsized = [files[stem] for stem in trees if stem not in sizes]
    headers, bad = readable_headers(images, unsized, links=faults.allow_links)
    faults.bad_images("image of unknown size that cannot be read", bad)
    sizes |= {stem: headers[files[stem]] for stem in trees if files[stem] in headers}
    used = [stem for stem in trees if stem in sizes]
    objects = [(i, o, _box(o)) for i, stem in enumerate(used) for o in trees[stem].iter("object")]
    bare = [f"{used[i]}.xml ({_name(o)!r})" for i, o, box in objects if box is None]
    faults.refuse("object without a bndbox of four numbers:", bare)
    objects = [(i, o, box) for i, o, box in objects if box is not None]
    names = [_name(o) for _, o, _ in objects]
    classes = request.choose_classes(sorted(set(names)))
    rows = Rows(
        image=np.array([i for i, _, _ in objects], dtype=np.int64),
        label=np.array([classes.index(n) if n in classes else -1 for n in names], dtype=np.int64),
        boxes_xywh=np.array([box for _, _, box in objects], dtype=np.float64).reshape(-1, 4),
        crowd=np.array([(o.findtext("difficult") or "0").strip() == "1" for _, o, _ in objects], dtype=bool),
    )
    image_sizes = np.array([sizes[stem] for stem in used], dtype=np.int32).reshape(-1, 2)
    image_ids = np.array([stems[stem] for stem in used], dtype=np.int64)
    return annotations_of(
        images, [files[s] for s in used], image_sizes, rows, faults, classes=classes, image_ids=image_ids
    )


def _listed(images: Path, image_set: Path, faults: Faults) -> tuple[dict[str, int], dict[str, str]]:
    """The images of the set with their line numbers, and the files by name without suffix."""
    names = listed_images(images, faults)
    files = {Path(name).stem: name for name in names}
    lines = [line.strip() for line in read_text(image_set).splitlines() if line.strip()]
    lines = [line if line in files else _stem(line, files) for line in lines]
    several = [stem for stem, count in Counter(Path(name).stem for name in names).items() if count > 1]
    faults.refuse("name that several image files have:", [s for s in several if s in lines])
    lost, cases = [s for s in lines if s not in files], {stem.casefold(): stem for stem in files}
    lost = [f"{s} (there is {cases[s.casefold()]})" if s.casefold() in cases else s for s in lost]
    where = f" (of {len(lines)}; looked in {images.resolve()})" if len(lost) == len(lines) else ""
    faults.refuse(f"name without an image file{where}:", lost)
    faults.refuse("name listed twice:", sorted(name for name, count in Counter(lines).items() if count > 1))
    numbers = {stem: number for number, stem in reversed(list(enumerate(lines, start=1))) if stem in files}
    return dict(sorted(numbers.items(), key=lambda item: item[1])), files


def _stem(line: str, files: Mapping[str, str]) -> str:
    """The image that a line names: alone, with a flag after it, with a folder before it or with a suffix."""
    for text in (line, line.split()[0]):
        path = PurePosixPath(text.replace("\\", "/"))
        for stem in (text, path.name, path.stem):
            if stem in files and (stem != path.stem or not path.suffix or path.suffix.lower() in SUFFIXES):
                return stem
    return line.split()[0]


def _annotation_folder(images: Path, image_set: Path) -> Path:
    places = [image_set.parent, *image_set.resolve().parents[1:4], images.resolve().parent]
    for place in places:
        if (place / "Annotations").is_dir():
            return place / "Annotations"
    raise UserError(f"{image_set}: no folder Annotations/ beside it, up to three folders above, or beside {images}")


def _parse_all(folder: Path, stems: Iterable[str], *, links: bool) -> tuple[dict[str, ElementTree.Element], list[str]]:
    """The XML of each image that has one which can be used, and what is wrong with the others."""
    trees, wrong = {}, []
    for stem in stems:
        try:
            trees[stem] = _parse(safe_join(folder, f"{stem}.xml", links=links))
        except UserError as error:
            wrong.append(str(error))
    return trees, wrong


def _parse(path: Path) -> ElementTree.Element:
    """The document as its own declaration says it is written; tags without namespaces, in lower case."""
    data = read_bytes(path)
    declared = re.search(rb"""^(?:\xef\xbb\xbf)?<\?xml[^>]*?encoding=["']([\w.:-]+)""", data)
    try:
        # expat itself knows a few encodings only, and Python all; UTF-16 has a mark that says so
        text = data.decode(
            "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else declared[1].decode() if declared else "utf-8-sig"
        )
        text = re.sub(r"^\ufeff?<\?xml.*?\?>", "", text, flags=re.DOTALL)
        if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can grow without bound
            raise UserError(f"{path}: holds a document type or entities, which VOC files do not")
        tree = ElementTree.fromstring(text)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: is not {e.encoding} text, as it should be: {e.reason} at byte {e.start}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as e:
        raise UserError(f"{path}: is not XML: {e}") from None
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2].lower()
    if tree.tag != "annotation" and tree.find(".//object") is None:
        raise UserError(f"{path}: its root is <{tree.tag}> without any <object>; VOC's is <annotation>")
    return tree


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width) of the image; None where the XML does not say it."""
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
