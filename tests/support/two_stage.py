"""Small two-stage heads, batches and features, and torchvision's models with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from detbb.config.schema import BackboneConfig
from detbb.heads.base import Head, HeadSpec
from detbb.structures.batch import Batch, ImageSize, Target
from detbb.structures.predictions import Predictions

CHANNELS = 8
CLASSES = ("circle", "square", "star")
KEYPOINTS = ("left", "right", "top", "bottom", "centre")
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "pool": 64}
EVERYTHING = 10**6  # a sample size that takes every candidate
SMALL: dict[str, Any] = {
    "anchor_sizes": [[8.0], [16.0], [32.0], [64.0], [128.0]],
    "rpn_pre_nms_train": 30,
    "rpn_post_nms_train": 12,
    "rpn_pre_nms_test": 20,
    "rpn_post_nms_test": 9,
    "rpn_samples": EVERYTHING,
    "box_samples": EVERYTHING,
    "box_channels": 32,
    "box_resolution": 4,
    "detections_per_image": 5,
}


def make_spec(strides: dict[str, int] = STRIDES, channels: int = CHANNELS, norm: Any = "bn") -> HeadSpec:
    backbone = BackboneConfig(arch="resnet18", norm=norm)
    return HeadSpec("objects", CLASSES, dict.fromkeys(strides, channels), strides, backbone, keypoints=KEYPOINTS)


def make_head(head_type: type[Head], *, spec: HeadSpec | None = None, **arguments: Any) -> Any:
    """A head whose random weights score and move boxes by more than the fresh ones do."""
    torch.manual_seed(0)
    head = head_type(head_type.Config(type="x", data="x", **{**SMALL, **arguments}), spec or make_spec())
    with torch.no_grad():
        for parameter in head.rpn.head.parameters():
            parameter.mul_(5)
    return head


def make_features(count: int = 2, side: int = 128, strides: dict[str, int] = STRIDES, channels: int = CHANNELS):
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(count, channels, side // s, side // s, generator=generator) for k, s in strides.items()}


def make_batch(side: int = 128, *, boxes: bool = True) -> Batch:
    """Two images, the second one lower than the padded batch; three objects and one. Or none."""
    generator = torch.Generator().manual_seed(2)
    corners = [[[10, 12, 50, 60], [30, 40, 100, 120], [5, 70, 25, 110]], [[20, 8, 90, 77]]]
    labels = [[0, 2, 1], [1]]
    targets = []
    for i, (h, w) in enumerate([(side, side), (side - 32, side)]):
        n = len(corners[i]) if boxes else 0
        box = torch.tensor(corners[i], dtype=torch.float32)[:n] * side / 128
        points = torch.rand(n, len(KEYPOINTS), 3, generator=generator)
        points[..., :2] = box[:, None, :2] + points[..., :2] * (box[:, None, 2:] - box[:, None, :2])
        points[..., 2] = torch.randint(0, 3, (n, len(KEYPOINTS)), generator=generator)
        target = Target(
            image_id=i,
            size=ImageSize((h, w), (h, w)),
            seed=100 + i,
            boxes=box,
            labels=torch.tensor(labels[i][:n], dtype=torch.int64),
            image_labels=torch.zeros(len(CLASSES), dtype=torch.bool),
            masks=torch.randint(0, 2, (n, h, w), generator=generator).to(torch.uint8),
            keypoints=points,
        )
        targets.append(target)
    return Batch(torch.zeros(2, 3, side, side, dtype=torch.uint8), targets, "shapes")


def torchvision_model(model: type[FasterRCNN], head: Any, *, levels: tuple[str, ...], **parts: Any) -> FasterRCNN:
    """torchvision's model around the modules of `head`."""
    config = {**SMALL, **parts.pop("config", {})}
    sizes = tuple(map(tuple, config["anchor_sizes"]))
    backbone = nn.Identity()
    backbone.out_channels = CHANNELS  # type: ignore[assignment]
    parts.setdefault("box_head", getattr(head, "box_head", None))
    return model(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_head=head.rpn.head,
        rpn_pre_nms_top_n_train=config["rpn_pre_nms_train"],
        rpn_post_nms_top_n_train=config["rpn_post_nms_train"],
        rpn_pre_nms_top_n_test=config["rpn_pre_nms_test"],
        rpn_post_nms_top_n_test=config["rpn_post_nms_test"],
        rpn_batch_size_per_image=EVERYTHING,
        box_batch_size_per_image=EVERYTHING,
        box_roi_pool=MultiScaleRoIAlign(list(levels), config["box_resolution"], 2),
        box_predictor=head.box_predictor,
        box_detections_per_img=config["detections_per_image"],
        **parts,
    )


