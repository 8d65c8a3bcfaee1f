"""From an annotation file and a results file to COCO's numbers, against pycocotools, in turn.

python benchmarks/evaluation.py                          # 5,000 images, 100 detections each
python benchmarks/evaluation.py --images 1000 --repeats 3 --json evaluation.json
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import numpy as np
import start_up
import timing
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detbb.data.formats.base import Request
from detbb.data.formats.coco import read_coco
from detbb.data.formats.coco_json import no_garbage_collection
from detbb.metrics.evaluators import CocoEvaluator


def make_results(truth: Path, path: Path, per_image: int) -> None:
    """Forty detections of an image near its objects, the others anywhere."""
    rng = np.random.default_rng(1)
    content = json.loads(truth.read_text())
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    results = []
    for image, own in objects.items():
        for k in range(per_image):
            box, category = rng.uniform([0, 0, 5, 5], [500, 400, 100, 100]), int(rng.integers(1, 81))
            if own and k < 40:
                near = own[k % len(own)]
                box, category = np.array(near["bbox"]) * rng.uniform(0.8, 1.2, 4), near["category_id"]
            score = round(float(rng.random()), 4)
            entry = {"image_id": image, "category_id": category, "bbox": box.round(2).tolist(), "score": score}
            results.append(entry)
    path.write_text(json.dumps(results))


def main() -> None:
    parser = timing.arguments(__doc__ or "", repeats=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    options = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        truth, results = Path(name, "annotations.json"), Path(name, "results.json")
        start_up.make_file(truth, options.images, 7.27, 80)
        make_results(truth, results, options.detections)

        def theirs() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                ground = COCO(str(truth))
                evaluation = COCOeval(ground, ground.loadRes(str(results)), "bbox")
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            found["theirs"] = 100 * evaluation.stats[0]

        @no_garbage_collection()
        def ours() -> None:
            annotations = read_coco(Request(truth.parent, truth))
            found["ours"] = CocoEvaluator(annotations).summarize(msgspec.json.decode(results.read_bytes()))["bbox/AP"]

        seconds = timing.in_turn(
            {"pycocotools": theirs, "detbb": ours}, repeats=options.repeats, warm_up=1, cpu_time=options.cpu_time
        )
    assert abs(found["theirs"] - found["ours"]) < 1e-9, found
    rows = [timing.row(f"{options.images} images, {options.detections} detections each", seconds)]
    timing.show(rows)
    timing.finish(options.json, rows)


if __name__ == "__main__":
    main()
