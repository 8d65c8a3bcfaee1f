"""Faults to plant into data sets and files, each with its documented outcome; the tables of docs/reliability.md.

`python tests/support/planted.py` writes the tables.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import importlib
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import threading
import time
import unicodedata
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from detbb.config.schema import DataConfig, SplitConfig

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
NAN, INF = float("nan"), float("inf")


class DataSet:
    """A sound COCO data set of three images for training and two for validation, to be broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: dict[str, Any] = {}
        self.json = {"train": _coco([7, 12, 900], 1), "val": _coco([3, 4], 50)}
        for split, content in self.json.items():
            self.images(split).mkdir(parents=True)
            for image in content["images"]:
                self.draw(split, image["file_name"], seed=image["id"])

    def images(self, split: str = "train") -> Path:
        return self.folder / split

    def file(self, split: str = "train", index: int = 0) -> Path:
        return self.images(split) / self.json[split]["images"][index]["file_name"]

    def draw(self, split: str, name: str, *, seed: int = 0, size: tuple[int, int] = (40, 30), **options: Any) -> Path:
        """An image of noise with (width, height) `size`."""
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(self.images(split) / name, **options)
        return self.images(split) / name

    def set(self, path: str, value: Any) -> None:
        """Put `value` at `train/annotations/0/bbox` or the like; without a value, take it away."""
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
        at: Any = self.json
        for part in parents:
            at = at[part]
        if value is ...:
            del at[last]
        else:
            at[last] = value

    def again(self, path: str, **changes: Any) -> None:
        """Append a changed copy of the first entry of a list."""
        at: Any = self.json
        for part in path.split("/"):
            at = at[part]
        at.append({**at[0], **changes})

    def source(self) -> DataConfig:
        """The configuration of the data as it is now, written to disk."""
        splits = {}
        for split, content in self.json.items():
            path = self.folder / f"{split}.json"
            if content is not None:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
            splits[split] = SplitConfig(images=str(self.images(split)), annotations=str(path))
        return DataConfig(**{"image_size": [32, 64], **splits, **self.options})


def _coco(image_ids: list[int], first: int) -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in image_ids]
    objects = [
        {
            "id": first + 2 * k + n,
            "image_id": i,
            "category_id": 1 + n,
            "bbox": [2 + n, 3, 12, 14],
            "area": 168,
            "iscrowd": 0,
            "segmentation": [[2 + n, 3, 14 + n, 3, 14 + n, 17]],
            "keypoints": [4, 5, 2, 6, 7, 1],
        }
        for k, i in enumerate(image_ids)
        for n in (0, 1)
    ]
    categories = [{"id": i, "name": n, "keypoints": ["left", "right"]} for i, n in ((1, "car"), (2, "zebra"))]
    return {"images": images, "annotations": objects, "categories": categories}


def voc(
    d: DataSet, xml: str | None = "", names: str = "7 12 900", root: str = "annotation", encoding: str = ""
) -> None:
    """The training split as VOC; `xml` is the object of image 7, all files have this root and encoding."""
    (d.folder / "Annotations").mkdir()
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>14</xmax><ymax>17</ymax></bndbox>"
    first = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding else ""
    for name in (7, 12, 900):
        inner = f"<object><name>car</name>{box}</object>{xml if name == 7 else ''}"
        content = f"{first}<{root}>{inner}</{root.split()[0]}>"
        if name != 7 or xml is not None:
            (d.folder / "Annotations" / f"{name}.xml").write_bytes(content.encode(encoding or "utf-8"))
    (d.folder / "train.txt").write_text("\n".join(names.split()))
    d.options |= {
        "format": "voc",
        "train": SplitConfig(images=str(d.images()), annotations=str(d.folder / "train.txt")),
    }
    d.options["val"] = None


def yolo(d: DataSet, line: str, others: str = "0 0.5 0.5 0.2 0.2", **options: Any) -> None:
    """The training split as YOLO; `line` is the label of image 7, `others` that of the two others."""
    (d.folder / "labels").mkdir()
    for name in (7, 12, 900):
        (d.folder / "labels" / f"{name}.txt").write_text(line if name == 7 else others)
    train = SplitConfig(images=str(d.images()), annotations=str(d.folder / "labels"))
    d.options |= {"format": "yolo", "classes": ["car", "zebra"], "train": train, "val": None, **options}


def _yolo_all(line: str, **options: Any) -> Callable[[DataSet], None]:
    """All labels in one dialect."""
    return lambda d: yolo(d, line, line, **options)


def _renamed(d: DataSet, pattern: str, names: Callable[[str], str]) -> None:
    """Files below the set's folder under other names."""
    for path in sorted(d.folder.glob(pattern)):
        path.rename(path.with_name(names(path.name)))


def _tiff(pixels: Any, name: str = "7.tif") -> Callable[[DataSet], None]:
    def plant(d: DataSet) -> None:
        d.set("train/images/0/file_name", name)
        cv2.imwrite(str(d.images() / name), np.resize(pixels, (30, 40, *np.shape(pixels)[2:])))

    return plant


def semantic(d: DataSet, value: int = 1, size: tuple[int, int] = (40, 30), mode: str = "L") -> None:
    """The training split with masks; that of image 7 is full of `value`."""
    (d.folder / "masks").mkdir()
    for name in (7, 12, 900):
        width, height = size if name == 7 else (40, 30)
        mask = Image.fromarray(np.full((height, width), value if name == 7 else 1, np.uint8))
        mask.convert(mode if name == 7 else "L").save(d.folder / "masks" / f"{name}.png")
    train = SplitConfig(images=str(d.images()), annotations=str(d.folder / "masks"))
    d.options |= {"format": "semantic", "classes": ["sky", "ground"], "train": train, "val": None}


@dataclass(frozen=True)
class DataFault:
    """`refused`, `repaired` and `noted` are the doctor's words, `accepted` means that there is nothing to say.

    `refused when read` and `left out when read`: only decoding tells.
    """

    title: str
    outcome: str
    says: str  # a pattern of what the doctor or the error says
    plant: Callable[[DataSet], Any]
    fixed: bool = True  # whether `--fix` makes a copy that passes


def _set(path: str, value: Any) -> Callable[[DataSet], None]:
    return lambda d: d.set(path, value)


def _box(*bbox: float) -> Callable[[DataSet], None]:
    return _set("train/annotations/0/bbox", list(bbox))


def _mask(value: Any) -> Callable[[DataSet], None]:
    return _set("train/annotations/0/segmentation", value)


def _name(value: str) -> Callable[[DataSet], None]:
    return _set("train/images/0/file_name", value)


def _bytes(content: bytes) -> Callable[[DataSet], None]:
    return lambda d: d.file().write_bytes(content)


def _replace(make: Callable[[Path], Any]) -> Callable[[DataSet], None]:
    return lambda d: (d.file().unlink(), make(d.file()))


def _rename_on_disk(d: DataSet) -> None:
    d.set("train/images/0/file_name", unicodedata.normalize("NFC", "é.png"))
    d.draw("train", unicodedata.normalize("NFD", "é.png"))


def _link_outside(d: DataSet) -> None:
    shutil.move(d.file(), d.folder / "secret.png")
    d.file().symlink_to(d.folder / "secret.png")


