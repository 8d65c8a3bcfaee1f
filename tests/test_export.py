"""ONNX files compute what PyTorch does, and the check that says so can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detbb.checkpoint.content import FORMAT_VERSION, load_detector
from detbb.config.loading import config_to_dict
from detbb.config.schema import Config, DataConfig, SplitConfig
from detbb.core.errors import UserError
from detbb.core.files import save_tensors
from detbb.detector import build_detector
from detbb.heads import find_head
from detbb.inference import export
from detbb.inference.export import Check, ExportDiffers, compare, export_onnx
from detbb.structures.batch import ImageSize
from detbb.structures.predictions import Predictions

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")
pytest.importorskip("onnx")
pytestmark = pytest.mark.slow

CLASSES = {"names": ["circle", "square", "star"], "category_ids": [1, 2, 3], "keypoints": ["left", "right"]}
SMALL = {
    "box_channels": 32,
    "detections_per_image": 20,
    "keypoint_channels": [32, 32],
    "mask_channels": [32, 32],
    "num_convs": 1,
    "rpn_post_nms_test": 40,
    "score_threshold": 0.0,
}
GROUPS = {
    "one stage and image level": ("fcos", "retinanet", "semantic", "classify", "examples.counting_head:CountingHead"),
    "two stages": ("mask_rcnn", "keypoint_rcnn"),
    "C4": ("faster_rcnn_c4",),
}


@pytest.fixture(autouse=True)
def outside_heads(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])


def make_checkpoint(path: Path, types: tuple[str, ...], **arguments: Any) -> Path:
    """A checkpoint with random weights whose scores differ clearly."""
    config = Config()
    config.backbone.arch, config.backbone.norm, config.neck.channels = "resnet18", "bn", 32
    config.neck.type = "none" if types == GROUPS["C4"] else "fpn"
    config.data["made"] = DataConfig(format="shapes", image_size=[60, 90])
    config.data["pixels"] = DataConfig(
        format="semantic", train=SplitConfig(images="images", annotations="masks"), classes=["a", "b"]
    )
    config.train.steps = 1
    for number, name in enumerate(types):
        known = find_head(name).Config.model_fields
        own = {k: v for k, v in {**SMALL, **arguments}.items() if k in known}
        config.heads[f"head{number}"] = find_head(name).Config(
            type=name, data="pixels" if name == "semantic" else "made", **own
        )
    torch.manual_seed(0)
    detector = build_detector(config, dict.fromkeys(config.heads, CLASSES))
    with torch.no_grad():
        for name, head in detector.heads.items():
            for tensor in head.class_tensors():
                if tensor.endswith("weight") and "mask" not in tensor:
                    detector.state_dict()[f"heads.{name}.{tensor}"].mul_(10)
    content = {
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(config),
        "step": 3,
        "phase": 0,
        "model": detector.state_dict(),
        "ema": None,
        "optimizer": {"type": "sgd", "state": {}},
        "scaler": {},
        "rng": {"seed": 0, "torch": torch.get_rng_state()},
        "data": {"images": {"made": 1}, "batch_size": 16, "skipped_in_row": 0},
        "frozen": {"names": [], "digests": {}},
        "classes": dict.fromkeys(config.heads, CLASSES),
        "versions": {},
    }
    save_tensors(path, content)
    return path


def image_of(seed: int, hw: tuple[int, int]) -> torch.Tensor:
    coarse = np.random.default_rng(seed).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    big = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size=hw, mode="bilinear")
    return big.round().byte()


@pytest.mark.parametrize("types", GROUPS.values(), ids=GROUPS)
def test_onnx_gives_what_the_detector_predicts(types, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c.pt", types)
    export_onnx(checkpoint, tmp_path / "m.onnx", size=(64, 96))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    detector = load_detector(checkpoint)
    hw = (64, 96)
    for seed in (5, 6):
        image = image_of(seed, hw)
        found = dict(
            zip((o.name for o in session.get_outputs()), session.run(None, {"image": image.numpy()}), strict=True)
        )
        for name, (said,) in detector.predict(image, [ImageSize(hw, hw)]).items():
            expected = {k: v.numpy() for k, v in vars(said).items() if v is not None}
            assert {f"{name}.{k}" for k in expected} == {k for k in found if k.startswith(f"{name}.")}
            if said.boxes is None:
                for key, value in expected.items():
                    np.testing.assert_allclose(found[f"{name}.{key}"], value, atol=1e-4, rtol=1e-4)
                continue
            assert len(found[f"{name}.boxes"]) == len(said.boxes) > 5
            np.testing.assert_allclose(found[f"{name}.scores"], said.scores.numpy(), atol=1e-4)
            for i, box in enumerate(found[f"{name}.boxes"]):  # equal scores may change places
                gaps = np.abs(expected["boxes"] - box).max(1) + (expected["labels"] != found[f"{name}.labels"][i])
                assert gaps.min() < 0.01
                for key in {"masks", "keypoints"} & set(expected):
                    near = expected[key][gaps < 0.01]
                    assert np.abs(near - found[f"{name}.{key}"][i]).reshape(len(near), -1).max(1).min() < 0.01


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_tracing_an_empty_image_does_not_make_all_images_empty(head, tmp_path, monkeypatch):
    detector = load_detector(make_checkpoint(tmp_path / "all.pt", (head,)))
    size = ImageSize((64, 96), (64, 96))

    def best_score(image: torch.Tensor) -> float:
        return float(detector.predict(image, [size])["head0"][0].scores.max())

    *_, low, high = sorted((image_of(seed, size.hw) for seed in range(4)), key=best_score)
    checkpoint = make_checkpoint(
        tmp_path / "some.pt", (head,), score_threshold=(best_score(low) + best_score(high)) / 2
    )
    monkeypatch.setattr(export, "check_images", lambda *_: [low])
    written = export_onnx(checkpoint, tmp_path / "m.onnx")
    assert written.checks["head0"].detections == 0 and "WARNING" in written.lines()[-1]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    boxes, scores, _ = session.run(None, {"image": high.numpy()})
    said = load_detector(checkpoint).predict(high, [size])["head0"][0]
    assert len(boxes) == len(said.boxes) > 0
    np.testing.assert_allclose(boxes, said.boxes, atol=1e-3)
    np.testing.assert_allclose(scores, said.scores, atol=1e-5)


def test_a_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    checkpoint, trace = make_checkpoint(tmp_path / "c.pt", ("semantic",)), export._trace

    def trace_another(whole, image):
        bias = whole.detector.get_parameter("heads.head0.classifier.bias")
        bias.data[0] += 1e-2
        model = trace(whole, image)
        bias.data[0] -= 1e-2
        return model

    monkeypatch.setattr(export, "_trace", trace_another)
    with pytest.raises(ExportDiffers, match="head0"):
        export_onnx(checkpoint, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def detections(*rows: tuple[float, float, int]) -> Predictions:
    """(left edge, score, label) of boxes 10 pixels wide."""
    boxes = torch.tensor([[x, 0.0, x + 10, 10] for x, _, _ in rows]).reshape(-1, 4)
    return Predictions(boxes, torch.tensor([s for _, s, _ in rows]), torch.tensor([n for _, _, n in rows]))


@pytest.mark.parametrize(
    ("found", "unmatched", "passes"),
    [
        (((20, 0.9, 1), (0, 0.9, 0)), 0, True),  # equal scores in another order
        (((0, 0.9, 0), (20.005, 0.9, 1)), 0, True),
        (((0, 0.9, 0), (20.5, 0.9, 1)), 2, False),
        (((0, 0.9, 0), (20, 0.9, 2)), 2, False),
        (((0, 0.9, 0), (20, 0.899, 1)), 2, False),
        (((0, 0.9, 0),), 1, False),
        ((), 2, False),
    ],
)
def test_check_pairs_detections_and_counts_the_unpaired(found, unmatched, passes):
    checks: dict[str, Check] = {}
    compare(checks, {"a": detections((0, 0.9, 0), (20, 0.9, 1))}, {"a": detections(*found)}, side=100)
    assert (checks["a"].detections, checks["a"].unmatched, checks["a"].passes) == (2, unmatched, passes)


def test_size_is_that_of_the_data_and_classes_are_in_the_file(tmp_path):
    written = export_onnx(make_checkpoint(tmp_path / "c.pt", ("classify",)), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.name, image.shape, image.type) == ("image", [1, 3, 64, 96], "tensor(uint8)")
    assert written.size == (64, 96) and written.shapes == {"head0.probabilities": (3,)}
    described = json.loads(session.get_modelmeta().custom_metadata_map["detbb"])
    assert described["heads"] == {"head0": {"classes": CLASSES["names"]}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": (64, 100)}, r"--size: 64 100; valid are multiples of 32"),
        ({"heads": ["haed0"]}, r"--head: 'haed0'.*did you mean 'head0'"),
        ({"output": "c.pt"}, r"-o .*c\.pt: exists already.*--overwrite"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(arguments, said, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c.pt", ("classify",))
    output = tmp_path / arguments.pop("output", "m.onnx")
    with pytest.raises(UserError, match=said) as caught:
        export_onnx(checkpoint, output, **arguments)
    assert "\n" not in str(caught.value)


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'detbb\[export\]'"):
        export_onnx(tmp_path / "c.pt", tmp_path / "m.onnx")
