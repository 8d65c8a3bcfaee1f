"""Every head learns eight generated images by heart: a wrong target or decoding shows as a metric that stalls.

    python benchmarks/overfit.py                 # all heads, about half an hour on two CPU cores
    python benchmarks/overfit.py --head fcos mask_rcnn --json overfit.json

Trains and evaluates on the same images, without augmentation. Exit code 1 if a head stays below its bar.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SMALL = "box_samples: 64, box_channels: 256"  # eight small images need no more, and a step takes a quarter of the time
# head: its own arguments, bars by metric, steps, learning rate
CASES: dict[str, tuple[str, dict[str, float], int, float]] = {
    "fcos": ("", {"bbox/AP": 80}, 200, 1e-3),
    "retinanet": ("", {"bbox/AP": 80}, 250, 5e-4),
    "faster_rcnn": (SMALL, {"bbox/AP": 80}, 250, 5e-4),
    "faster_rcnn_c4": ("box_samples: 16", {"bbox/AP": 80}, 200, 5e-4),
    "mask_rcnn": (SMALL, {"bbox/AP": 80, "segm/AP": 70}, 300, 5e-4),
    "keypoint_rcnn": (SMALL + f", keypoint_channels: {[128] * 4}", {"bbox/AP": 80, "keypoints/AP": 70}, 300, 5e-4),
    "semantic": ("", {"sem/mIoU": 80}, 150, 1e-3),
    "classify": ("levels: [layer4]", {"cls/accuracy": 100}, 60, 1e-3),
}
CONFIG = """
output_dir: {out}
backbone: {{arch: resnet18, norm: bn}}
neck: {neck}
data: {{made: {data}}}
heads: {{it: {{type: {head}, data: made, {args}}}}}
train: {{steps: {steps}, batch_size: 8, workers: 0}}
optimizer: {{type: adamw, lr: {lr}, weight_decay: 0.0}}
schedule: {{type: cosine, warmup_steps: 20}}
ema: null
log: {{every: 50}}
"""


def pick_images(root: Path, *, one_class: bool) -> Path:
    """A COCO file with eight images that have objects (of one class each, if so asked)."""
    whole = json.loads((root / "annotations.json").read_text())
    classes: dict[int, set[int]] = {}
    for annotation in whole["annotations"]:
        classes.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
    chosen = [i for i, found in sorted(classes.items()) if len(found) == 1 or not one_class][:8]
    part = {
        "images": [i for i in whole["images"] if i["id"] in chosen],
        "annotations": [a for a in whole["annotations"] if a["image_id"] in chosen],
        "categories": whole["categories"],
    }
    assert len(part["images"]) == 8, "the generated set has too few such images"
    path = root / f"eight_{'one_class' if one_class else 'any'}.json"
    path.write_text(json.dumps(part))
    return path


def run(head: str, root: Path, folder: Path) -> dict[str, float]:
    """The metrics of one head after learning the eight images."""
    from detbb import load_config, train

    args, _, steps, lr = CASES[head]
    annotations = pick_images(root, one_class=head == "classify")
    split = f"{{images: {root / 'images'}, annotations: {annotations}}}"
    form = "coco"
    if head == "semantic":
        masks = folder / "semantic_images"
        masks.mkdir(exist_ok=True)
        for image in json.loads(annotations.read_text())["images"]:
            (masks / image["file_name"]).write_bytes((root / "images" / image["file_name"]).read_bytes())
        form = f"semantic, classes: {root / 'classes.json'}"
        split = f"{{images: {masks}, annotations: {root / 'masks'}}}"
    data = f"{{format: {form}, train: {split}, val: {split}, image_size: [128, 128], augment: none}}"
    neck = "{type: none}" if head in ("faster_rcnn_c4", "classify") else "{channels: 128}"
    file = folder / f"{head}.yaml"
    file.write_text(CONFIG.format(out=folder / head, neck=neck, data=data, head=head, args=args, steps=steps, lr=lr))
    train(load_config(file))
    records = [json.loads(line) for line in (folder / head / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["split"] == "val"][-1]
    return {name.removeprefix("it/"): value for name, value in last.items() if name.startswith("it/")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    import torch

    from detbb.data.formats.shapes import generate_shapes

    figures, missed = {}, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = generate_shapes(folder / "shapes", "train", 64)
        for head in options.head:
            began = time.perf_counter()
            metrics = run(head, root, folder)
            figures[head] = {metric: metrics[metric] for metric in CASES[head][1]}
            figures[head]["minutes"] = round((time.perf_counter() - began) / 60, 1)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads")
    for head, found in figures.items():
        for metric, bar in CASES[head][1].items():
            missed += found[metric] < bar
            print(f"{head:16} {metric:14} {found[metric]:6.1f}  bar {bar:5.1f}  {CASES[head][2]} steps")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
