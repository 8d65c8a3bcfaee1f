"""The head of docs/add_a_head.md: the page shows this very file, and it keeps the contract, learns and counts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import test_heads
import torch
from head_cases import make_batch, make_features, make_head

from detbb.data.formats import read_split
from detbb.heads import find_head
from detbb.heads.loading import load_config
from detbb.inference.predict import predict
from detbb.structures.predictions import Predictions
from detbb.training.loop import train

REPOSITORY = Path(__file__).resolve().parents[1]
FILE = REPOSITORY / "examples" / "counting_head.py"
TYPE = "examples.counting_head:CountingHead"
CONTRACT = {
    name: test
    for name, test in vars(test_heads).items()
    if name.startswith("test_") and "head_type" in inspect.signature(test).parameters
}
CONFIG = """
output_dir: {out}
init_from: null
backbone: {{arch: resnet18, norm: bn}}
neck: {{channels: 32}}
data:
  shapes:
    format: shapes
    train: {{images: {out}/data, size: 32}}
    val: {{images: {out}/data, size: 16}}
    image_size: [64, 64]
    augment: none
heads:
  count: {{type: "examples.counting_head:CountingHead", data: shapes}}
train: {{steps: 60, batch_size: 8, workers: 0}}
optimizer: {{type: adamw, lr: 3.0e-3}}
schedule: {{type: cosine}}
ema: null
log: {{every: 1, images: 2}}
"""


@pytest.fixture
def counting_head(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    return find_head(TYPE)


@pytest.mark.parametrize("name", CONTRACT)
def test_keeps_the_contract_of_every_head(name, counting_head, request):
    arguments = {
        p: request.getfixturevalue(p) for p in inspect.signature(CONTRACT[name]).parameters if p != "head_type"
    }
    CONTRACT[name](head_type=counting_head, **arguments)


def test_contract_is_the_whole_one():
    assert len(CONTRACT) >= 14


def test_page_shows_the_file_as_it_is_and_it_is_short():
    code = FILE.read_text()
    assert f"```python\n{code}```" in (REPOSITORY / "docs" / "add_a_head.md").read_text()
    assert code.count("\n") < 80


def test_padding_counts_nothing(counting_head):
    head = make_head(counting_head)
    features, sizes = make_features(("p4", "p5"), (96, 128)), make_batch(((32, 48), (80, 128))).sizes
    output = head(features, [sizes[1], sizes[1]])
    expected = output[0, :, :2, :3].sum((1, 2))
    torch.testing.assert_close(head.decode(head(features, sizes), sizes)[0].values, expected)


def test_two_centres_in_one_cell_count_twice(counting_head):
    """At the rate that is there the Poisson loss has no slope: 2 where two centres are, next to 0 elsewhere."""
    head, batch = make_head(counting_head), make_batch(objects=2)
    for target in batch.targets:
        target.boxes, target.labels = torch.tensor([[1.0, 1, 9, 9], [2.0, 2, 8, 8]]), torch.tensor([1, 1])
    rate = torch.full((2, 3, 6, 8), 1e-9)
    rate[:, 1, 0, 0] = 2
    rate.requires_grad_()
    head.loss(rate, batch)["loss_count"].backward()
    assert rate.grad[:, 1, 0, 0].abs().max() < 1e-6


def test_metrics_are_right_on_counts_made_by_hand(counting_head, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG.format(out=tmp_path))
    annotations = read_split(load_config(tmp_path / "c.yaml").data["shapes"], "val", "shapes")
    coco = json.loads((tmp_path / "data" / "val_16" / "annotations.json").read_text())
    counts = {image["id"]: [0.0, 0.0, 0.0] for image in coco["images"]}
    for item in coco["annotations"]:
        counts[item["image_id"]][item["category_id"] - 1] += 1
    evaluator = make_head(counting_head).evaluator(annotations)
    for number, (image_id, count) in enumerate(counts.items()):
        off = [0.4, 1.0, -0.3] if number % 2 else [0.0, 0.0, 0.0]
        evaluator.add(image_id, Predictions(values=torch.tensor(count) + torch.tensor(off)))
    metrics = evaluator.summarize(evaluator.state())
    assert metrics["count/exact"] == pytest.approx(100 * 5 / 6)
    assert metrics["count/MAE"] == pytest.approx(1.7 / 6, abs=1e-6)


@pytest.mark.slow
def test_trains_from_a_config_and_counts_better_than_the_mean(counting_head, tmp_path):
    (tmp_path / "count.yaml").write_text(CONFIG.format(out=tmp_path / "run"))
    config = load_config(tmp_path / "count.yaml")
    checkpoint = train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["count/loss_count"] for line in lines if line["split"] == "train"]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    assert {"count/count/exact", "count/count/MAE"} <= set(lines[-1])
    results = json.loads(next((tmp_path / "run" / "eval").glob("*/count/results.json")).read_text())
    assert len(results) == 16 and len(results[0]["counts"]) == 3

    images = sorted((tmp_path / "run/data/train_32/images").iterdir())[:16]
    found = predict(checkpoint, images, output_dir=tmp_path / "predicted")
    annotations = read_split(config.data["shapes"], "train", "shapes")
    truth = np.stack([np.bincount(annotations.labels[annotations.rows(i)], minlength=3) for i in range(16)])
    values = np.array([[e["value"] for e in image["heads"]["count"]] for image in found])
    assert np.abs(values - truth).mean() < 0.7 * np.abs(truth.mean(0) - truth).mean()
    assert len(list((tmp_path / "predicted").glob("*.count.png"))) == 16
