"""The metrics, against pycocotools and against hand-made cases."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detbb.metrics.coco_ap import coco_evaluation, coco_ground_truth
from detbb.metrics.evaluators import ClassificationEvaluator, CocoEvaluator, SemanticEvaluator
from detbb.structures.annotations import Annotations, PackedStrings, Segments
from detbb.structures.predictions import Predictions

COCO_TINY = Path(os.environ.get("DETBB_DATA", Path(__file__).parents[2] / "shared/data")) / "coco-tiny"


def annotations_of(content: dict, *, keypoints: int = 0, **more: object) -> Annotations:
    """Arrays of a COCO dict, made here so that the readers are not part of what is tested."""
    categories, images = content["categories"], content["images"]
    label = {c["id"]: i for i, c in enumerate(categories)}
    by_image: list[list[dict]] = [[a for a in content["annotations"] if a["image_id"] == i["id"]] for i in images]
    objects = [a for group in by_image for a in group]
    points = np.array([a["keypoints"] for a in objects], np.float32).reshape(-1, keypoints, 3) if keypoints else None
    return Annotations(
        root=Path("."),
        classes=tuple(c["name"] for c in categories),
        category_ids=np.array([c["id"] for c in categories]),
        image_ids=np.array([i["id"] for i in images]),
        file_names=PackedStrings(i["file_name"] for i in images),
        sizes=np.array([(i["height"], i["width"]) for i in images], np.int32),
        first=np.cumsum([0] + [len(group) for group in by_image]),
        boxes_xywh=np.array([a["bbox"] for a in objects], np.float64).reshape(-1, 4),
        labels=np.array([label[a["category_id"]] for a in objects], np.int32),
        crowd=np.array([bool(a["iscrowd"]) for a in objects]),
        areas=np.array([a["area"] for a in objects], np.float64),
        object_ids=np.array([a["id"] for a in objects]),
        segments=Segments([([a.get("segmentation") for a in objects], None)])
        if any("segmentation" in a for a in objects)
        else None,
        keypoints=points,
        **more,
    )


def scene(seed: int, *, keypoints: int = 0) -> tuple[dict, list[dict]]:
    """A COCO dict with gaps in ids, crowds, all sizes, images without objects; and noisy detections."""
    rng = np.random.default_rng(seed)
    ids = [90, 3, 17, 5]  # 5 has no ground truth
    content = {
        "images": [{"id": 1000 - 7 * i, "height": 300, "width": 400, "file_name": f"{i}.jpg"} for i in range(24)],
        "categories": [{"id": number, "name": f"class {number}"} for number in ids],
        "annotations": [],
    }
    results: list[dict] = []
    for image in content["images"][:20]:
        for _ in range(rng.integers(0, 9)):
            wh = rng.choice([12, 50, 130]) * rng.uniform(0.6, 1.4, 2)
            xy = rng.uniform(0, [400 - wh[0], 300 - wh[1]])
            box = [*xy.tolist(), *wh.tolist()]
            x, y, w, h = box
            polygon = [x, y, x + w, y + h / 3, x + w, y + h, x + w / 4, y + h]
            item = {"id": len(content["annotations"]) + 1, "image_id": image["id"], "bbox": box, "area": w * h * 0.7}
            item |= {"category_id": int(rng.choice(ids[:3])), "iscrowd": int(rng.random() < 0.15)}
            item |= {"segmentation": [polygon]}
            if item["iscrowd"]:
                item["segmentation"] = coco_mask.merge(coco_mask.frPyObjects([polygon], 300, 400))
                item["segmentation"]["counts"] = item["segmentation"]["counts"].decode()
            if keypoints:
                points = np.concatenate(
                    [xy + wh * rng.uniform(0, 1, (keypoints, 2)), rng.integers(0, 3, (keypoints, 1))], 1
                )
                points[:, 2] *= rng.random() > 0.2
                item["keypoints"] = points.ravel().astype(np.float32).tolist()
                item["num_keypoints"] = int((points[:, 2] > 0).sum())
            content["annotations"].append(item)
            results += [perturbed(item, rng, image) for _ in range(rng.integers(0, 4))]
    return content, results


def perturbed(item: dict, rng: np.random.Generator, image: dict) -> dict:
    """A detection near an annotated object, with boxes and masks in result form."""
    height, width = image["height"], image["width"]
    shift = rng.normal(0, 0.08, 4) * item["bbox"][2]
    rle = item["segmentation"]
    if isinstance(rle, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(rle, height, width))
    elif isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, height, width)
    mask = np.roll(coco_mask.decode(rle), rng.integers(-4, 5, 2), (0, 1))
    rle = coco_mask.encode(np.asfortranarray(mask))
    result = {"image_id": item["image_id"], "category_id": item["category_id"], "score": round(rng.random(), 2)}
    result |= {"bbox": (np.array(item["bbox"]) + shift).tolist()}
    result |= {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
    if "keypoints" in item:
        points = np.array(item["keypoints"]).reshape(-1, 3)
        points[:, :2] += rng.normal(0, 3, (len(points), 2))
        result["keypoints"] = points.ravel().tolist()
    return result


def twelve_of_pycocotools(content: dict, results: list[dict], kind: str) -> np.ndarray:
    """`stats` of the reference implementation on the file's own dict, not on ours."""
    drop = {"bbox": (), "segm": ("bbox",), "keypoints": ("bbox", "segmentation")}[kind]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(content))
        truth.createIndex()
        given = [{k: v for k, v in json.loads(json.dumps(r)).items() if k not in drop} for r in results]
        evaluation = COCOeval(truth, truth.loadRes(given), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def twelve(evaluation: dict[str, np.ndarray], kind: str) -> list[float]:
    precision, recall = evaluation["precision"], evaluation["recall"]

    def mean(values: np.ndarray) -> float:
        return float(np.mean(values[values > -1])) if (values > -1).any() else -1.0

    areas = range(1, precision.shape[3])
    p = [precision[..., 0, -1], precision[0, ..., 0, -1], precision[5, ..., 0, -1]]
    p += [precision[..., area, -1] for area in areas]
    if kind == "keypoints":
        r = [recall[..., 0, -1], recall[0, ..., 0, -1], recall[5, ..., 0, -1]]
    else:
        r = [recall[..., 0, limit] for limit in range(3)]
    r += [recall[..., area, -1] for area in areas]
    return [mean(values) for values in p + r]


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", range(3))
def test_the_twelve_numbers_equal_pycocotools(seed: int, kind: str, engine: str) -> None:
    content, results = scene(seed, keypoints=17)
    ours = coco_evaluation(coco_ground_truth(annotations_of(content, keypoints=17), kind), results, kind, engine)
    reference = twelve_of_pycocotools(content, results, kind)
    assert 0.05 < reference[0] < 0.95
    np.testing.assert_allclose(twelve(ours, kind), reference, rtol=0, atol=1e-12)


@pytest.mark.skipif(not COCO_TINY.is_dir(), reason=f"needs {COCO_TINY}")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_twelve_numbers_equal_pycocotools_on_coco(kind: str, split: str) -> None:
    content = json.loads((COCO_TINY / f"annotations/instances_{split}.json").read_text())
    rng = np.random.default_rng(5)
    images = {image["id"]: image for image in content["images"]}
    assert any(item["iscrowd"] for item in content["annotations"])
    chosen = [item for item in content["annotations"] if item["iscrowd"] or rng.random() < 0.7]
    results = [perturbed(item, rng, images[item["image_id"]]) for item in chosen]
    ours = coco_evaluation(coco_ground_truth(annotations_of(content), kind), results, kind, "hotcoco")
    reference = twelve_of_pycocotools(content, results, kind)
    assert 0.05 < reference[0] < 0.95
    np.testing.assert_allclose(twelve(ours, kind), reference, rtol=0, atol=1e-12)


def test_metric_names_and_classes_follow_detectron2() -> None:
    content, results = scene(0)
    evaluator = CocoEvaluator(annotations_of(content), ("bbox", "segm"))
    metrics = evaluator.summarize(results)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-class 90", "AP-class 3", "AP-class 17"]
    assert list(metrics) == [f"{kind}/{name}" for kind in ("bbox", "segm") for name in names]
    reference = twelve_of_pycocotools(content, results, "bbox")
    assert [metrics[f"bbox/{n}"] for n in names[:6]] == pytest.approx((100 * reference[:6]).tolist(), abs=1e-9)
    alone = content | {"annotations": [a for a in content["annotations"] if a["category_id"] == 90]}
    reference = twelve_of_pycocotools(alone, [r for r in results if r["category_id"] == 90], "bbox")
    assert metrics["bbox/AP-class 90"] == pytest.approx(100 * reference[0], abs=1e-9)
    curves = evaluator.curves()
    assert curves is not None and "segm/class 17" in curves["precision"] and "bbox/class 5" not in curves["precision"]
    assert curves["precision"]["bbox/all classes, IoU 0.50"].mean() * 100 == pytest.approx(metrics["bbox/AP50"])
    assert curves["precision"]["bbox/class 3"].shape == curves["recall"].shape == (101,)


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_no_detections_at_all_score_zero(engine: str) -> None:
    metrics = CocoEvaluator(annotations_of(scene(0)[0]), engine=engine).summarize([])
    assert metrics["bbox/AP"] == 0 and set(metrics.values()) == {0}


def test_a_split_without_objects_has_no_numbers() -> None:
    content, results = scene(0)
    assert CocoEvaluator(annotations_of(content | {"annotations": []})).summarize(results) == {}


def test_results_hold_original_ids_boxes_masks_and_keypoints() -> None:
    content, _ = scene(0, keypoints=2)
    evaluator = CocoEvaluator(annotations_of(content, keypoints=2), ("bbox", "segm", "keypoints"))
    box, masks = torch.tensor([[10.0, 20.0, 110.0, 80.0]]), torch.zeros(1, 28, 28)
    masks[0, :, 14:] = 1  # the right half
    points = torch.tensor([[[1.5, 2.5, 0.9], [3.0, 4.0, 0.1]]])
    evaluator.add(993, Predictions(box, torch.tensor([0.25]), torch.tensor([1]), masks, points))
    entry = json.loads(json.dumps(evaluator.state()[0]))
    assert (entry["image_id"], entry["category_id"], entry["score"]) == (993, 3, 0.25)
    assert entry["bbox"] == [10, 20, 100, 60]
    assert entry["keypoints"] == pytest.approx([1.5, 2.5, 0.9, 3, 4, 0.1])
    mask = coco_mask.decode(entry["segmentation"])
    assert mask.shape == (300, 400) and mask[25:75, 65:108].all() and not mask[:, :55].any() and not mask[85:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    evaluator = CocoEvaluator(annotations_of(scene(0)[0]))
    with pytest.raises(FloatingPointError, match="boxes of image 993"):
        evaluator.add(993, Predictions(torch.tensor([[0, 0, bad, 1]]), torch.tensor([0.5]), torch.tensor([0])))
    with pytest.raises(FloatingPointError, match="scores"):
        evaluator.add(993, Predictions(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([bad]), torch.tensor([0])))


def test_objects_without_a_mask_are_ignored_by_mask_ap() -> None:
    content, _ = scene(0)
    rng = np.random.default_rng(0)
    results = [perturbed(item, rng, content["images"][0]) for item in content["annotations"]]
    before = CocoEvaluator(annotations_of(content), ("segm",)).summarize(results)
    more = dict(content["annotations"][0], id=10_000, bbox=[300, 200, 90, 90], segmentation=[], iscrowd=0)
    content["annotations"].append(more)
    assert CocoEvaluator(annotations_of(content), ("segm",)).summarize(results) == before
    assert CocoEvaluator(annotations_of(content), ("bbox",)).summarize(results)["bbox/AP"] > 0


def test_keypoints_other_than_17_equal_pycocotools() -> None:
    content, results = scene(1, keypoints=5)
    data = annotations_of(content, keypoints=5)
    ours, reference = (
        CocoEvaluator(data, ("keypoints",), engine=e).summarize(results) for e in ("hotcoco", "pycocotools")
    )
    assert ours == pytest.approx(reference, abs=1e-10) and ours["keypoints/AP"] > 10
    assert "keypoints/APs" not in ours


def semantic_data(folder: Path, masks: list[np.ndarray]) -> Annotations:
    for i, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"{i}.png")
    height, width = masks[0].shape
    content = {
        "images": [
            {"id": 10 * i, "height": height, "width": width, "file_name": f"{i}.jpg"} for i in range(len(masks))
        ],
        "categories": [{"id": 7 * (i + 1), "name": name} for i, name in enumerate(("sky", "road", "sea", "never"))],
        "annotations": [],
    }
    values = np.full(256, 255, np.uint8)
    values[[10, 20, 30, 40]] = range(4)
    files = PackedStrings(str(folder / f"{i}.png") for i in range(len(masks)))
    return annotations_of(content, mask_files=files, mask_values=values)


def test_semantic_metrics_of_a_case_counted_by_hand(tmp_path: Path) -> None:
    truth = np.full((4, 5), 10, np.uint8)
    truth[2:] = 20  # 10 pixels of sky, 10 of road
    truth[0] = 99  # the first row is ignored: 5 of sky are left
    data = semantic_data(tmp_path, [truth])
    predicted = torch.zeros(4, 5, dtype=torch.uint8)
    predicted[3] = 1  # half of the road
    predicted[1, 0] = 2  # one pixel of sky is called sea, which is not there
    predicted[0] = 3  # ignored
    evaluator = SemanticEvaluator(data)
    evaluator.add(0, Predictions(semantic=predicted))
    metrics = evaluator.summarize(json.loads(json.dumps(evaluator.state())))
    assert metrics == pytest.approx(
        {
            "sem/mIoU": 100 * (4 / 10 + 5 / 10 + 0) / 3,
            "sem/fwIoU": 100 * (5 * 4 / 10 + 10 * 5 / 10) / 15,
            "sem/mACC": 100 * (4 / 5 + 5 / 10) / 2,
            "sem/pACC": 100 * 9 / 15,
            "sem/IoU-sky": 40,
            "sem/IoU-road": 50,
            "sem/IoU-sea": 0,
        }
    )
    entry = evaluator.state()[0]
    assert entry["category_id"] == 7 and entry["truth"] == {"7": 4, "14": 5}
    assert (coco_mask.decode(entry["segmentation"]) == (predicted.numpy() == 0)).all()


def test_semantic_results_of_shares_add_up_to_those_of_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = semantic_data(tmp_path, [rng.choice([10, 20, 30, 50], (9, 7)).astype(np.uint8) for _ in range(5)])
    predicted = [torch.from_numpy(rng.integers(0, 4, (9, 7), dtype=np.uint8)) for _ in range(5)]
    whole, shares = SemanticEvaluator(data), [SemanticEvaluator(data), SemanticEvaluator(data)]
    for i, semantic in enumerate(predicted):
        whole.add(10 * i, Predictions(semantic=semantic))
        shares[i % 2].add(10 * i, Predictions(semantic=semantic))
    together = sorted(shares[1].state() + shares[0].state(), key=lambda entry: entry["image_id"])
    assert together == whole.state()
    assert whole.summarize(together) == shares[0].summarize(together)


def labels_data(classes_of_images: list[list[int]]) -> Annotations:
    content = {
        "images": [{"id": i + 1, "height": 9, "width": 9, "file_name": ""} for i in range(len(classes_of_images))],
        "categories": [{"id": 5 * (c + 1), "name": f"c{c}"} for c in range(3)],
        "annotations": [
            {"image_id": i + 1, "category_id": 5 * (c + 1), "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0, "id": 1}
            for i, classes in enumerate(classes_of_images)
            for c in classes
        ],
    }
    return annotations_of(content)


def test_accuracy_counts_the_best_class() -> None:
    evaluator = ClassificationEvaluator(labels_data([[0], [0, 0], [1], [1, 2]]))  # the last has two classes: left out
    for i, scores in enumerate([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [1, 0, 0]]):
        evaluator.add(i + 1, Predictions(probabilities=torch.tensor(scores)))
    assert evaluator.state()[1]["category_id"] == 10
    metrics = evaluator.summarize(evaluator.state()[::-1])
    assert metrics == pytest.approx({"cls/accuracy": 200 / 3, "cls/accuracy-c0": 50, "cls/accuracy-c1": 100})


def test_multi_label_map_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((40, 3)) < [0.5, 0.2, 0]
    scores = rng.integers(0, 12, (40, 3)) / 12  # many ties
    evaluator = ClassificationEvaluator(labels_data([np.flatnonzero(row).tolist() for row in truth]), multi_label=True)
    for i, row in enumerate(scores):
        evaluator.add(i + 1, Predictions(probabilities=torch.tensor(row)))
    expected = []
    for c in range(2):
        area, recall_before = 0.0, 0.0
        for threshold in sorted(set(scores[:, c]), reverse=True):
            found = scores[:, c] >= threshold
            recall = (found & truth[:, c]).sum() / truth[:, c].sum()
            area += (recall - recall_before) * (found & truth[:, c]).sum() / found.sum()
            recall_before = recall
        expected.append(100 * area)
    metrics = evaluator.summarize(evaluator.state())
    assert metrics == pytest.approx({"cls/mAP": np.mean(expected), "cls/AP-c0": expected[0], "cls/AP-c1": expected[1]})


def test_the_limit_of_detections_is_that_of_ap_and_is_named():
    """400 objects an image, all found: COCO counts 100 of them, so that the highest AP is 26 of 101 recalls."""
    boxes = [[10 * (k % 20), 10 * (k // 20), 8, 8] for k in range(400)]
    objects = [
        {"id": k + 1, "image_id": 1, "category_id": 1, "bbox": b, "area": 64, "iscrowd": 0} for k, b in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}],
        "annotations": objects,
        "categories": [{"id": 1, "name": "cell"}],
    }
    results = [{"image_id": 1, "category_id": 1, "bbox": b, "score": 1 - k / 1000} for k, b in enumerate(boxes)]
    for engine in ("hotcoco", "pycocotools"):
        evaluator = CocoEvaluator(annotations_of(content), engine=engine)
        metrics = evaluator.summarize(results)
        assert round(metrics["bbox/AP"], 2) == 25.74 and "bbox/max_detections" not in metrics
        evaluator.max_detections = 400
        metrics = evaluator.summarize(results)
        assert round(metrics["bbox/AP"], 2) == 100 and metrics["bbox/max_detections"] == 400
