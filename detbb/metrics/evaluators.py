"""Metrics of a branch over a split: COCO AP of boxes, masks and keypoints, mean IoU, accuracy. All from 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detbb.data.formats.semantic import read_mask
from detbb.metrics.coco_ap import COCO_LIMIT, Kind, coco_evaluation, coco_ground_truth
from detbb.structures.annotations import Annotations
from detbb.structures.predictions import Predictions


def full_mask(mask: np.ndarray | Any, box: Any, hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool mask in the image, from (28, 28) probabilities in the box: above 0.5, as in torchvision."""
    return paste_masks_in_image(mask[None, None], box[None], hw)[0, 0].numpy() > 0.5


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed RLE of an (H, W) mask, with its counts as a string."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def coco_results(
    image_id: int, predictions: Predictions, category_ids: Sequence[int], hw: tuple[int, int]
) -> list[dict[str, Any]]:
    """Entries in COCO results format of one image's predictions in original pixels, on the CPU.

    Boxes are xywh; masks are compressed RLE of the whole image, a semantic map is one mask a class; an image-level
    entry holds all scores, a value is one entry a class. Raises FloatingPointError: a number is not finite (engines
    count NaN boxes as hits).
    """
    for name in ("boxes", "scores", "keypoints", "probabilities", "values"):
        value = getattr(predictions, name)
        if value is not None and not value.isfinite().all():
            raise FloatingPointError(f"predicted {name} of image {image_id} are not finite: {value}")
    if predictions.semantic is not None:
        semantic = predictions.semantic.numpy()
        masks = {int(category_ids[label]): encode_mask(semantic == label) for label in np.unique(semantic)}
        return [{"image_id": image_id, "category_id": c, "segmentation": mask} for c, mask in masks.items()]
    if predictions.values is not None:
        pairs = zip(category_ids, predictions.values.tolist(), strict=True)
        return [{"image_id": image_id, "category_id": int(number), "value": value} for number, value in pairs]
    if predictions.probabilities is not None:
        best = int(predictions.probabilities.argmax())
        scores = predictions.probabilities.tolist()
        return [{"image_id": image_id, "category_id": int(category_ids[best]), "score": scores[best], "scores": scores}]
    assert predictions.boxes is not None and predictions.scores is not None and predictions.labels is not None
    xywh = predictions.boxes.clone()
    xywh[:, 2:] -= xywh[:, :2]
    entries = []
    for i, (box, score, label) in enumerate(
        zip(xywh.tolist(), predictions.scores.tolist(), predictions.labels.tolist(), strict=True)
    ):
        entry = {"image_id": image_id, "category_id": int(category_ids[label]), "bbox": box, "score": score}
        if predictions.masks is not None:
            entry["segmentation"] = encode_mask(full_mask(predictions.masks[i], predictions.boxes[i], hw))
        if predictions.keypoints is not None:
            entry["keypoints"] = predictions.keypoints[i].flatten().tolist()
        entries.append(entry)
    return entries