def _cut_jpeg(d: DataSet) -> None:
    d.set("train/images/0/file_name", "7.jpg")
    whole = d.draw("train", "7.jpg").read_bytes()
    d.file().write_bytes(whole[: len(whole) * 2 // 3])


def _rotated(d: DataSet) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    d.set("train/images/0/file_name", "7.jpg")
    d.draw("train", "7.jpg", exif=exif)


def _upper(d: DataSet) -> None:
    for path in (d.folder / "Annotations").iterdir():
        path.write_text(path.read_text().upper())


def _pfm(d: DataSet) -> None:
    d.set("train/images/0/file_name", "7.ppm")
    (d.images() / "7.ppm").write_bytes(b"Pf\n40 30\n-1.0\n" + np.ones(1200, np.float32).tobytes())


def _link(path: Path) -> None:
    """Move a file out of its folder and leave a symbolic link to it."""
    store = path.parents[1] / "store"
    store.mkdir(exist_ok=True)
    shutil.move(path, store / f"{path.parent.name}_{path.name}")
    path.symlink_to(store / f"{path.parent.name}_{path.name}")


def _group(d: DataSet, name: str) -> None:
    for content in d.json.values():
        for category in content["categories"]:
            category["supercategory"] = name
        content["categories"].insert(0, {**content["categories"][0], "id": 0, "name": name, "supercategory": "none"})


def _crowded(d: DataSet, count: int, categories: tuple[int, ...] = (1,)) -> None:
    """So many objects of each category in the first image of val, and none in the other."""
    first = d.json["val"]["annotations"][0]
    d.json["val"]["annotations"] = [
        {**first, "id": number, "category_id": category}
        for number, category in enumerate(np.repeat(categories, count).tolist(), start=1)
    ]


def _leak(d: DataSet) -> None:
    shutil.copy(d.file("train"), d.file("val"))


def _skipping(plant: Callable[[DataSet], Any]) -> Callable[[DataSet], None]:
    return lambda d: (d.options.update(on_bad_image="skip"), plant(d))


UNREAD = "cannot be read"
DATA_FAULTS = [
    DataFault("COCO file missing", "refused", UNREAD, lambda d: d.json.update(train=None), False),
    DataFault("COCO file empty", "refused", "not a COCO file", lambda d: d.json.update(train=""), False),
    DataFault(
        "COCO file cut in half", "refused", "not a COCO file", lambda d: d.json.update(train='{"images": [{'), False
    ),
    DataFault("COCO file holds a list", "refused", "not a COCO file", lambda d: d.json.update(train="[]"), False),
    DataFault(
        "COCO file nested 50,000 deep", "refused", "not a COCO file", lambda d: d.json.update(train="[" * 50_000), False
    ),
    DataFault("no `categories`", "refused", "categories", _set("train/categories", ...), False),
    DataFault("no `images`", "refused", "images", _set("train/images", ...), False),
    DataFault("id that is text", "refused", r"annotations\[0\]", _set("train/annotations/0/id", "x"), False),
    DataFault("box of three numbers", "refused", "bbox", _box(1, 2, 3), False),
    DataFault("box with NaN", "refused", "not finite.*1", _box(NAN, 0, 3, 3)),
    DataFault("box with infinity", "refused", "not finite.*1", _box(0, 0, INF, 3)),
    DataFault("box of negative width", "refused", "negative.*1", _box(9, 9, -3, 3)),
    DataFault("box of no width", "repaired", "no area.*1", _box(1, 1, 0, 3)),
    DataFault("box of no height", "repaired", "no area.*1", _box(1, 1, 3, 0)),
    DataFault("box outside its image", "repaired", "outside.*1", _box(60, 1, 3, 3)),
    DataFault(
        "object without a box among others", "refused", "without a bbox.*1", _set("train/annotations/0/bbox", ...)
    ),
    DataFault("annotation id 0", "repaired", "renumbered.*0", _set("train/annotations/0/id", 0)),
    DataFault("annotation id used twice", "repaired", "renumbered.*2", _set("train/annotations/0/id", 2)),
    DataFault("annotation id missing", "repaired", "renumbered", _set("train/annotations/0/id", ...)),
    DataFault("`area` missing", "repaired", "missing area.*1", _set("train/annotations/0/area", ...)),
    DataFault("`area` negative", "repaired", "missing area.*1", _set("train/annotations/0/area", -5)),
    DataFault("`iscrowd` missing", "repaired", "missing iscrowd.*1", _set("train/annotations/0/iscrowd", ...)),
    DataFault("crowd", "noted", "crowd.*1", _set("train/annotations/0/iscrowd", 1)),
    DataFault("annotation of an unknown image", "refused", "unknown image.*1", _set("train/annotations/0/image_id", 8)),
    DataFault(
        "annotation of an unknown category",
        "refused",
        "unknown category.*1",
        _set("train/annotations/0/category_id", 9),
    ),
    DataFault(
        "image id used twice", "refused", "image id used twice.*7", lambda d: d.again("train/images", file_name="x.png")
    ),
    DataFault("one file named by two images", "refused", "several images.*8", lambda d: d.again("train/images", id=8)),
    DataFault(
        "category id used twice",
        "refused",
        "category id used twice.*1",
        lambda d: d.again("train/categories", name="x"),
    ),
    DataFault(
        "class name used twice", "refused", "class name used twice.*car", lambda d: d.again("train/categories", id=3)
    ),
    DataFault(
        "category ids with gaps",
        "noted",
        "gaps.*90",
        lambda d: d.again("train/categories", id=90, name="x") or d.again("val/categories", id=90, name="x"),
    ),
    DataFault(
        "val lacks a class of train",
        "noted",
        "class without any object.*zebra",
        lambda d: (
            d.json["val"]["categories"].pop(),
            d.json["val"].update(annotations=[a for a in d.json["val"]["annotations"] if a["category_id"] == 1]),
        ),
    ),
    DataFault(
        "val has a class that train lacks",
        "refused",
        "training split lacks: lion",
        lambda d: d.again("val/categories", id=9, name="lion"),
    ),
    DataFault(
        "val lacks a class of the list in the config",
        "noted",
        "class without any object.*zebra",
        lambda d: (
            d.options.update(classes=["zebra", "car"]),
            d.json["val"]["categories"].pop(),
            d.json["val"].update(annotations=[a for a in d.json["val"]["annotations"] if a["category_id"] == 1]),
        ),
    ),
    DataFault(
        "list in the config with a class that train lacks",
        "refused",
        "'lion' is not known; valid are car, zebra",
        lambda d: d.options.update(classes=["car", "lion"]),
        False,
    ),
    DataFault(
        "class without objects in train and val",
        "noted",
        "class without any object.*lion",
        lambda d: (d.again("train/categories", id=3, name="lion"), d.again("val/categories", id=3, name="lion")),
    ),
    DataFault("class of few objects", "noted", "fewer than 10 objects.*car .3., zebra .3.", lambda d: None),
    DataFault(
        "class name used twice, with objects of both ids",
        "refused",
        "class name used twice.*car .ids 1, 3.",
        lambda d: (d.again("train/categories", id=3), d.set("train/annotations/0/category_id", 3)),
    ),
    DataFault(
        "category that is the group of all others (Roboflow)",
        "noted",
        "group of all others .left out.*things .id 0.",
        lambda d: _group(d, "things"),
    ),
    DataFault(
        "group of all others under the name of a class",
        "noted",
        "group of all others .left out.*car .id 0.",
        lambda d: _group(d, "car"),
    ),
    DataFault(
        "group of all others that has objects",
        "accepted",
        "",
        lambda d: (_group(d, "things"), [d.set(f"{s}/annotations/0/category_id", 0) for s in ("train", "val")]),
    ),
    DataFault(
        "val image with 400 objects of a class, of which 100 count",
        "noted",
        "more than 100 objects of a class.*AP can reach 25.7, recall 25.0.*3.png",
        lambda d: _crowded(d, 400),
    ),
    DataFault(
        "val image with 101 objects of a class",
        "noted",
        "AP can reach 99.0, recall 99.0",
        lambda d: _crowded(d, 101),
    ),
    DataFault("val image with 150 objects, 75 of each class", "accepted", "", lambda d: _crowded(d, 75, (1, 2))),
    DataFault("val image with 100 objects of a class", "accepted", "", lambda d: _crowded(d, 100)),
    DataFault(
        "val image with 400 crowds",
        "noted",
        "crowd .evaluation",
        lambda d: (_crowded(d, 400), [o.update(iscrowd=1) for o in d.json["val"]["annotations"][10:]]),
    ),
    DataFault(
        "image folder that is not there",
        "refused",
        "is not a folder .looked in /.*; give data.mine.train.images=PATH",
        lambda d: d.images().rename(d.folder / "moved"),
        False,
    ),
    DataFault(
        "annotation file that is not there",
        "refused",
        "train.json is not there .looked in /.*; give data.mine.train.annotations=PATH",
        lambda d: d.json.update(train=None),
        False,
    ),
    DataFault(
        "symbolic link out of the image folder, `allow_links: true`",
        "accepted",
        "",
        lambda d: (_link_outside(d), d.options.update(allow_links=True)),
    ),
    DataFault(
        "symbolic link to nothing, `allow_links: true`",
        "refused",
        "not there.*7.png",
        lambda d: (_link_outside(d), (d.folder / "secret.png").unlink(), d.options.update(allow_links=True)),
    ),
    DataFault(
        "YOLO: label that is a symbolic link",
        "refused",
        "labels/7.txt.*symbolic link.*allow_links",
        lambda d: (yolo(d, "0 0.5 0.5 0.2 0.2"), _link(d.folder / "labels" / "7.txt")),
        False,
    ),
    DataFault(
        "YOLO: images and labels that are symbolic links, `allow_links: true`",
        "accepted",
        "",
        lambda d: (
            yolo(d, "0 0.5 0.5 0.2 0.2", allow_links=True),
            [_link(path) for folder in (d.images(), d.folder / "labels") for path in sorted(folder.iterdir())],
        ),
    ),
    DataFault(
        "VOC: images and XML files that are symbolic links, `allow_links: true`",
        "accepted",
        "",
        lambda d: (
            voc(d),
            d.options.update(allow_links=True),
            [_link(path) for folder in (d.images(), d.folder / "Annotations") for path in sorted(folder.iterdir())],
        ),
    ),
    DataFault(
        "semantic: images and masks that are symbolic links, `allow_links: true`",
        "accepted",
        "",
        lambda d: (
            semantic(d),
            d.options.update(allow_links=True),
            [_link(path) for folder in (d.images(), d.folder / "masks") for path in sorted(folder.iterdir())],
        ),
    ),
    DataFault("polygon with an odd number of coordinates", "refused", "odd.*1", _mask([[1, 1, 2, 2, 3, 3, 4]])),
    DataFault("polygon with NaN", "refused", "polygon that is.*1", _mask([[1, 1, 2, NAN, 3, 3]])),
    DataFault("polygon a thousand million pixels away", "refused", "far outside.*1", _mask([[1, 1, 1e9, 2, 3, 3]])),
    DataFault("run lengths of another image size", "refused", "run lengths.*1", _mask({"size": [9, 9], "counts": "0"})),
    DataFault("run lengths that end early", "refused", "run lengths.*1", _mask({"size": [30, 40], "counts": [5, 6]})),
    DataFault("run lengths that are no code", "refused", "run lengths.*1", _mask({"size": [30, 40], "counts": "oo~~"})),
    DataFault(
        "keypoints one number short", "refused", "keypoints.*1", _set("train/annotations/0/keypoints", [1, 2, 2, 3, 4])
    ),
    DataFault(
        "keypoints with NaN", "refused", "keypoints.*1", _set("train/annotations/0/keypoints", [1, 2, 2, NAN, 4, 2])
    ),
    DataFault("width missing", "repaired", "missing width.*7", _set("train/images/0/width", ...)),
    DataFault("width negative", "refused", "no pixel count.*7", _set("train/images/0/width", -40)),
    DataFault("height not whole", "refused", "no pixel count.*7", _set("train/images/0/height", 29.5)),
    DataFault(
        "size that is not the file's",
        "refused",
        r"whose size is not.*file 40 x 30, annotations 41 x 30",
        _set("train/images/0/width", 41),
    ),
    DataFault("size as before the EXIF rotation", "refused", "file 30 x 40, annotations 40 x 30", _rotated),
    DataFault("file name `/etc/hostname`", "refused", "leaves the image folder.*7", _name("/etc/hostname")),
    DataFault("file name `../val/3.png`", "refused", "leaves the image folder.*7", _name("../val/3.png")),
    DataFault("file name with a NUL", "refused", "leaves the image folder.*7", _name("7\0.png")),
    DataFault("symbolic link out of the image folder", "refused", "leaves the image folder", _link_outside),
    DataFault(
        "file name beyond ASCII",
        "noted",
        "beyond ASCII.*細胞",
        lambda d: (d.draw("train", "細胞.png"), d.set("train/images/0/file_name", "細胞.png")),
    ),
    DataFault("file name in another Unicode normal form than on disk", "refused", "normal form", _rename_on_disk),
    DataFault("image file missing", "refused", "not there.*7.png", lambda d: d.file().unlink()),
    DataFault(
        "image file missing, `on_bad_image: skip`",
        "repaired",
        "not there .replaced.*7.png",
        _skipping(lambda d: d.file().unlink()),
    ),
    DataFault("image file empty", "refused", "7.png .is empty", _bytes(b"")),
    DataFault("image file holds text", "refused", "7.png .is not an image", _bytes(b"<html>404 Not Found</html>")),
    DataFault("image file is a folder", "refused", "7.png .is a folder", _replace(Path.mkdir)),
    DataFault("image file is a FIFO", "refused", "not a regular file", _replace(os.mkfifo)),
    DataFault(
        "image of more than `max_pixels`",
        "refused",
        "more than max_pixels",
        lambda d: (d.draw("train", "7.png", size=(50, 30)), d.options.update(max_pixels=1200)),
    ),
    DataFault(
        "image file missing that should have 40,000 million pixels, `on_bad_image: skip`",
        "refused",
        "annotated size of more than max_pixels.*7.png",
        _skipping(lambda d: (d.file().unlink(), [d.set(f"train/images/0/{s}", 200_000) for s in ("height", "width")])),
    ),
    DataFault(
        "PNG named .jpg",
        "accepted",
        "",
        lambda d: (d.file().rename(d.images() / "7.jpg"), d.set("train/images/0/file_name", "7.jpg")),
    ),
    DataFault("JPEG cut inside its pixels", "refused when read", r"7\.jpg: .*(?i:truncated)", _cut_jpeg),
    DataFault(
        "JPEG cut inside its pixels, `on_bad_image: skip`",
        "left out when read",
        r"7\.jpg: .*(?i:truncated)",
        _skipping(_cut_jpeg),
    ),
    DataFault("an image of train in val under another name", "refused", "in train, too.*3.png = 7.png", _leak),
    DataFault(
        "an image of train in val, `allow_leak: true`",
        "repaired",
        "allow_leak",
        lambda d: (_leak(d), d.options.update(allow_leak=True)),
    ),
    DataFault(
        "training set without images",
        "refused",
        "no image",
        lambda d: d.json["train"].update(images=[], annotations=[]),
        False,
    ),
    DataFault("training set without objects", "refused", "no object", _set("train/annotations", []), False),
    DataFault(
        "validation set without images",
        "refused",
        "no image",
        lambda d: d.json["val"].update(images=[], annotations=[]),
        False,
    ),
    DataFault("validation set without objects", "noted", "no object", _set("val/annotations", [])),
    DataFault(
        "VOC: listed image without a file", "refused", "without an image file.*13", lambda d: voc(d, names="7 12 13")
    ),
    DataFault("VOC: image listed twice", "refused", "listed twice.*12", lambda d: voc(d, names="7 12 12")),
    DataFault("VOC: no XML file", "refused", "without a xml file: 7", lambda d: voc(d, None)),
    DataFault("VOC: XML with entities", "refused", r"7\.xml.*entities", lambda d: voc(d, "<!ENTITY a 'b'>")),
    DataFault(
        "VOC: object without a box",
        "refused",
        r"7\.xml .'lion'",
        lambda d: voc(d, "<object><name>lion</name></object>"),
    ),
    DataFault("YOLO: class that is not named", "refused", "line 1.*class 7", lambda d: yolo(d, "7 0.5 0.5 0.2 0.2")),
    DataFault(
        "YOLO: line of four numbers", "refused", "is not `class x y w h`.*line 1", lambda d: yolo(d, "0 0.5 0.5 0.2")
    ),
    DataFault("YOLO: box with NaN", "refused", "not finite", lambda d: yolo(d, "0 nan 0.5 0.2 0.2")),
    DataFault(
        "YOLO: boxes with keypoints of three numbers, not named",
        "noted",
        "box with 2 keypoints of 3 numbers",
        _yolo_all("0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1"),
    ),
    DataFault(
        "YOLO: boxes with keypoints of two numbers, not named",
        "noted",
        "box with 3 keypoints of 2 numbers",
        _yolo_all("0 0.5 0.5 0.4 0.4 0.4 0.4 0.6 0.6 0.5 0.5"),
    ),
    DataFault(
        "YOLO: keypoints that the config names",
        "accepted",
        "",
        _yolo_all("0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1", keypoints=["left", "right"]),
    ),
    DataFault(
        "YOLO: more keypoints than the config names",
        "refused",
        "1 keypoints of two or three numbers.*line 1",
        _yolo_all("0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1", keypoints=["nose"]),
        False,
    ),
    DataFault(
        "YOLO: keypoint with a confidence in place of its visibility",
        "refused",
        "no visibility.*line 1",
        _yolo_all("0 0.5 0.5 0.4 0.4 0.4 0.4 0.87", keypoints=["nose"]),
        False,
    ),
    DataFault("YOLO: oriented boxes", "noted", "oriented box", _yolo_all("0 0.2 0.2 0.6 0.2 0.6 0.5 0.2 0.5")),
    DataFault(
        "YOLO: confidence after the box (`save_conf`)",
        "refused",
        "box and a confidence .of predictions",
        _yolo_all("0 0.5 0.5 0.2 0.2 0.87"),
        False,
    ),
    DataFault(
        "YOLO: track id after the box", "refused", "box and a track id", _yolo_all("0 0.5 0.5 0.2 0.2 17"), False
    ),
    DataFault(
        "YOLO: confidence and track id after the box",
        "refused",
        "box, a confidence and a track id",
        _yolo_all("0 0.5 0.5 0.2 0.2 0.87 17"),
        False,
    ),
    DataFault(
        "YOLO: confidence after a polygon",
        "refused",
        "polygon and a confidence",
        _yolo_all("0 0.2 0.2 0.6 0.2 0.6 0.5 0.87"),
        False,
    ),
    DataFault(
        "YOLO: confidence after the keypoints",
        "refused",
        "box, 2 keypoints and a confidence",
        _yolo_all("0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1 0.87"),
        False,
    ),
    DataFault(
        "YOLO: polygons beside boxes",
        "noted",
        "polygon, beside 2 lines",
        lambda d: yolo(d, "0 .1 .1 .9 .1 .9 .9 .1 .8"),
    ),
    DataFault(
        "YOLO: boxes with one and with two keypoints",
        "refused",
        "mix of dialects .2 x box with 1 keypoints of 3 numbers, 1 x box with 2 keypoints of 3 numbers",
        lambda d: yolo(d, "0 .5 .5 .4 .4 .4 .4 2 .6 .6 1", "0 .5 .5 .4 .4 .4 .4 2"),
        False,
    ),
    DataFault(
        "YOLO: polygons of several lengths, one of which looks like a box with keypoints",
        "accepted",
        "",
        lambda d: yolo(d, "0 .5 .5 .4 .4 .4 .4 .6 .6", "0 .1 .1 .9 .1 .9 .9"),
    ),
    DataFault("YOLO: class number written as 1.0", "accepted", "", _yolo_all("1.0 0.5 0.5 0.2 0.2")),
    DataFault("YOLO: class number 0.5", "refused", "class 0.5", lambda d: yolo(d, "0.5 0.5 0.5 0.2 0.2")),
    DataFault(
        "YOLO: class name in place of its number",
        "refused",
        "not a class number.*line 1: 'car",
        lambda d: yolo(d, "car 0.5 0.5 0.2 0.2"),
    ),
    DataFault(
        "YOLO: boxes in pixels",
        "refused",
        "3 x file .of 3. with coordinates above 1",
        _yolo_all("0 20 15 12 10"),
        False,
    ),
    DataFault(
        "YOLO: two corners in place of centre and size",
        "refused",
        "two corners",
        _yolo_all("0 0.4 0.5 0.9 0.95"),
        False,
    ),
    DataFault("YOLO: label files with a byte order mark", "accepted", "", _yolo_all("\ufeff0 0.5 0.5 0.2 0.2")),
    DataFault(
        "YOLO: class list with a byte order mark",
        "accepted",
        "",
        lambda d: (
            (d.folder / "names.txt").write_text("\ufeffcar\nzebra"),
            yolo(d, "1 0.5 0.5 0.2 0.2", classes=str(d.folder / "names.txt")),
        ),
    ),
    DataFault(
        "YOLO: image without a label file",
        "noted",
        "without a txt file .no objects.*7.png",
        lambda d: (yolo(d, ""), (d.folder / "labels" / "7.txt").unlink()),
    ),
    DataFault(
        "YOLO: label file of no image",
        "repaired",
        "txt file of no image.*8.txt",
        lambda d: (yolo(d, ""), (d.folder / "labels" / "8.txt").write_text("0 0.5 0.5 0.2 0.2")),
    ),
    DataFault(
        "YOLO: class list of a labelling tool among the label files",
        "accepted",
        "",
        lambda d: (yolo(d, "0 0.5 0.5 0.2 0.2"), (d.folder / "labels" / "classes.txt").write_text("car\nzebra")),
    ),
    DataFault(
        "YOLO: label files of another split",
        "refused",
        "of 3; looked in .*labels, which holds 3 others: val_12.txt",
        lambda d: (yolo(d, "0 0.5 0.5 0.2 0.2"), _renamed(d, "labels/*", lambda name: f"val_{name}")),
        False,
    ),
    DataFault(
        "YOLO: folder without any label file",
        "refused",
        "of 3; looked in .*labels, which holds none",
        lambda d: (yolo(d, ""), [path.unlink() for path in (d.folder / "labels").iterdir()]),
        False,
    ),
    DataFault(
        "YOLO: label file with the image's ending",
        "refused",
        "another name or case: 7.png .there is 7.png.txt",
        lambda d: (yolo(d, ""), _renamed(d, "labels/7.txt", lambda name: "7.png.txt")),
    ),
    DataFault(
        "YOLO: names that differ in case",
        "refused",
        "another name or case: A.png .there is a.txt",
        lambda d: (
            yolo(d, ""),
            _renamed(d, "train/7.png", lambda name: "A.png"),
            _renamed(d, "labels/7.txt", lambda name: "a.txt"),
        ),
    ),
    DataFault(
        "VOC: lines with the image's ending",
        "accepted",
        "",
        lambda d: voc(d, names="7.png 12.png 900.png"),
    ),
    DataFault(
        "VOC: names that differ in case",
        "refused",
        "without an image file: CAR .there is car",
        lambda d: (
            voc(d, names="CAR 12 900"),
            _renamed(d, "train/7.png", lambda name: "car.png"),
            _renamed(d, "Annotations/7.xml", lambda name: "car.xml"),
        ),
    ),
    DataFault(
        "VOC: no XML file of any image",
        "refused",
        "of 3; looked in .*Annotations, which holds 3 others: old_12.xml",
        lambda d: (voc(d), _renamed(d, "Annotations/*", lambda name: f"old_{name}")),
        False,
    ),
    DataFault(
        "VOC: XML file of no image",
        "repaired",
        "xml file of no image.*: 8.xml",
        lambda d: (voc(d), shutil.copy(d.folder / "Annotations" / "7.xml", d.folder / "Annotations" / "8.xml")),
    ),
    DataFault(
        "VOC: image set with a byte order mark",
        "accepted",
        "",
        lambda d: (voc(d), (d.folder / "train.txt").write_text("\ufeff7\n12\n900")),
    ),
    DataFault("VOC: XML with a namespace", "accepted", "", lambda d: voc(d, root='annotation xmlns="http://x"')),
    DataFault("VOC: XML in upper case", "accepted", "", lambda d: (voc(d), _upper(d))),
    DataFault("VOC: XML with another root", "accepted", "", lambda d: voc(d, root="Annotations")),
    DataFault(
        "VOC: XML of something else",
        "refused",
        "7.xml: its root is <html> without any <object>",
        lambda d: (voc(d), (d.folder / "Annotations" / "7.xml").write_text("<html><p/></html>")),
    ),
    DataFault("VOC: XML in GB2312", "accepted", "", lambda d: voc(d, "<path>图片</path>", encoding="GB2312")),
    DataFault("VOC: XML in UTF-16", "accepted", "", lambda d: voc(d, "<path>é</path>", encoding="UTF-16")),
    DataFault("VOC: XML in Latin-1", "accepted", "", lambda d: voc(d, "<path>é</path>", encoding="ISO-8859-1")),
    DataFault("VOC: XML with a byte order mark", "accepted", "", lambda d: voc(d, encoding="utf-8-sig")),
    DataFault(
        "VOC: XML in another encoding than it says",
        "refused",
        "7.xml: is not utf-8 text",
        lambda d: (
            voc(d),
            (d.folder / "Annotations" / "7.xml").write_bytes("<annotation>é</annotation>".encode("latin-1")),
        ),
    ),
    DataFault(
        "image that is a pointer of Git LFS",
        "refused",
        "7.png .is a pointer of Git LFS",
        _bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    ),
    DataFault(
        "image that is a symbolic link copied as text",
        "refused",
        "7.png .holds the name of another file",
        _bytes(b"../store/7.png"),
    ),
    DataFault("TIFF of 32-bit floats", "refused", "7.tif .holds 32-bit", _tiff(np.ones((30, 40), np.float32))),
    DataFault("TIFF of 32-bit integers", "refused", "7.tif .holds 32-bit", _tiff(np.ones((30, 40), np.int32))),
    DataFault("TIFF of signed 16 bits", "refused", "7.tif .holds 32-bit, signed", _tiff(np.ones((30, 40), np.int16))),
    DataFault("TIFF of signed 8 bits", "refused", "7.tif .holds 32-bit, signed", _tiff(np.ones((30, 40), np.int8))),
    DataFault("TIFF of floats in colour", "refused", "is a TIFF of", _tiff(np.ones((30, 40, 3), np.float32))),
    DataFault("TIFF of 64-bit floats", "refused", "is a TIFF of", _tiff(np.ones((30, 40), np.float64))),
    DataFault("PFM, which holds floats", "refused", "7.ppm .holds 32-bit", _pfm),
    DataFault("TIFF of unsigned 16 bits", "accepted", "", _tiff(np.ones((30, 40), np.uint16))),
    DataFault(
        "YOLO: HEIC, AVIF and other files that are no image which is read",
        "noted",
        "not read .*a.heic, b.AVIF, c.exr",
        lambda d: (
            yolo(d, "0 0.5 0.5 0.2 0.2"),
            [(d.images() / name).write_bytes(b"x") for name in ("a.heic", "b.AVIF", "c.exr", "notes.md")],
        ),
    ),
    DataFault(
        "VOC: HEIC beside the images",
        "noted",
        "not read .*a.heic",
        lambda d: (voc(d), (d.images() / "a.heic").write_bytes(b"x")),
    ),
    DataFault(
        "semantic: AVIF beside the images",
        "noted",
        "not read .*a.avif",
        lambda d: (semantic(d), (d.images() / "a.avif").write_bytes(b"x")),
    ),
    DataFault(
        "semantic: mask of no image",
        "repaired",
        "png file of no image.*: 8.png",
        lambda d: (semantic(d), shutil.copy(d.folder / "masks" / "7.png", d.folder / "masks" / "8.png")),
    ),
    DataFault(
        "semantic: masks with another ending",
        "refused",
        "of 3; looked in .*masks, which holds 3 others: 12_mask.png",
        lambda d: (semantic(d), _renamed(d, "masks/*", lambda name: name.replace(".", "_mask."))),
        False,
    ),
    DataFault(
        "semantic: image without a mask",
        "refused",
        "without a png file.*7",
        lambda d: (semantic(d), (d.folder / "masks" / "7.png").unlink()),
    ),
    DataFault(
        "semantic: mask of another size",
        "refused",
        "7.png .its mask is 20 x 30, its image 40 x 30",
        lambda d: semantic(d, size=(20, 30)),
    ),
    DataFault(
        "semantic: mask value of no class",
        "refused",
        r"no class has: \[77\]",
        lambda d: semantic(d, value=77),
    ),
    DataFault("semantic: mask in RGB", "refused", "mode RGB", lambda d: semantic(d, mode="RGB")),
    DataFault(
        "semantic: mask in RGB, `on_bad_image: skip`",
        "repaired",
        "replaced.*7.png .its mask has mode RGB",
        _skipping(lambda d: semantic(d, mode="RGB")),
    ),
]


class Evil:
    """Unpickling it runs a command that makes `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Claim:
    """Unpickles as a tensor of `size` on a storage of four numbers."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments = (torch.zeros(4).storage(), 0, size, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


@dataclass
class Files:
    """Where to make a broken file, and the sound content to start from."""

    folder: Path
    content: dict[str, Any]  # of a checkpoint
    weights: dict[str, torch.Tensor]  # of a backbone

    @property
    def sentinel(self) -> Path:
        """Exists if code of a file ran."""
        return self.folder / "executed"

    def bytes(self, data: bytes, name: str = "x.pt") -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def save(self, value: Any, name: str = "x.pt", **options: Any) -> Path:
        torch.save(value, self.folder / name, **options)
        return self.folder / name

    def whole(self) -> bytes:
        return self.save(self.content).read_bytes()

    def pickle(self, value: Any, name: str = "x.pt") -> Path:
        return self.bytes(pickle.dumps(value), name)

    def with_(self, path: str, value: Any) -> Path:
        """The checkpoint with another value at `ema/updates` or the like."""
        content = copy.deepcopy(self.content)
        *parents, last = path.split("/")
        at = content
        for part in parents:
            at = at[part]
        at[last] = value
        return self.save(content)

    def rezipped(self, compression: int = zipfile.ZIP_STORED, twice: bool = False) -> Path:
        whole = self.whole()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(self.folder / "x.pt", "w", compression) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
            if twice:
                new.writestr(old.infolist()[0].filename, old.read(old.infolist()[0]))
        return self.folder / "x.pt"

    def bomb(self) -> Path:
        """A quarter of a megabyte that unpacks to 256."""
        path = self.folder / "x.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", pickle.dumps({}))
            with archive.open("x/data/0", "w", force_zip64=True) as record:
                for _ in range(4):
                    record.write(bytes(2**26))
        return path


def _flipped(f: Files, at: float) -> Path:
    data = bytearray(f.whole())
    data[int(len(data) * at)] ^= 1
    return f.bytes(bytes(data))


def _first_model_tensor(f: Files) -> str:
    return next(name for name, t in f.content["model"].items() if t.dim() > 1)


def _on_meta(f: Files) -> Path:
    return f.with_(f"model/{(name := _first_model_tensor(f))}", f.content["model"][name].to("meta"))


def _without_type(f: Files) -> Path:
    return f.with_("config/heads", {name: {} for name in f.content["classes"]})


def _overlapping(f: Files) -> Path:
    model = f.content["model"]
    storage = torch.zeros(max(t.numel() for t in model.values()))
    return f.with_("model", {name: storage[: t.numel()].view(t.shape) for name, t in model.items()})


def _tied(f: Files) -> Path:
    model = f.content["model"]
    first, second = [name for name, t in model.items() if t.dim() == 1][:2]  # weight and bias of the first norm
    return f.with_("model", model | {first: model[second]})


def _nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def _without_backbone(f: Files) -> Path:
    return f.with_("config", {key: value for key, value in f.content["config"].items() if key != "backbone"})


def _huge_header(f: Files) -> Path:
    return f.bytes((2**40).to_bytes(8, "little") + b"{}", "x.safetensors")


def _cut_safetensors(f: Files) -> Path:
    data = safetensors.torch.save(f.weights)
    return f.bytes(data[: len(data) // 2], "x.safetensors")


def _stored(path: str, value: Any) -> Callable[[Files], Path]:
    return lambda f: f.with_(f"config/{path}", value)


@dataclass(frozen=True)
class FileFault:
    """A file that is refused as `checkpoint` or `weights`."""

    title: str
    kind: str
    says: str
    make: Callable[[Files], Path]


CODE = "holds objects other than tensors"
MISFIT = "do not fit its own config"
MOST = "at most .* valid in a file"
FILE_FAULTS = [
    FileFault("file missing", "checkpoint", "no such file", lambda f: f.folder / "none.pt"),
    FileFault("a folder", "checkpoint", "is a folder without", lambda f: f.folder),
    FileFault(
        "a FIFO", "checkpoint", "not a regular file", lambda f: (os.mkfifo(f.folder / "p.pt"), f.folder / "p.pt")[1]
    ),
    FileFault("empty file", "checkpoint", UNREAD, lambda f: f.bytes(b"")),
    FileFault("a web page", "checkpoint", CODE, lambda f: f.bytes(b"<html>404</html>")),
    FileFault(
        "a pointer of Git LFS", "checkpoint", CODE, lambda f: f.bytes(b"version https://git-lfs.github.com/spec/v1\n")
    ),
    FileFault("cut after 10 %", "checkpoint", "not a whole", lambda f: f.bytes(f.whole()[: len(f.whole()) // 10])),
    FileFault("cut in half", "checkpoint", "not a whole", lambda f: f.bytes(f.whole()[: len(f.whole()) // 2])),
    FileFault("last byte missing", "checkpoint", "not a whole", lambda f: f.bytes(f.whole()[:-1])),
    FileFault("one bit flipped in the structure", "checkpoint", "checksum|not a whole", lambda f: _flipped(f, 0.001)),
    FileFault("one bit flipped in a tensor", "checkpoint", "checksum", lambda f: _flipped(f, 0.5)),
    FileFault(
        "a quarter zeroed",
        "checkpoint",
        "checksum|not a whole",
        lambda f: f.bytes((w := f.whole())[: (n := len(w) // 4)] + bytes(n) + w[2 * n :]),
    ),
    FileFault("records compressed", "checkpoint", "compressed", lambda f: f.rezipped(zipfile.ZIP_DEFLATED)),
    FileFault("a zip bomb of 256 MB", "checkpoint", "compressed", Files.bomb),
    FileFault("two records of one name", "checkpoint", "two records", lambda f: f.rezipped(twice=True)),
    FileFault(
        "bytes before the archive",
        "checkpoint",
        "before its first record",
        lambda f: f.bytes(pickle.dumps(Evil(f.sentinel)) + f.whole()),
    ),
    FileFault(
        "a zip of something else",
        "checkpoint",
        UNREAD,
        lambda f: (zipfile.ZipFile(f.folder / "x.pt", "w").writestr("a/b", "c"), f.folder / "x.pt")[1],
    ),
    FileFault("pickle that runs a command", "checkpoint", CODE, lambda f: f.pickle(Evil(f.sentinel))),
    FileFault(
        "PyTorch file that runs a command", "checkpoint", CODE, lambda f: f.with_("config/seed", Evil(f.sentinel))
    ),
    FileFault(
        "PyTorch file of the old form that runs a command",
        "checkpoint",
        CODE,
        lambda f: f.save(Evil(f.sentinel), _use_new_zipfile_serialization=False),
    ),
    FileFault("a pickled module", "checkpoint", CODE, lambda f: f.save(torch.nn.Linear(2, 2))),
    FileFault("a NumPy scalar", "checkpoint", CODE, lambda f: f.with_("config/seed", np.float64(1))),
    FileFault(
        "tensor of 12 TB on 16 bytes",
        "checkpoint",
        "resize|allocate|fewer bytes",
        lambda f: f.with_("model/x", Claim((3 * 10**12,), (1,))),
    ),
    FileFault(
        "tensor of 4 TB that repeats one number",
        "checkpoint",
        "fewer bytes",
        lambda f: f.with_("model/x", Claim((10**12,), (0,))),
    ),
    FileFault("tensors that overlap", "checkpoint", "overlap", _overlapping),
    FileFault("one tensor for two layers", "checkpoint", "share one tensor", _tied),
    FileFault(
        "lists in lists: 23 that make 8 million",
        "checkpoint",
        "1,000,000 entries",
        lambda f: f.with_("scaler/x", _nested(22)),
    ),
    FileFault("tensor of negative size", "checkpoint", UNREAD, lambda f: f.with_("model/x", Claim((-1,), (1,)))),
    FileFault("sparse tensor", "checkpoint", "fewer bytes", lambda f: f.with_("model/x", torch.eye(3).to_sparse())),
    FileFault("tensor without values (meta)", "checkpoint", "fewer bytes", _on_meta),
    FileFault("weights alone", "checkpoint", "not a detbb checkpoint", lambda f: f.save(f.weights)),
    FileFault(
        "a key missing",
        "checkpoint",
        "not a detbb checkpoint",
        lambda f: f.save({k: v for k, v in f.content.items() if k != "rng"}),
    ),
    FileFault("a key too many", "checkpoint", "not a detbb checkpoint", lambda f: f.with_("extra", 1)),
    FileFault("format of a later version", "checkpoint", "format 9", lambda f: f.with_("format_version", 9)),
    FileFault("format as a tensor", "checkpoint", "format tensor", lambda f: f.with_("format_version", torch.zeros(2))),
    FileFault("step as text", "checkpoint", "step is a str", lambda f: f.with_("step", "5")),
    FileFault("step below 0", "checkpoint", "step is -1", lambda f: f.with_("step", -1)),
    FileFault("a list among the tensors", "checkpoint", "model.x is a list", lambda f: f.with_("model/x", [1])),
    FileFault(
        "average without its tensor", "checkpoint", "ema.tensors.x", lambda f: f.with_("ema/tensors/x", torch.zeros(1))
    ),
    FileFault(
        "average of another shape",
        "checkpoint",
        "ema.tensors",
        lambda f: f.with_(f"ema/tensors/{_first_model_tensor(f)}", torch.zeros(1)),
    ),
    FileFault("classes as one text", "checkpoint", "classes.shapes", lambda f: f.with_("classes/shapes", "abc")),
    FileFault("classes of no head", "checkpoint", "classes of no head do not fit", lambda f: f.with_("classes", {})),
    FileFault("config with an unknown key", "checkpoint", "trian", lambda f: f.with_("config/trian", {})),
    FileFault("config empty", "checkpoint", "config.heads is missing", lambda f: f.with_("config", {})),
    FileFault("config without a backbone", "checkpoint", "config.backbone is missing", _without_backbone),
    FileFault(
        "config of a backbone with a list as its name",
        "checkpoint",
        "config.backbone.arch is a list",
        _stored("backbone/arch", ["a"]),
    ),
    FileFault("config of heads without a type", "checkpoint", r"heads\.\w+\.type is missing", _without_type),
    FileFault(
        "tensor name without a part",
        "checkpoint",
        "model.weight belongs to none",
        lambda f: f.with_("model/weight", torch.zeros(2)),
    ),
    FileFault(
        "tensors of a head that is not there",
        "checkpoint",
        "model.heads.x.weight belongs to none",
        lambda f: f.with_("model/heads.x.weight", torch.zeros(2)),
    ),
    FileFault(
        "tensors of another network",
        "checkpoint",
        MISFIT,
        lambda f: f.with_("model/backbone.x.weight", torch.zeros(2)),
    ),
    FileFault("config of 2,000 convolutions", "checkpoint", MISFIT, _stored("heads/shapes/num_convs", 2_000)),
    FileFault("config of ten million layers", "checkpoint", "far more than", _stored("heads/shapes/num_convs", 10**7)),
    FileFault("config of a layer of 400 TB", "checkpoint", MISFIT, _stored("neck/channels", 10**7)),
    FileFault("config of a layer beyond 64 bits", "checkpoint", MISFIT, _stored("neck/channels", 10**12)),
    FileFault(
        "config of images a million wide", "checkpoint", "at most", _stored("data/shapes/image_size", [1, 10**6])
    ),
    FileFault("config of a million images a batch", "checkpoint", MOST, _stored("eval/batch_size", 10**6)),
    FileFault("config of a number beyond 64 bits", "checkpoint", "64 bits", _stored("train/steps", 10**400)),
    FileFault("config of a list of 200,000", "checkpoint", "entries", _stored("freeze", ["neck"] * 200_000)),
    FileFault("config of a text of a million", "checkpoint", "characters", _stored("output_dir", "x" * 10**6)),
    FileFault("pickle that runs a command", "weights", CODE, lambda f: f.pickle(Evil(f.sentinel), "x.pkl")),
    FileFault(
        "pickle of NumPy arrays that runs a command",
        "weights",
        CODE,
        lambda f: f.pickle({"a": np.ones(2), "b": Evil(f.sentinel)}, "x.pkl"),
    ),
    FileFault("PyTorch file that runs a command", "weights", CODE, lambda f: f.save({"a": Evil(f.sentinel)}, "x.pth")),
    FileFault("safetensors cut in half", "weights", "not a whole safetensors file", _cut_safetensors),
    FileFault("safetensors with a header of a terabyte", "weights", "not a whole safetensors file", _huge_header),
    FileFault(
        "pickle named .safetensors",
        "weights",
        "not a whole safetensors file",
        lambda f: f.pickle(Evil(f.sentinel), "x.safetensors"),
    ),
    FileFault(
        "NaN",
        "weights",
        "NaN or infinite",
        lambda f: f.save({**f.weights, "conv1.weight": f.weights["conv1.weight"] * NAN}, "x.pth"),
    ),
    FileFault(
        "tensors without values (meta)",
        "weights",
        "fewer bytes",
        lambda f: f.save({k: v.to("meta") for k, v in f.weights.items()}, "x.pth"),
    ),
    FileFault("a list", "weights", "holds a list", lambda f: f.save([1, 2], "x.pth")),
    FileFault("another network", "weights", "covers", lambda f: f.save({"encoder.weight": torch.zeros(3)}, "x.pth")),
    FileFault(
        "the first stage alone",
        "weights",
        "covers",
        lambda f: f.save({k: v for k, v in f.weights.items() if k.startswith("layer1")}, "x.pth"),
    ),
]


@dataclass(frozen=True)
class StoredWish:
    """What a checkpoint's author may write into its configuration, and what evaluating it does about it.

    values: by path; `AUTHOR` stands for a folder that is not there, and never will be.
    """

    title: str
    outcome: str
    values: dict[str, Any]
    says: str | None = None  # the error's text; None: it is evaluated as if nothing were


AUTHOR = "AUTHOR"
ENDLESS = {"images": "/dev", "annotations": "/dev/zero"}
STORED_WISHES = [
    StoredWish(
        "generated data at a path of the author's",
        "refused",
        {"data/shapes/val/images": AUTHOR},
        "where a checkpoint says",
    ),
    StoredWish(
        "a thousand million images to generate", "refused", {"data/shapes/val/size": 10**9}, "where a checkpoint says"
    ),
    StoredWish("a run folder of the author's", "not used", {"output_dir": AUTHOR}),
    StoredWish(
        "a feature cache at a path of the author's",
        "not used",
        {"train/cache_features": "disk", "train/cache_dir": AUTHOR, "freeze": ["backbone"]},
    ),
    StoredWish("150 worker processes", "as many as there are cores", {"train/workers": 150}),
    StoredWish("weights to download", "not used", {"backbone/weights": "imagenet"}),
    StoredWish("a file to start from", "not used", {"init_from": AUTHOR}),
    StoredWish("log writers of a module", "not used", {"log/to": ["antigravity:x"]}),
    StoredWish("a head of a module", "refused", {"heads/shapes/type": "antigravity:x"}, "what code runs"),
    StoredWish("a backbone of a module", "refused", {"backbone/arch": "antigravity:x"}, "what code runs"),
    StoredWish("a data format of a module", "refused", {"data/shapes/format": "antigravity:x"}, "what code runs"),
    StoredWish("an environment variable", "refused", {"data/shapes/val/images": "${oc.env:HOME}"}, "not resolved"),
    StoredWish("a network address", "refused", {"data/shapes/val/images": "http://127.0.0.1:9/"}, "is not there"),
    StoredWish(
        "annotations that never end",
        "refused",
        {"data/shapes": {"format": "coco", "train": ENDLESS, "val": ENDLESS}},
        "not a regular file",
    ),
    StoredWish("names that steer the terminal", "shown as \\x1b", {"data/shapes/val/images": "\x1b[2J"}, r"\\x1b\[2J"),
]


@dataclass(frozen=True)
class MachineFault:
    """What a machine does to a run of four steps, with a checkpoint after each of which two are kept."""

    title: str
    outcome: str
    says: str
    plant: tuple[Callable[[], None], ...]  # what the process calls before it starts
    code: int = 2
    options: tuple[str, ...] = ("train.workers=1",)
    step: int | None = None  # of the newest checkpoint
    quiet: bool = True  # no traceback is shown, not even a worker's


def _module(name: str) -> Any:
    return importlib.import_module(f"detbb.{name}")


def limit_files_to_a_batch() -> None:
    """No file may be larger than a batch: shared memory is full, as posix_fallocate says it."""
    start = _module("data.workers").start_worker

    def limited(worker: int) -> None:
        start(worker)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    _module("data.loader").start_worker = limited


def limit_open_files() -> None:
    dataset = _module("data.loader").TrainDataset
    read, main = dataset.__getitems__, os.getpid()

    def limited(self: Any, keys: Any) -> Any:
        batch = read(self, keys)
        if os.getpid() != main:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        return batch

    dataset.__getitems__ = limited


def limit_open_files_for_images() -> None:
    """With `on_bad_image: skip`, no sound image may be left out for it."""
    _in_a_worker(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)))()


def _in_a_worker(act: Callable[[], object]) -> Callable[[], None]:
    def plant() -> None:
        dataset = _module("data.loader").TrainDataset
        read, main, calls = dataset.__getitems__, os.getpid(), itertools.count(1)

        def planted(self: Any, keys: Any) -> Any:
            if os.getpid() != main and next(calls) == 3:
                act()
            return read(self, keys)

        dataset.__getitems__ = planted

    return plant


def worker_is_killed() -> None:
    _in_a_worker(lambda: os.kill(os.getpid(), signal.SIGKILL))()


def worker_has_a_bus_error() -> None:
    _in_a_worker(lambda: os.kill(os.getpid(), signal.SIGBUS))()


def worker_leaves() -> None:
    _in_a_worker(lambda: os._exit(5))()


def data_never_come() -> None:
    _in_a_worker(lambda: time.sleep(600))()


def stop_after_two_steps() -> None:
    loop = _module("training.loop")
    honest, calls = loop.train_step, itertools.count(1)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        result = honest(*args, **kwargs)
        if next(calls) == 2:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return result

    loop.train_step = stopped


def stop_before_the_first_step() -> None:
    start = _module("training.start")
    honest = start.read_sources

    def stopped(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return honest(*args)

    start.read_sources = stopped


def little_shared_memory() -> None:
    _module("data.workers").shared_memory = lambda: 1000


def immutable_checkpoints() -> None:
    honest = Path.unlink

    def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.startswith("step_"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        honest(path, *args, **kwargs)

    Path.unlink = unlink  # type: ignore[method-assign]


def no_locks() -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse  # type: ignore[assignment]


def a_bare_share() -> None:
    """Neither permissions nor hard links."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    Path.chmod = os.link = refuse  # type: ignore[assignment, method-assign]


ENDS = "ends with cause and cure"
MACHINE_FAULTS = [
    MachineFault(
        "shared memory full: no room for a batch",
        ENDS,
        r"error: train.workers: a data worker found no room.*--shm-size.*train.workers: 0",
        (limit_files_to_a_batch,),
    ),
    MachineFault(
        "shared memory full: bus error",
        ENDS,
        r"error: .*no room for a batch in /dev/shm \(.*free\); .*--shm-size",
        (worker_has_a_bus_error,),
    ),
    MachineFault("too many open files", ENDS, "open no more files.*ulimit -n", (limit_open_files,), quiet=False),
    MachineFault(
        "too many open files, `on_bad_image: skip`",
        ENDS,
        r"(png: cannot be read: Too many open files|open no more files).*ulimit -n",
        (limit_open_files_for_images,),
        quiet=False,
        options=("train.workers=1", "data.shapes.on_bad_image=skip"),
    ),
    MachineFault("a data worker is killed", ENDS, "was killed.*memory.*lower", (worker_is_killed,)),
    MachineFault("a data worker leaves", ENDS, "ended.*train.workers: 0", (worker_leaves,)),
    MachineFault(
        "little shared memory", "warned", "WARNING: train.workers: 1 data workers may have", (little_shared_memory,), 0
    ),
    MachineFault(
        "data never come, and SIGTERM",
        "checkpoint, exit code 143",
        "go on with --resume",
        (data_never_come, stop_after_two_steps),
        143,
        ("train.workers=1", "checkpoint.every=100"),
        step=2,
    ),
    MachineFault(
        "SIGTERM while the data are read at the start", "exit code 143", "", (stop_before_the_first_step,), 143
    ),
    MachineFault(
        "old checkpoints that cannot be deleted",
        "warned",
        "WARNING: cannot remove .*step_0000001",
        (immutable_checkpoints,),
        0,
        step=4,
    ),
    MachineFault("a file system without locks", "warned", "WARNING: the file system .* knows no locks", (no_locks,), 0),
    MachineFault("a share without permissions and hard links", "accepted", "", (a_bare_share,), 0, step=4),
]


def tables() -> str:
    """The tables of docs/reliability.md."""
    data = ["| planted in the data | outcome |", "|---|---|"]
    data += [f"| {fault.title} | {fault.outcome} |" for fault in DATA_FAULTS]
    files = ["| read as | planted in the file; always refused, nothing executed |", "|---|---|"]
    for kind in ("checkpoint", "weights"):
        files.append(f"| {kind} | {'; '.join(fault.title for fault in FILE_FAULTS if fault.kind == kind)} |")
    wishes = ["| stored in a checkpoint that is evaluated | outcome |", "|---|---|"]
    wishes += [f"| {wish.title} | {wish.outcome} |" for wish in STORED_WISHES]
    parts = [f"{len(DATA_FAULTS)} faults of data:", "", *data, "", f"{len(FILE_FAULTS)} of files:", "", *files, ""]
    machine = ["| what a machine does to a run | outcome |", "|---|---|"]
    machine += [f"| {fault.title} | {fault.outcome} |" for fault in MACHINE_FAULTS]
    machine += ["| a second run on the folder, also with `--resume` | refused by the first one's name |"]
    machine += ["| a lock that a killed run held | goes on |"]
    parts += [f"{len(MACHINE_FAULTS) + 2} of machines:", "", *machine, ""]
    parts += [f"{len(STORED_WISHES)} wishes of a stranger's configuration:", "", *wishes, ""]
    return "\n".join(parts)


def document(text: str) -> str:
    """`text` with its tables renewed."""
    before, marker, _ = text.partition("<!-- the rest is made by tests/support/planted.py -->\n")
    return f"{before}{marker}\n{tables()}"


if __name__ == "__main__":
    DOCS.write_text(document(DOCS.read_text()))
