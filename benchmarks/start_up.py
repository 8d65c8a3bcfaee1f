"""From an annotation file of COCO's size to arrays ready to train, against `COCO(file)`, each in its own process.

    python benchmarks/start_up.py                     # train2017's size: 118,000 images, 860,000 objects with polygons
    python benchmarks/start_up.py --like lvis         # 100,000 images, 1,270,000 objects of 1,203 classes
    python benchmarks/start_up.py --images 20000 --repeats 1 --json start_up.json

Seconds, memory held afterwards and at its peak, each with the median of its ratios to the `COCO(file)` just before it;
then what a sample costs the sampler, and how much a worker process grows over 2,000 samples.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import timing

LIKE = {"coco": (118_287, 7.27, 80), "lvis": (100_170, 12.7, 1203)}  # images, objects an image, classes


def make_file(path: Path, images: int, per_image: float, classes: int) -> None:
    """A COCO file as the real ones are: two decimals, polygons of 4 to 60 points, one object in a hundred a crowd."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for k in range(images):
            row = {
                "license": 4,
                "file_name": f"{k:012d}.jpg",
                "coco_url": f"images/{k:012d}.jpg",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 17:02:52",
                "id": k,
            }
            file.write(", " * (k > 0) + json.dumps(row))
        file.write('], "annotations": [')
        number = 0
        for k in range(images):
            for _ in range(rng.poisson(per_image)):
                points = int(rng.gamma(2.0, 11.0)) + 4
                x, y = rng.uniform(0, 500), rng.uniform(0, 350)
                crowd = rng.random() < 0.01
                polygon = (np.array([[x, y]]) + rng.uniform(0, 100, (points, 2))).round(2).ravel().tolist()
                shape: Any = {"size": [480, 640], "counts": [153600, 0, 307200 - 153600]} if crowd else [polygon]
                box = [round(x, 2), round(y, 2), round(rng.uniform(2, 100), 2), round(rng.uniform(2, 100), 2)]
                row = {
                    "segmentation": shape,
                    "area": round(box[2] * box[3] / 2, 4),
                    "iscrowd": int(crowd),
                    "image_id": k,
                    "bbox": box,
                    "category_id": int(rng.integers(1, classes + 1)),
                    "id": number + 1,
                }
                file.write(", " * (number > 0) + json.dumps(row))
                number += 1
        names = [{"supercategory": "thing", "id": c + 1, "name": f"class {c}"} for c in range(classes)]
        file.write(f'], "categories": {json.dumps(names)}}}')


COMMON = """
import gc, json, sys, time
from pathlib import Path
status = lambda key: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
"""
PEER = """
from pycocotools.coco import COCO
before, began = status("VmRSS"), time.perf_counter()
held = COCO(sys.argv[1])
seconds = time.perf_counter() - began
"""
OURS = """
from detbb.data.formats.base import Request
from detbb.data.formats.coco import read_coco
before, began = status("VmRSS"), time.perf_counter()
held = read_coco(Request(Path(sys.argv[1]).parent, Path(sys.argv[1])))
seconds = time.perf_counter() - began
"""
REPORT = """
gc.collect()
print(json.dumps({"s": seconds, "held_mib": status("VmRSS") - before, "peak_mib": status("VmHWM") - before}))
"""
SAMPLES = """
import numpy as np, os
from unittest import mock
from detbb.config.schema import DataConfig
from detbb.data import sample
from detbb.data.formats.base import Request
from detbb.data.formats.coco import read_coco
from detbb.data.sampler import SourceSchedule
data = read_coco(Request(Path(sys.argv[1]).parent, Path(sys.argv[1])))
sample.read_image = lambda path, most: np.zeros((480, 640, 3), np.uint8)
made = sample.SampleReader(data, DataConfig(image_size=[128, 128]), train=True, needs=frozenset({"masks"}))
chance = np.random.default_rng(0)
numbers = chance.integers(0, len(data), 2400).tolist()
if (child := os.fork()) == 0:  # a worker, as the loader starts it
    for number in numbers[:400]:
        made.read(number)
    grown = status("RssAnon")
    for number in numbers[400:]:
        made.read(number)
    print(json.dumps({"growth_mib": status("RssAnon") - grown}), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def in_own_process(code: str, path: Path) -> dict[str, float]:
    """What `code` measured."""
    command = [sys.executable, "-c", COMMON + code + REPORT, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def sampling(path: Path) -> dict[str, float]:
    """The sampler's cost of a sample, and how much a worker process grows over 2,000 samples."""
    command = [sys.executable, "-c", COMMON + SAMPLES, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = timing.arguments(__doc__ or "", repeats=3)
    parser.add_argument("--like", choices=list(LIKE), default="coco")
    parser.add_argument("--images", type=int, help="fewer or more than the real set has")
    options = parser.parse_args()
    images, per_image, classes = LIKE[options.like]
    images = options.images or images
    found: dict[str, list[dict[str, float]]] = {"COCO()": [], "first start": [], "second start": []}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
        path = Path(folder, "annotations.json")
        make_file(path, images, per_image, classes)
        print(f"{options.like}: {images} images, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
        for _ in range(options.repeats):
            shutil.rmtree(Path(folder, "detbb"), ignore_errors=True)
            for name, code in (("COCO()", PEER), ("first start", OURS), ("second start", OURS)):
                found[name].append(in_own_process(code, path))
        samples = sampling(path)
    rows = []
    for name, runs in found.items():
        row = {"case": f"{options.like}, {name}"} | {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        ratios = [{k: r[k] / peer[k] for k in r} for r, peer in zip(runs, found["COCO()"], strict=True)]
        row |= {f"{k}_ratio": statistics.median(r[k] for r in ratios) for k in runs[0]}
        rows.append(row)
        parts = [f"{row[k]:9.1f} {k.replace('_', ' ')} ({row[f'{k}_ratio']:.2f} x)" for k in runs[0]]
        print(f"{row['case']:<22} {'   '.join(parts)}", flush=True)
    print("   ".join(f"{k} {v:.3g}" for k, v in samples.items()))
    timing.finish(options.json, rows, samples=samples)


if __name__ == "__main__":
    main()
