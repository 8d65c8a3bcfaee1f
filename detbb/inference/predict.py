"""Predictions of a checkpoint's branches for image files: drawn images and COCO-style JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detbb.checkpoint.content import opened, restore_detector
from detbb.config.schema import DataConfig
from detbb.core.console import warn
from detbb.core.errors import UserError
from detbb.core.files import check_folder
from detbb.core.machine import check_batch
from detbb.data.images import BadImage, list_images, read_image
from detbb.data.transforms import Sample, Transform, resize
from detbb.detector import Detector
from detbb.distributed.processes import processes
from detbb.inference.evaluate import write_json, write_png
from detbb.metrics.evaluators import coco_results
from detbb.report import plots
from detbb.structures.batch import ImageSize, collate
from detbb.structures.class_list import ClassList
from detbb.structures.predictions import Predictions


def predict(
    checkpoint: str | Path,
    inputs: str | Path | Sequence[str | Path],
    *,
    output_dir: str | Path | None = None,
    heads: Sequence[str] | None = None,
    threshold: float | None = None,
) -> list[dict[str, Any]]:
    """What the branches say about each image: `{"id", "file_name", "width", "height", "heads": {name: [entries]}}`.

        entries = detbb.predict("best.pt", "photos", threshold=0.5)[0]["heads"]["objects"]

    Entries are COCO results in pixels of the upright image plus `category`, from all branches in one backbone pass at
    the image size of the first branch's data. inputs: files, and folders that are searched throughout. heads: all, or
    these. threshold: least score; each head's own if None. With `output_dir`, writes `predictions.json` and a picture
    of each image and head, never over an input. A file that is no image is reported on stderr and left out.

    Raises: UserError: the checkpoint or a name cannot be used, or no input can be read.
    """
    content, config, names = opened(checkpoint, heads)
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g} is no score; valid are numbers from 0 to 1")
    least = {n: config.heads[n].threshold if threshold is None else threshold for n in names}
    source = config.data[config.heads[names[0]].data]
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        check_folder(folder)
    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    found = list(find_images(inputs, folder))
    taken = {path.resolve() for path, _ in found}
    entries: list[dict[str, Any]] = []
    with processes(config) as device:
        detector = restore_detector(content).to(device)
        for path, relative in found:
            try:
                image = read_image(path, source.max_pixels)
            except BadImage as error:
                warn(f"skipped: {error}")
                continue
            said = predict_image(detector, image, source, heads=names)
            said = {name: above(p, least[name]) for name, p in said.items()}
            entry = _entry(len(entries) + 1, path, image, said, detector.classes)
            if folder is not None:
                entry["pictures"] = {}
                for name, picture in free_names(folder, relative, names, taken).items():
                    drawn = plots.draw_predictions(
                        image, said[name], detector.classes[name].names, threshold=least[name]
                    )
                    write_png(picture, drawn)
                    entry["pictures"][name] = picture.relative_to(folder).as_posix()
            entries.append(entry)
    if not entries:
        raise UserError(f"no image to predict on among {len(found)} files of: {', '.join(map(str, inputs))}")
    if folder is not None:
        write_json(folder / "predictions.json", entries)
    return entries


def predict_image(
    detector: Detector, image: np.ndarray, source: DataConfig, *, heads: Sequence[str]
) -> dict[str, Predictions]:
    """What the heads say about one (H, W, 3) uint8 RGB image, in its pixels, on the CPU; resized as `source` says."""
    height, width = image.shape[:2]
    hw = Transform(source, train=False).size((height, width), 0)
    check_batch(1, hw, "data.<name>.image_size")
    resized = resize(Sample(image, np.zeros((0, 4)), np.zeros(0, np.int64)), hw).image
    batch = collate([torch.from_numpy(resized).permute(2, 0, 1)], [], "")
    device = next(detector.parameters()).device
    size = ImageSize(hw, (height, width))
    predicted = detector.predict(batch.images.to(device), [size], heads=heads)
    return {name: one.to_original(size).map(Tensor.cpu) for name, (one,) in predicted.items()}


def above(predictions: Predictions, threshold: float) -> Predictions:
    """Only the objects that reach the threshold."""
    if predictions.scores is None:
        return predictions
    keep = predictions.scores >= threshold
    return predictions.map(lambda value: value[keep])


def find_images(inputs: Sequence[str | Path], output_dir: Path | None) -> Iterator[tuple[Path, Path]]:
    """Each file, and its name below its input folder. Files in an `output_dir` inside an input folder are left out."""
    made = None if output_dir is None else output_dir.resolve()
    for item in map(Path, inputs):
        if not item.is_dir():
            yield item, Path(item.name)
            continue
        if item.resolve() == made:
            why = "the next time its pictures would be predicted on"
            raise UserError(f"--output-dir: {output_dir} is an input, too, and {why}; name another folder")
        names, unread = list_images(item)
        for name in unread:
            warn(f"skipped: {item / name}: is in a format that is not read; convert it to JPEG or PNG")
        for name in names:
            if made is None or not (item / name).resolve().is_relative_to(made):
                yield item / name, Path(name)


def free_names(folder: Path, relative: Path, heads: Sequence[str], taken: set[Path]) -> dict[str, Path]:
    """`folder/<relative>.<head>.png`, numbered if an input or another picture has that name; adds them to `taken`."""
    number = 1
    while True:
        stem = relative.stem if number == 1 else f"{relative.stem}_{number}"
        paths = {head: folder / relative.parent / f"{stem}.{head}.png" for head in heads}
        if not taken.intersection(path.resolve() for path in paths.values()):
            taken.update(path.resolve() for path in paths.values())
            return paths
        number += 1


def _entry(
    number: int, path: Path, image: np.ndarray, said: dict[str, Predictions], classes: dict[str, ClassList]
) -> dict[str, Any]:
    hw = (image.shape[0], image.shape[1])
    results = {name: coco_results(number, p, classes[name].category_ids, hw) for name, p in said.items()}
    for name, found in results.items():
        categories = dict(zip(classes[name].category_ids, classes[name].names, strict=True))
        for result in found:
            result["category"] = categories[result["category_id"]]
    return {"id": number, "file_name": str(path), "width": hw[1], "height": hw[0], "heads": results}
