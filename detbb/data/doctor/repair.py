"""Repaired copies of data sets: without what is refused, and with what readers repair written down."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

from detbb.config.loading import save_config
from detbb.config.schema import Config, SplitConfig
from detbb.core.console import show
from detbb.core.errors import UserError
from detbb.core.files import write_atomically
from detbb.data.doctor.examine import Report, Split, examine
from detbb.data.doctor.image_files import on_disk
from detbb.data.formats import find_format
from detbb.data.formats.coco_json import coco_dict
from detbb.structures.annotations import Annotations


def check(config: Config, *, json_file: str | Path | None = None, fix: str | Path | None = None) -> Report:
    """Show what is wrong with the data of a configuration, and write repaired copies if `fix` names a new folder.

    Raises: UserError: something is refused, and is still there after the repair.
    """
    limit = config.eval.max_detections
    report = examine(config.data, max_detections=limit)
    print_report(report)
    content = report.to_dict()
    if fix is not None:
        report = examine(write_repaired(config, report, Path(fix)).data, max_detections=limit)
        print_report(report, title=f"repaired copy in {fix}: ")
        content["repaired_copy"] = report.to_dict()
    if json_file is not None:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(Path(json_file), lambda file: file.write(f"{text}\n".encode("utf-8", "backslashreplace")))
    if refused := report.refused():
        raise UserError(f"{len(refused)} kinds of fault are refused; the first: {refused[0]}")
    return report


def print_report(report: Report, *, title: str = "") -> None:
    if report.rows():
        show(report.table())
    for place, found in report.splits.items():
        a = found.annotations
        size = "" if a is None else f": {len(a):,} images, {len(a.labels):,} objects, {len(a.classes)} classes"
        show(f"{title}{place}{size} ({found.origin})")


def write_repaired(config: Config, report: Report, folder: Path) -> Config:
    """A configuration whose data is a copy without faults; it is `folder/config.yaml`.

    Boxes become COCO files that name the images where they are; images and masks of `semantic` are copied.
    Raises: UserError: `folder` is not empty, or a split cannot be read at all.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--fix: {str(folder)!r} is there already; give a new folder, nothing is repaired in place")
    for name, split in report.splits.items():
        refused, a = [fault for fault in split.faults if not fault.repaired], split.annotations
        if a is None and split.faults:
            raise UserError(f"--fix: cannot be repaired: {name}: {split.faults[0].first[0]}")
        if refused and a is not None and (not len(a) or (a.has("boxes") and not len(a.labels))):
            raise UserError(f"--fix: cannot be repaired: {name}: nothing would be left: {refused[0]}")
    repaired = copy.deepcopy(config)
    for found in report.splits.values():
        source, a = repaired.data[found.source], found.annotations
        if a is None or find_format(source.format).generated:  # the copy's user generates it again
            continue
        place = folder / found.source / found.split
        written = _write_semantic(found, a, place) if a.mask_files is not None else _write_coco(found, a, place)
        source.train, source.val = (written, source.val) if found.split == "train" else (source.train, written)
        if a.mask_files is None:
            source.format, source.classes = "coco", list(a.classes)  # the order of the labels
    save_config(repaired, folder / "config.yaml")
    return repaired


def _write_coco(found: Split, a: Annotations, place: Path) -> SplitConfig:
    """`place.json`, with the images that can be used."""
    content = coco_dict(a, masks=True, keypoints=True)
    images = []
    for index, image in enumerate(content["images"]):
        file = on_disk(a.path(index))
        if file is not None and (index not in found.bad or file != a.path(index)):
            images.append({**image, "file_name": file.relative_to(a.root).as_posix()})
    kept = {image["id"] for image in images}
    content |= {"images": images, "annotations": [o for o in content["annotations"] if o["image_id"] in kept]}
    path = place.with_suffix(".json")
    write_atomically(path, lambda file: file.write(json.dumps(content, allow_nan=False).encode()))
    return SplitConfig(images=str(a.root.resolve()), annotations=str(path.resolve()))


def _write_semantic(found: Split, a: Annotations, place: Path) -> SplitConfig:
    """`place/images` and `place/masks`, with the images that can be used."""
    assert a.mask_files is not None
    for index in sorted(set(range(len(a))) - found.bad):
        name = Path(a.file_names[index])
        masks = (Path(a.mask_files[index]), place / "masks" / name.with_suffix(".png"))
        for file, copied in ((a.path(index), place / "images" / name), masks):
            copied.parent.mkdir(parents=True, exist_ok=True)
            if not copied.exists():  # a.jpg and a.png have one mask
                shutil.copyfile(file, copied)  # a link would let edits of the copy reach the original
    return SplitConfig(images=str((place / "images").resolve()), annotations=str((place / "masks").resolve()))
