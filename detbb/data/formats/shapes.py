"""A generated data set: circles, rectangles and triangles on textured backgrounds, with boxes, masks and keypoints."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from detbb.core.errors import UserError
from detbb.core.files import make_folder
from detbb.data.formats.base import Request
from detbb.data.formats.coco import read_coco
from detbb.structures.annotations import Annotations

CLASSES = ("circle", "rectangle", "triangle")  # category ids and mask values 1, 2, 3; mask value 0 is background
KEYPOINTS = ("top", "right", "bottom", "left")  # the outermost points of each shape
SIZES = {"train": 1000, "val": 200}
_SEEDS = {"train": 1, "val": 2}
_VERSION = "detbb shapes 2"
_IMAGE_HW = ((128, 128), (128, 128), (128, 112), (112, 128))
_MIN_VISIBLE = 0.6  # of a shape; objects that are hidden further are not drawn


def read_shapes(request: Request) -> Annotations:
    """The split's objects with boxes, masks and keypoints, generated if they are not there."""
    config = request.source.train if request.split == "train" else request.source.val
    size = None if config is None else config.size
    folder = generate_shapes(request.images, request.split, size, may_write=request.may_write)
    images, file = folder / "images", folder / "annotations.json"
    return read_coco(Request(images, file, classes=request.classes, exact=request.exact))


def generate_shapes(root: Path, split: str, size: int | None = None, *, may_write: bool = True) -> Path:
    """The folder of one split, made on first use: `root/<split>_<size>/`.

    It holds `images/` (PNG), `annotations.json` (COCO boxes, masks, keypoints), `masks/` (class-index PNG) and
    `classes.json`, so that the formats `coco` and `semantic` read it too. The same split and size give the same bytes.
    It appears whole or not at all, also when several processes make it at once. Raises: UserError: it is not there and
    must not be made (not `may_write`); something else is.
    """
    count = SIZES[split] if size is None else size
    folder = root / f"{split}_{count}"
    if not folder.exists() and not may_write:
        raise UserError(
            f"{folder} is not there, and no data is generated where a checkpoint says; give a file with --config"
        )
    make_folder(folder, lambda unfinished: _write(unfinished, split, count))
    with suppress(OSError, UnicodeDecodeError), open(folder / "annotations.json", encoding="utf-8") as file:
        if _VERSION in file.read(len(_VERSION) + 64):
            return folder
    raise UserError(f"{folder}: is not a set made by {_VERSION!r}; remove it, or name another folder in `images`")


def _write(folder: Path, split: str, count: int) -> None:
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for sub in ("images", "masks"):
        (folder / sub).mkdir()
    for number in range(1, count + 1):
        rng = np.random.default_rng([_SEEDS[split], number])
        image, mask, found = _draw(rng)
        name = f"{number:06d}.png"
        _save_png(folder / "images" / name, image[..., ::-1])
        _save_png(folder / "masks" / name, mask)
        images.append({"id": number, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        objects += [{"id": len(objects) + k, "image_id": number, **o} for k, o in enumerate(found, start=1)]
    categories = [{"id": i, "name": n, "keypoints": list(KEYPOINTS)} for i, n in enumerate(CLASSES, start=1)]
    coco = {"info": {"description": _VERSION}, "images": images, "annotations": objects, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(coco), encoding="utf-8")
    names = {str(i): n for i, n in enumerate(("background", *CLASSES))}
    (folder / "classes.json").write_text(json.dumps(names, indent=1), encoding="utf-8")


def _save_png(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes())


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """One image (h, w, 3) RGB, its class-index mask (h, w), and its objects in COCO form without ids."""
    height, width = _IMAGE_HW[rng.integers(len(_IMAGE_HW))]
    image = _texture(rng, height, width, rng.uniform(40, 215, 3), spread=60)
    owner = np.full((height, width), -1)  # which shape each pixel shows
    shapes: list[tuple[int, np.ndarray, np.ndarray]] = []  # class, outline, whole mask
    for _ in range(rng.integers(1, 6) if rng.random() > 0.05 else 0):
        label = int(rng.integers(len(CLASSES)))
        outline = _outline(rng, label, height, width)
        whole = _fill(outline, height, width)
        hidden = [(m & (owner == k) & ~whole).sum() < _MIN_VISIBLE * m.sum() for k, (_, _, m) in enumerate(shapes)]
        if any(hidden):
            continue
        background = image[whole].mean(axis=0)
        colour = (background + rng.uniform(90, 165, 3) * np.where(background > 127, -1, 1)).clip(0, 255)
        image[whole] = _texture(rng, height, width, colour, spread=15)[whole]
        owner[whole] = len(shapes)
        shapes.append((label, outline, whole))
    mask = np.zeros((height, width), dtype=np.uint8)
    for k, (label, _, _) in enumerate(shapes):
        mask[owner == k] = label + 1
    return image, mask, [_object(label, outline, whole, owner == k) for k, (label, outline, whole) in enumerate(shapes)]


def _texture(rng: np.random.Generator, height: int, width: int, colour: np.ndarray, *, spread: float) -> np.ndarray:
    """(height, width, 3) uint8: `colour` with smooth blotches and grain."""
    blotches = rng.uniform(-spread, spread, (int(rng.integers(3, 12)), int(rng.integers(3, 12)), 3))
    smooth = cv2.resize(blotches, (width, height), interpolation=cv2.INTER_CUBIC)
    return (colour + smooth + rng.normal(0, spread / 6, (height, width, 1))).clip(0, 255).astype(np.uint8)


def _outline(rng: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    """(points, 2) x, y of a shape that lies inside the image."""
    radius = rng.uniform(12, 36)
    if CLASSES[label] == "rectangle":
        half = radius * np.array([1, rng.uniform(0.45, 1)])
        points = half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    else:
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        if CLASSES[label] == "triangle":
            angles = np.array([-np.pi / 2, np.pi / 6, 5 * np.pi / 6]) + rng.uniform(-0.2, 0.2, 3)
        points = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    turn = rng.uniform(-0.3, 0.3)  # upright enough that a few minutes of training tell the classes apart
    points = points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    low, high = -points.min(axis=0), np.array([width, height]) - points.max(axis=0)
    return np.round(points + rng.uniform(low, high), 2)


def _fill(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    (code,) = coco_mask.frPyObjects([outline.ravel().tolist()], height, width)
    return coco_mask.decode(code).astype(bool)


def _object(label: int, outline: np.ndarray, whole: np.ndarray, visible: np.ndarray) -> dict[str, Any]:
    """A whole shape gets its outline as polygon; a partly hidden one what is left of it as run-length code."""
    code = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
    segmentation: Any = [outline.ravel().tolist()]
    box = [*outline.min(axis=0).tolist(), *np.ptp(outline, axis=0).tolist()]
    if not np.array_equal(whole, visible):
        segmentation = {"size": list(visible.shape), "counts": code["counts"].decode("ascii")}
        box = coco_mask.toBbox(code).tolist()
    x, y = outline.T
    keypoints: list[float] = []
    for point in outline[[y.argmin(), x.argmax(), y.argmax(), x.argmin()]]:
        column, row = np.minimum(point.astype(int), np.array(visible.shape[::-1]) - 1)
        near = visible[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        keypoints += [*point.tolist(), 2 if near.any() else 1]
    return {
        "category_id": label + 1,
        "bbox": [round(v, 2) for v in box],
        "area": float(visible.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
        "keypoints": keypoints,
        "num_keypoints": len(KEYPOINTS),
    }
