"""Repaired copies of data sets: without what is refused, and with what readers repair written down."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from detbb.config.loading import save_config
from detbb.config.schema import Config, SplitConfig
from detbb.core.errors import UserError
from detbb.core.files import write_atomically
from detbb.data.doctor.examine import Report, Split, examine
from detbb.data.doctor.image_files import on_disk
from detbb.structures.annotations import Annotations


def check(config: Config, *, json_file: str | Path | None = None, fix: str | Path | None = None) -> Report:
    """Show what is wrong with the data of a configuration, and write repaired copies if `fix` names a new folder.

    Raises: UserError: something is refused, and is still there after the repair.
    """
    report = examine(config.data)
    print_report(report)
    content = report.to_dict()
    if fix is not None:
        report = examine(write_repaired(config, report, Path(fix)).data)
        print_report(report, title=f"repaired copy in {fix}: ")
        content["repaired_copy"] = report.to_dict()
    if json_file is not None:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(Path(json_file), lambda file: file.write(f"{text}\n".encode("utf-8", "backslashreplace")))
    if refused := report.refused():
        raise UserError(f"{len(refused)} kinds of fault are refused; the first: {refused[0]}")
    return report


def print_report(report: Report, *, title: str = "") -> None:
    console = Console() if os.isatty(1) else Console(width=160)
    if report.rows():
        console.print(report.table())
    for place, found in report.splits.items():
        a = found.annotations
        size = "" if a is None else f": {len(a):,} images, {len(a.labels):,} objects, {len(a.classes)} classes"
        console.print(f"{title}{place}{size} ({found.origin})", highlight=False, markup=False, soft_wrap=True)


def write_repaired(config: Config, report: Report, folder: Path) -> Config:
    """A configuration whose data is a copy without faults; it is `folder/config.yaml`.

    Boxes become COCO files that name the images where they are; images and masks of `semantic` are copied.
    Raises: UserError: `folder` is not empty, or a split cannot be read at all.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--fix: {str(folder)!r} is there already; give a new folder, nothing is repaired in place")
    if unread := [f"{p}: {s.faults[0].first[0]}" for p, s in report.splits.items() if s.annotations is None]:
        raise UserError(f"--fix: cannot be repaired: {unread[0]}")
    repaired = copy.deepcopy(config)
    for found in report.splits.values():
        source, a = repaired.data[found.source], found.annotations
        if source.format == "shapes" or a is None:  # generated anew where it is not there
            continue
        place = folder / found.source / found.split
        written = _write_semantic(found, a, place) if a.mask_files is not None else _write_coco(found, a, place)
        source.train, source.val = (written, source.val) if found.split == "train" else (source.train, written)
        if a.mask_files is None:
            source.classes = list(a.classes)  # the order of the labels
    for found in report.splits.values():
        if repaired.data[found.source].format in ("voc", "yolo"):
            repaired.data[found.source].format = "coco"
    save_config(repaired, folder / "config.yaml")
    return repaired


def _write_coco(found: Split, a: Annotations, place: Path) -> SplitConfig:
    """`place.json`, with the images that can be used."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(len(a)):
        file = on_disk(a.path(index))
        if file is None or (index in found.bad and file == a.path(index)):
            continue
        height, width = a.sizes[index].tolist()
        image_id = int(a.image_ids[index])
        name = file.relative_to(a.root).as_posix()
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        objects += [{**_object(a, row), "image_id": image_id} for row in range(a.first[index], a.first[index + 1])]
    points = {"keypoints": list(a.keypoint_names)} if a.keypoint_names else {}
    categories = [{"id": i, "name": n, **points} for i, n in zip(a.category_ids.tolist(), a.classes, strict=True)]
    content = {"images": images, "annotations": objects, "categories": categories}
    path = place.with_suffix(".json")
    write_atomically(path, lambda file: file.write(json.dumps(content, allow_nan=False).encode()))
    return SplitConfig(images=str(a.root.resolve()), annotations=str(path.resolve()))


def _object(a: Annotations, row: int) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": int(a.object_ids[row]),
        "category_id": int(a.category_ids[a.labels[row]]),
        "bbox": a.boxes_xywh[row].tolist(),
        "area": float(a.areas[row]),
        "iscrowd": int(a.crowd[row]),
    }
    if a.segments is not None:
        made["segmentation"] = a.segments.coco(row)
    if a.keypoints is not None:
        made["keypoints"] = a.keypoints[row].ravel().tolist()
        made["num_keypoints"] = int((a.keypoints[row, :, 2] > 0).sum())
    return made


def _write_semantic(found: Split, a: Annotations, place: Path) -> SplitConfig:
    """`place/images` and `place/masks`, with the images that can be used."""
    assert a.mask_files is not None
    for index in sorted(set(range(len(a))) - found.bad):
        name = Path(a.file_names[index])
        for file, copied in (
            (a.path(index), place / "images" / name),
            (Path(a.mask_files[index]), place / "masks" / name.with_suffix(".png")),
        ):
            copied.parent.mkdir(parents=True, exist_ok=True)
            if not copied.exists():  # a.jpg and a.png have one mask
                shutil.copyfile(file, copied)  # a link would let edits of the copy reach the original
    return SplitConfig(images=str((place / "images").resolve()), annotations=str((place / "masks").resolve()))
