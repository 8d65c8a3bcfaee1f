"""COCO's precision and recall, counted by hotcoco (or pycocotools, which it equals)."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal

import numpy as np

from detbb.data.formats.coco_json import coco_dict, no_garbage_collection
from detbb.structures.annotations import Annotations

Kind = Literal["bbox", "segm", "keypoints"]

COCO_LIMIT = 100
"""How many detections of an image and class COCO counts (20 for keypoints)."""
OTHER_SIGMA = 0.05
"""Every keypoint's OKS sigma when there are not COCO's 17 (whose own go from 0.025 to 0.107)."""


def coco_ground_truth(annotations: Annotations, kind: Kind = "bbox") -> dict[str, Any]:
    """The split as a COCO dict, for the engines.

    `segm`: an object without a mask is a region to ignore, neither missed nor a place for false positives.
    """
    truth = coco_dict(annotations, masks=kind == "segm", keypoints=kind == "keypoints")
    for item in truth["annotations"]:
        if item.get("segmentation", True) == []:
            x, y, w, h = item["bbox"]
            item |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": 1}
    return {"info": {}, **truth}


def _box_columns(results: list[dict[str, Any]]) -> np.ndarray | None:
    """(N, 7) image id, x, y, w, h, score, category id; None for ids that a float64 rounds."""
    images, categories = ([entry[key] for entry in results] for key in ("image_id", "category_id"))
    if not results or max(max(images), max(categories)) > 2**53:
        return None
    columns = np.empty((len(results), 7))
    columns[:, 0], columns[:, 6] = images, categories
    columns[:, 1:5] = [entry["bbox"] for entry in results]
    columns[:, 5] = [entry["score"] for entry in results]
    return columns


@no_garbage_collection()
def coco_evaluation(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: Kind, engine: str, limit: int = COCO_LIMIT
) -> dict[str, Any]:
    """`precision` (IoU thresholds, 101 recalls, C by ascending id, areas, limits) and `recall` (IoU, C, areas, limits).

    -1 where there is no ground truth. limit: how many detections of an image and class count.
    Without any results it is hotcoco whatever the engine: pycocotools fails on none.
    """
    if kind != "bbox":  # without its bbox, a detection's area is that of its mask or its keypoints' extent: COCO's way
        keys = {"image_id", "category_id", "score", {"segm": "segmentation"}.get(kind, kind)}
        results = [{key: value for key, value in entry.items() if key in keys} for entry in results]
    points = next((len(o["keypoints"]) // 3 for o in truth["annotations"] if "keypoints" in o), 17)
    evaluation: Any
    with contextlib.redirect_stdout(io.StringIO()):
        if engine == "hotcoco" or not results:
            import hotcoco

            ground = hotcoco.COCO(truth)
            columns = _box_columns(results) if kind == "bbox" else None
            evaluation = hotcoco.COCOeval(ground, ground.load_res(results if columns is None else columns), kind)
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            ground = COCO()
            ground.dataset = truth
            ground.createIndex()
            evaluation = COCOeval(ground, ground.loadRes(results), kind)
        if kind == "keypoints" and points != 17:
            evaluation.params.kpt_oks_sigmas = np.full(points, OTHER_SIGMA)
        if limit != COCO_LIMIT:
            evaluation.params.maxDets = [limit] if kind == "keypoints" else [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    return {name: np.asarray(evaluation.eval[name]) for name in ("precision", "recall")}