def torchvision_run(model: FasterRCNN, features: dict[str, Tensor], batch: Batch) -> tuple[list[dict], dict]:
    """Detections in eval mode, losses in train mode."""
    hw = [s.hw for s in batch.sizes]
    images = ImageList(batch.images.float(), hw)
    targets = [
        {"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks, "keypoints": t.keypoints} for t in batch.targets
    ]
    proposals, losses = model.rpn(images, features, targets)
    detections, more = model.roi_heads(features, proposals, hw, targets if model.training else None)
    return detections, losses | more


LOSS_NAMES = {  # ours -> torchvision's
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_keypoint": "loss_keypoint",
}


def assert_equals_torchvision(head: Any, model: FasterRCNN, features: dict[str, Tensor], batch: Batch) -> None:
    """Losses, their gradients and detections are the same to 1e-5."""
    model.train()
    _, expected = torchvision_run(model, features, batch)
    losses = head.loss(head(features, batch.sizes), batch)
    assert {LOSS_NAMES[name] for name in losses} == set(expected)
    for name, loss in losses.items():
        assert loss > 0
        torch.testing.assert_close(loss, expected[LOSS_NAMES[name]], atol=1e-5, rtol=1e-5)
    parameters = list(head.parameters())
    ours = torch.autograd.grad(sum(losses.values()), parameters)
    theirs = torch.autograd.grad(sum(expected.values()), parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    model.eval()
    head.eval()
    with torch.no_grad():
        detections, _ = torchvision_run(model, features, batch)
        predictions = head.decode(head(features, batch.sizes), batch.sizes)
    assert [len(d["boxes"]) for d in detections] == [SMALL["detections_per_image"]] * 2
    for prediction, detection in zip(predictions, detections, strict=True):
        assert_same_detections(prediction, detection)


def assert_same_detections(prediction: Predictions, detection: dict[str, Tensor]) -> None:
    torch.testing.assert_close(prediction.boxes, detection["boxes"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.scores, detection["scores"], atol=1e-5, rtol=1e-5)
    assert torch.equal(prediction.labels, detection["labels"] - 1)
    if "masks" in detection:
        torch.testing.assert_close(prediction.masks, detection["masks"][:, 0], atol=1e-5, rtol=1e-5)
    if "keypoints" in detection:
        torch.testing.assert_close(prediction.keypoints[..., :2], detection["keypoints"][..., :2], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(prediction.keypoints[..., 2], detection["keypoints_scores"], atol=1e-5, rtol=1e-5)


def assert_trains_without_boxes(head: Any) -> None:
    """Losses are finite and reach every parameter."""
    batch = make_batch(boxes=False)
    losses = head.loss(head(make_features(), batch.sizes), batch)
    gradients = torch.autograd.grad(sum(losses.values()), list(head.parameters()))  # raises for an unused one
    assert all(torch.isfinite(x).all() for x in [*losses.values(), *gradients])
    for branch in {"loss_mask", "loss_keypoint", "loss_box_reg", "loss_rpn_loc"} & set(losses):
        assert losses[branch] == 0
    assert losses["loss_cls"] > 0


def assert_precisions(head: Any) -> None:
    """Losses and detections are fp32 under bf16 autocast and near the fp32 ones; fp64 losses are fp64."""
    features, batch = make_features(), make_batch()
    expected = head.loss(head(features, batch.sizes), batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(features, batch.sizes)
        losses, predictions = head.loss(output, batch), head.decode(output, batch.sizes)
    assert output.rpn.objectness.dtype == output.rpn.deltas.dtype == output.rpn.anchors.dtype == torch.float32
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        # bf16 has 8 bits, and other proposals may be drawn
        torch.testing.assert_close(loss, expected[name], rtol=0.1, atol=0.05)
    sum(losses.values()).backward()
    head.double()
    doubled = {k: v.double() for k, v in features.items()}
    losses = head.loss(head(doubled, batch.sizes), batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss.float(), expected[name], rtol=1e-4, atol=1e-5)
    for prediction in predictions + head.decode(head(doubled, batch.sizes), batch.sizes):
        fields = (prediction.boxes, prediction.scores, prediction.masks, prediction.keypoints)
        assert all(f.dtype == torch.float32 for f in fields if f is not None)
