"""Small data sets for the data tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detbb.config.schema import Config, DataConfig, SplitConfig, TrainConfig
from detbb.data.formats import read_split
from detbb.data.formats.base import Request
from detbb.data.formats.coco import read_coco
from detbb.structures.annotations import Annotations


def write_coco(folder: Path, annotations: list[dict[str, Any]], **changes: Any) -> Path:
    """A COCO file with three images (ids 7, 0 and 900; the last without objects) and two classes (ids 3 and 90)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = [
        {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
        {"id": 0, "file_name": "a.png", "width": 20, "height": 50},
        {"id": 900, "file_name": "c.png", "width": 32, "height": 32},
    ]
    for k, image in enumerate(images):
        pixels = np.random.default_rng(k).integers(0, 256, (image["height"], image["width"], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    categories = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}]
    data = {"images": images, "annotations": annotations, "categories": categories} | changes
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    return path


def box(id: int, image: int, bbox: list[float], category: int = 3, **more: Any) -> dict[str, Any]:
    area = bbox[2] * bbox[3]
    return {"id": id, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0} | more


def read(folder: Path, annotations: list[dict[str, Any]], **changes: Any) -> Annotations:
    path = write_coco(folder, annotations, **changes)
    return read_coco(Request(folder / "images", path))


def shapes_source(folder: Path, *, train: int = 26, augment: Any = "default", size: int = 96) -> DataConfig:
    split = {"images": str(folder), "size": train}
    return DataConfig(
        format="shapes",
        train=SplitConfig(**split),
        val=SplitConfig(**split),
        image_size=[size, size + size // 3],
        augment=augment,
    )


def shapes_config(folder: Path, *, workers: int = 0, accumulate: int = 1, batch_size: int = 8, **source: Any) -> Config:
    train = TrainConfig(batch_size=batch_size, workers=workers, accumulate=accumulate)
    return Config(seed=3, device="cpu", data={"shapes": shapes_source(folder, **source)}, train=train)


def shapes_split(config: Config, split: str = "train") -> Annotations:
    annotations = read_split(config.data["shapes"], split, "shapes")
    assert annotations is not None
    return annotations
