"""Small features, batches and heads of every kind, and torchvision's dense models around given features."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from detbb.config.schema import BackboneConfig
from detbb.heads.base import Head, HeadSpec
from detbb.structures.batch import Batch, ImageSize, Target

CLASSES = ("circle", "square", "star")
KEYPOINTS = ("left", "middle", "right")
STRIDES = {f"layer{i}": 2 ** (i + 1) for i in range(1, 5)} | {f"p{i}": 2**i for i in range(2, 8)} | {"pool": 64}
SMALL: dict[str, Any] = {  # keys of heads that would take long at their defaults
    "box_channels": 32,
    "box_resolution": 4,
    "box_samples": 12,
    "keypoint_channels": [32, 32],
    "mask_channels": [32, 32],
    "num_convs": 2,
    "rpn_pre_nms_train": 60,
    "rpn_post_nms_train": 40,
    "rpn_pre_nms_test": 40,
    "rpn_post_nms_test": 20,
    "score_threshold": 0.0,
    "detections_per_image": 20,
}


def make_spec(classes: tuple[str, ...] = CLASSES, *, channels: int = 64) -> HeadSpec:
    """Everything a ResNet-18 with an FPN offers."""
    widths = {level: channels for level in STRIDES} | {f"layer{i}": 2 ** (i + 5) for i in range(1, 5)}
    backbone = BackboneConfig(arch="resnet18", norm="frozen_bn", allow_random=True)
    return HeadSpec("objects", classes, widths, STRIDES, backbone, keypoints=KEYPOINTS)


def make_head(head_type: type[Head], spec: HeadSpec | None = None, **arguments: Any) -> Any:
    """A small head with random weights whose scores differ clearly."""
    torch.manual_seed(0)
    known = set(head_type.Config.model_fields)
    arguments = {k: v for k, v in SMALL.items() if k in known} | arguments
    head = head_type(head_type.Config(type="x", data="d", **arguments), spec or make_spec())
    for name, tensor in head.state_dict().items():
        if name in head.class_tensors() and name.endswith("weight"):
            tensor.mul_(10)
    return head


def make_features(
    levels: tuple[str, ...], hw: tuple[int, int] = (96, 128), *, count: int = 2, spec: HeadSpec | None = None
) -> dict[str, Tensor]:
    spec, generator = spec or make_spec(), torch.Generator().manual_seed(1)
    return {
        level: torch.randn(
            count, spec.channels[level], *(-(-s // spec.strides[level]) for s in hw), generator=generator
        )
        for level in levels
    }


def make_batch(
    sizes: tuple[tuple[int, int], ...] = ((96, 120), (80, 128)),
    *,
    objects: int = 4,
    padded: tuple[int, int] = (96, 128),
) -> Batch:
    """Images with everything that any head learns from; none of it with `objects=0`."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    targets = []
    for number, (h, w) in enumerate(sizes):
        low = draw(objects, 2) * torch.tensor([w, h]) * 0.6
        boxes = torch.cat([low, low + 10 + draw(objects, 2) * 0.3 * torch.tensor([w, h])], dim=1)
        boxes = torch.minimum(boxes, torch.tensor([w, h, w, h]))
        labels = torch.randint(len(CLASSES), (objects,), generator=generator)
        masks = torch.zeros(objects, h, w, dtype=torch.uint8)
        semantic = torch.full((h, w), 0 if objects else 255, dtype=torch.uint8)
        for mask, label, (x1, y1, x2, y2) in zip(masks, labels, boxes.long().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
            semantic[y1:y2, x1:x2] = label
        places = boxes[:, None, :2] + draw(objects, len(KEYPOINTS), 2) * (boxes[:, 2:] - boxes[:, :2])[:, None]
        visible = torch.full((objects, len(KEYPOINTS), 1), 2.0)
        image_labels = torch.zeros(len(CLASSES), dtype=torch.bool)
        image_labels[number % len(CLASSES)] = objects > 0
        target = Target(number + 1, ImageSize((h, w), (2 * h, 2 * w)), 7 + number, boxes, labels, image_labels)
        target.masks, target.semantic, target.keypoints = masks, semantic, torch.cat([places, visible], dim=2)
        targets.append(target)
    return Batch(torch.zeros(len(sizes), 3, *padded, dtype=torch.uint8), targets, "d")


class GivenFeatures(nn.Module):
    """A torchvision backbone that returns these features whatever the images are."""

    def __init__(self, features: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = OrderedDict(features)
        self.out_channels = next(iter(features.values())).shape[1]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.features


def torchvision_twin(model_type: Any, head: Any, features: dict[str, Tensor], **arguments: Any) -> Any:
    """torchvision's dense detector with the weights of `head`; it sees images as they are, without resizing."""
    model = model_type(GivenFeatures(features), len(head.spec.classes), **arguments)
    model.head.load_state_dict(head.state_dict())
    model.transform.resize = lambda image, target=None: (image, target)
    return model.double() if next(head.parameters()).dtype == torch.float64 else model


def torchvision_targets(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch as torchvision's models take it: images of their own sizes, and targets."""
    images = [image[:, : s.hw[0], : s.hw[1]].float() for image, s in zip(batch.images, batch.sizes, strict=True)]
    return images, [{"boxes": target.boxes, "labels": target.labels} for target in batch.targets]


def assert_equals_torchvision(head: Any, twin: Any, features: dict[str, Tensor], batch: Batch) -> None:
    """Losses and detections the same to 1e-5, and so is every gradient, on the scale of the largest one."""
    images, targets = torchvision_targets(batch)
    names = {"loss_cls": "classification", "loss_box_reg": "bbox_regression", "loss_centerness": "bbox_ctrness"}
    expected = twin.train()(images, targets)
    losses = head.loss(head(features, batch.sizes), batch)
    assert {names[name] for name in losses} == set(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[names[name]], rtol=1e-5, atol=1e-5)
    parameters = dict(head.named_parameters())
    ours = torch.autograd.grad(sum(losses.values()), list(parameters.values()))
    theirs = torch.autograd.grad(sum(expected.values()), [twin.head.get_parameter(name) for name in parameters])
    scale = max(g.abs().max().item() for g in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)

    with torch.no_grad():
        expected = twin.eval()(images)
        predictions = head.decode(head(features, batch.sizes), batch.sizes)
    for prediction, one in zip(predictions, expected, strict=True):
        assert len(one["boxes"]) > 10
        torch.testing.assert_close(prediction.boxes, one["boxes"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prediction.scores, one["scores"], rtol=1e-5, atol=1e-5)
        assert torch.equal(prediction.labels, one["labels"])


def random_boxes(count: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes from a pixel to the whole image, a third with whole-number sides so that areas tie."""
    height, width = hw
    size = torch.exp(torch.rand(count, 2, generator=generator) * 5) * torch.tensor([width, height]) / 148.5
    size[::3] = size[::3].ceil()
    low = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size).clamp(min=0)
    return torch.minimum(torch.cat([low, low + size], 1), torch.tensor([width, height, width, height]))