class Evaluator:
    """Collects predictions of one branch over a split and computes its metrics. One per evaluation."""

    def __init__(self, annotations: Annotations) -> None:
        self._annotations = annotations
        self._index = {number: i for i, number in enumerate(annotations.image_ids.tolist())}
        self._ids: list[int] = annotations.category_ids.tolist()
        self._results: list[dict[str, Any]] = []

    def add(self, image_id: int, predictions: Predictions) -> None:
        """Take one image's predictions, already in original coordinates, on the CPU."""
        height, width = self._annotations.sizes[self._index[image_id]].tolist()
        self._results += coco_results(image_id, predictions, self._ids, (height, width))

    def state(self) -> list[dict[str, Any]]:
        """What was added here, as plain containers: gathered over ranks, and written as `results.json`.

        COCO results format with original category ids for boxes, masks and keypoints. One or more entries an image,
        each with `image_id`.
        """
        return self._results

    def summarize(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics of everybody's `state()` entries, sorted by image, 0–100, by Detectron2's names (`bbox/AP`)."""
        raise NotImplementedError

    def curves(self) -> dict[str, Any] | None:
        """Precision over recall of the last `summarize`, for `pr_curves.png`; None where there is none.

        {"recall": (R,), "precision": {title: (R,)}}
        """
        return None


class CocoEvaluator(Evaluator):
    """COCO's AP: `bbox/AP AP50 AP75 APs APm APl AP-<class>`, the same under `segm`, and `keypoints` (without APs).

    A number without ground truth (a class or size range that the split lacks) is left out.
    """

    def __init__(self, annotations: Annotations, kinds: Sequence[Kind] = ("bbox",), *, engine: str = "hotcoco") -> None:
        super().__init__(annotations)
        self._kinds, self._engine = kinds, engine
        self.max_detections = COCO_LIMIT  # of an image and class that count
        self._curves: dict[str, np.ndarray] = {}

    def summarize(self, results: list[dict[str, Any]]) -> dict[str, float]:
        metrics: dict[str, float | None] = {}
        self._curves = {}
        order = np.argsort(np.argsort(self._ids))  # engines sort classes by id
        for kind in self._kinds:
            truth = coco_ground_truth(self._annotations, kind)
            found = coco_evaluation(truth, results, kind, self._engine, self.max_detections)
            precision = found["precision"][..., -1][:, :, order]  # (10 IoUs, 101 recalls, C, areas)
            ranges = ("s", "m", "l") if kind != "keypoints" else ("m", "l")
            metrics[f"{kind}/AP"] = _mean(precision[..., 0])
            metrics[f"{kind}/AP50"] = _mean(precision[0, ..., 0])
            metrics[f"{kind}/AP75"] = _mean(precision[5, ..., 0])
            metrics |= {f"{kind}/AP{size}": _mean(precision[..., i]) for i, size in enumerate(ranges, 1)}
            for label, name in enumerate(self._annotations.classes):
                metrics[f"{kind}/AP-{name}"] = _mean(precision[:, :, label, 0])
            if self.max_detections != COCO_LIMIT:
                metrics[f"{kind}/max_detections"] = self.max_detections
            self._add_curves(kind, precision[..., 0])
        return {name: value for name, value in metrics.items() if value is not None}

    def _add_curves(self, kind: Kind, precision: np.ndarray) -> None:
        known = (precision > -1).all(axis=(0, 1))
        if known.any():
            measure = "OKS" if kind == "keypoints" else "IoU"
            self._curves[f"{kind}/all classes, {measure} 0.50"] = precision[0][:, known].mean(1)
            self._curves[f"{kind}/all classes, {measure} 0.75"] = precision[5][:, known].mean(1)
        for label in np.flatnonzero(known):
            self._curves[f"{kind}/{self._annotations.classes[label]}"] = precision[0, :, label]

    def curves(self) -> dict[str, Any] | None:
        """Titles are `<kind>/all classes, IoU 0.50`, `… 0.75`, and `<kind>/<class>` at 0.50."""
        return {"recall": np.linspace(0, 1, 101), "precision": self._curves} if self._curves else None


def _mean(precision: np.ndarray) -> float | None:
    """100 times the mean over what has ground truth; None if nothing has."""
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else None


class SemanticEvaluator(Evaluator):
    """`sem/mIoU fwIoU mACC pACC IoU-<class>`; a class in neither ground truth nor prediction is left out of the means.

    Results are Detectron2's `{image_id, category_id, segmentation}` plus `truth`: how many of these pixels the ground
    truth gives to which category id. So ranks share the counting, and the sums are exact.
    """

    def add(self, image_id: int, predictions: Predictions) -> None:
        assert predictions.semantic is not None
        truth = read_mask(self._annotations, self._index[image_id])
        predicted = predictions.semantic.numpy()
        for entry in coco_results(image_id, predictions, self._ids, predicted.shape):
            pixels = truth[predicted == self._ids.index(entry["category_id"])]
            counts = np.bincount(pixels, minlength=len(self._ids))[: len(self._ids)]
            entry["truth"] = {str(self._ids[label]): int(counts[label]) for label in np.flatnonzero(counts)}
            self._results.append(entry)

    def summarize(self, results: list[dict[str, Any]]) -> dict[str, float]:
        label = {number: i for i, number in enumerate(self._ids)}
        confusion = np.zeros((len(label), len(label)), dtype=np.int64)  # ground truth, prediction
        for entry in results:
            for number, pixels in entry["truth"].items():
                confusion[label[int(number)], label[entry["category_id"]]] += pixels
        hits, truth = np.diag(confusion), confusion.sum(1)
        union = truth + confusion.sum(0) - hits
        seen, present = union > 0, truth > 0
        iou = hits / np.maximum(union, 1)
        metrics = {}
        if present.any():
            metrics = {
                "sem/mIoU": iou[seen].mean(),
                "sem/fwIoU": (iou * truth).sum() / truth.sum(),
                "sem/mACC": (hits[present] / truth[present]).mean(),
                "sem/pACC": hits.sum() / truth.sum(),
            }
        metrics |= {f"sem/IoU-{name}": iou[i] for i, name in enumerate(self._annotations.classes) if seen[i]}
        return {name: 100 * float(value) for name, value in metrics.items()}


class ClassificationEvaluator(Evaluator):
    """Single label: `cls/accuracy accuracy-<class>` of images that have one class. Multi label: `cls/mAP AP-<class>`.

    An image has the classes of its objects, crowds too. Single label takes the images with exactly one class; the
    accuracy of a class is over the images that have it. AP is the area under the precision steps (as scikit-learn's).
    """

    def __init__(self, annotations: Annotations, *, multi_label: bool = False) -> None:
        super().__init__(annotations)
        self._multi_label = multi_label

    def summarize(self, results: list[dict[str, Any]]) -> dict[str, float]:
        data = self._annotations
        truth = np.zeros((len(data), len(data.classes)), dtype=bool)
        truth[np.repeat(np.arange(len(data)), np.diff(data.first)), data.labels] = True
        rows = [self._index[entry["image_id"]] for entry in results]
        truth, scores = truth[rows], np.array([entry["scores"] for entry in results]).reshape(-1, len(data.classes))
        values: dict[int, float]
        if self._multi_label:
            name, whole = "AP", "cls/mAP"
            known = np.flatnonzero(truth.any(0)).tolist()
            values = {label: _average_precision(truth[:, label], scores[:, label]) for label in known}
            mean = np.mean(list(values.values())) if values else None
        else:
            name, whole = "accuracy", "cls/accuracy"
            single = truth.sum(1) == 1
            label_of = truth[single].argmax(1)
            hit = scores[single].argmax(1) == label_of
            values = {label: float(hit[label_of == label].mean()) for label in np.unique(label_of).tolist()}
            mean = hit.mean() if len(hit) else None
        metrics: dict[str, float] = {} if mean is None else {whole: float(mean)}
        metrics |= {f"cls/{name}-{data.classes[label]}": value for label, value in values.items()}
        return {key: 100 * float(value) for key, value in metrics.items()}


def _average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Sum over distinct thresholds of gain in recall times precision; `truth` (N,) bool has at least one hit."""
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(truth[order])[last_of_tie]
    gains = np.diff(hits, prepend=0) / truth.sum()
    return float((gains * hits / (last_of_tie + 1)).sum())
