"""Semantic and classification heads, and the losses that dense heads share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_cases import CLASSES, make_batch, make_features, make_head
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detbb.core.errors import UserError
from detbb.heads import HEADS, dense
from detbb.heads.classify import ClassifyHead
from detbb.heads.dense import giou_loss
from detbb.heads.fcos import FcosHead
from detbb.heads.semantic import SemanticHead
from detbb.structures.annotations import Annotations, PackedStrings
from detbb.structures.batch import ImageSize

SEMANTIC_LEVELS = ("p3", "p4", "p5")


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5), (0.0, 0.0)])
def test_focal_loss_and_its_gradient_equal_torchvisions(alpha, gamma):
    head = make_head(FcosHead, focal_alpha=alpha, focal_gamma=gamma)
    x = torch.linspace(-12, 12, 120, dtype=torch.float64).view(10, 12).requires_grad_()
    target = torch.zeros(10, 12, dtype=torch.float64)
    rows, columns = torch.arange(0, 10, 2), torch.tensor([0, 3, 11, 7, 5])
    target[rows, columns] = 1
    weight = torch.linspace(0.5, 2, 10, dtype=torch.float64)

    pairs = torch.cat([rows, rows[:2]]), torch.cat([columns, torch.tensor([5, 3])])  # of the last two, none is present
    present = torch.tensor([1.0] * 5 + [0.0] * 2, dtype=torch.float64)
    loss = (head.focal_loss(x, *pairs, present) * weight).sum()
    expected = (sigmoid_focal_loss(x, target, alpha, gamma, reduction="none").sum(1) * weight).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    ours, theirs = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_focal_loss_is_exact_in_float32_however_it_is_divided(monkeypatch):
    head = make_head(FcosHead)
    logits = torch.cat([torch.linspace(-60, 60, 20_000), torch.linspace(-1, 1, 10_000)]).view(-1, 4)
    pairs = torch.arange(0, len(logits), 3), torch.arange(0, len(logits), 3) % 4

    def losses_and_slopes(x, present):
        x = x.clone().requires_grad_()
        losses = head.focal_loss(x, *pairs, torch.full(pairs[0].shape, present, dtype=x.dtype))
        assert losses.shape == x.shape[:1]
        return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]

    for present, least in ((0.0, 1e-37), (1.0, 1e-5)):  # a present class is added to the loss of its absence
        found, exact = losses_and_slopes(logits, present), losses_and_slopes(logits.double(), present)
        torch.testing.assert_close(
            [t.double() for t in found], [*exact], rtol=1e-5, atol=least
        )  # p twice, with its error
        for elements in (1, 1000, 1 << 30):
            with monkeypatch.context() as patch:
                patch.setattr(dense, "CACHED_ELEMENTS", elements)
                divided = losses_and_slopes(logits, present)
            torch.testing.assert_close([*divided], [*found], rtol=1e-6, atol=least)
    turned = logits.t().contiguous().t()  # not contiguous
    torch.testing.assert_close(
        [*losses_and_slopes(turned, 1.0)], [*losses_and_slopes(logits, 1.0)], rtol=1e-5, atol=1e-5
    )
    none = torch.zeros(0, dtype=torch.long)
    assert head.focal_loss(torch.zeros(0, 3, requires_grad=True), none, none, torch.zeros(0)).shape == (0,)


def test_focal_loss_refuses_a_second_backward_pass():
    """Its slopes became the gradient of the first one."""
    x, first = torch.zeros(4, 3, requires_grad=True), torch.arange(2)
    loss = make_head(FcosHead).focal_loss(x, first, first, torch.ones(2)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_giou_loss_and_its_gradient_equal_torchvisions():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 200, 2, generator=generator, dtype=torch.float64) * 20
    boxes = torch.cat([low, low + torch.rand(2, 200, 2, generator=generator, dtype=torch.float64) * 20], 2)
    predicted, target = boxes[0].requires_grad_(), boxes[1].detach()
    ours, theirs = giou_loss(predicted, target), generalized_box_iou_loss(predicted, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), predicted)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["fcos", "retinanet", "semantic", "classify"])
def test_losses_never_wait_for_the_device(name):
    head_type = HEADS[name]
    levels = head_type.levels(head_type.Config(type="x", data="d"))
    head, features, batch = make_head(head_type), make_features(levels), make_batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # raises where a value must be known to go on
        fake = {level: mode.from_tensor(f) for level, f in features.items()}
        for target in batch.targets:
            for key, value in vars(target).items():
                if isinstance(value, torch.Tensor):
                    setattr(target, key, mode.from_tensor(value))
        sum(head.loss(head(fake, batch.sizes), batch).values())
        with pytest.raises(Exception, match=r"nonzero"):
            torch.nonzero(fake[levels[0]] > 0)  # the same mode does refuse what waits


def test_semantic_loss_is_the_mean_over_labelled_pixels_alone():
    head, features, batch = make_head(SemanticHead), make_features(SEMANTIC_LEVELS), make_batch()
    batch.targets[0].semantic[10:30] = 255
    output = head(features, batch.sizes)
    logits = F.interpolate(output, size=(96, 128), mode="bilinear", align_corners=False).log_softmax(1)
    picked = []
    for row, target in zip(logits, batch.targets, strict=True):
        height, width = target.size.hw
        labels = target.semantic.long()
        picked.append(-row[:, :height, :width].gather(0, labels.clamp(max=2)[None])[0][labels != 255])
    assert sum(map(len, picked)) == 76 * 120 + 80 * 128
    torch.testing.assert_close(head.loss(output, batch)["loss_sem"], torch.cat(picked).mean())


def test_semantic_loss_ignores_what_is_in_ignored_pixels():
    head, features, batch = make_head(SemanticHead), make_features(SEMANTIC_LEVELS), make_batch()
    batch.targets[0].semantic[:, :64] = 255
    output = head(features, batch.sizes)
    changed = output.detach().clone()
    changed[0, :, :, :7] += 5  # cells whose bilinear reach ends before pixel 64
    assert head.loss(changed, batch)["loss_sem"] == head.loss(output, batch)["loss_sem"]
    changed[0, 0, :, 9:] += 5
    assert head.loss(changed, batch)["loss_sem"] != head.loss(output, batch)["loss_sem"]


def test_semantic_logits_are_cropped_not_squeezed_to_the_image():
    head = make_head(SemanticHead)
    output = torch.zeros(1, 3, 12, 16)
    output[0, 1, :, 8:] = 9  # right half of the padded input, from pixel 64
    (prediction,) = head.decode(output, [ImageSize((90, 100), (90, 100))])
    labels = prediction.semantic.argmax(0)
    assert labels.shape == (90, 100)
    assert (labels[:, :60] == 0).all() and (labels[:, 61:] == 1).all()  # pixel 60 is cell 7's centre


def test_semantic_logits_of_a_coarse_level_cover_the_batch():
    """Each cell covers its 64 pixels: the batch's 96 x 160 end inside the last ones."""
    head, output = make_head(SemanticHead, levels=["p6"]), torch.randn(2, 3, 2, 3)
    batch = make_batch(((90, 150), (96, 160)), padded=(96, 160))
    whole = F.interpolate(output, size=(128, 192), mode="bilinear", align_corners=False)
    found = head.decode(output, batch.sizes)
    picked = []
    for prediction, row, target in zip(found, whole, batch.targets, strict=True):
        height, width = target.size.hw
        assert torch.equal(prediction.semantic, row[:, :height, :width])
        picked.append(-prediction.semantic.log_softmax(0).gather(0, target.semantic.long()[None]).flatten())
    torch.testing.assert_close(head.loss(output, batch)["loss_sem"], torch.cat(picked).mean())


def test_semantic_sums_levels_of_different_width():
    head = make_head(SemanticHead, levels=["layer2", "layer4"], norm=None, channels=16)
    assert head(make_features(("layer2", "layer4")), make_batch().sizes).shape == (2, 3, 12, 16)


@pytest.mark.parametrize("multi_label", [False, True])
def test_classification_does_not_see_the_padding(multi_label):
    head, features = make_head(ClassifyHead, multi_label=multi_label).eval(), make_features(("p5",), count=1)
    size = ImageSize((64, 70), (64, 70))  # 2 × 3 of 3 × 4 cells
    (before,) = head.decode(head(features, [size]), [size])
    inside = features["p5"][0, :, :2, :3].mean((1, 2))
    linear = head.classifier["p5"]
    logits = linear.weight[:, :, 0, 0] @ inside + linear.bias
    expected = logits.sigmoid() if multi_label else logits.softmax(0)
    torch.testing.assert_close(before.probabilities, expected)
    features["p5"][:, :, 2:] = 99
    features["p5"][:, :, :, 3:] = 99
    (after,) = head.decode(head(features, [size]), [size])
    assert torch.equal(before.probabilities, after.probabilities)


def test_classification_losses_are_cross_entropies():
    features, batch = make_features(("p5",)), make_batch()
    labels = torch.stack([t.image_labels for t in batch.targets])
    one, many = (make_head(ClassifyHead, multi_label=multi) for multi in (False, True))
    logits = one(features, batch.sizes)
    torch.testing.assert_close(one.loss(logits, batch)["loss_cls"], F.cross_entropy(logits, labels.int().argmax(1)))
    expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(many.loss(many(features, batch.sizes), batch)["loss_cls"], expected)
    assert (one.main_metric, many.main_metric) == ("cls/accuracy", "cls/mAP")


def test_dropout_works_in_training_alone():
    head, features, sizes = make_head(ClassifyHead, dropout=0.5), make_features(("p5",)), make_batch().sizes
    assert not torch.equal(head(features, sizes), head(features, sizes))
    head.eval()
    assert torch.equal(head(features, sizes), head(features, sizes))


def annotations_with(labels_per_image: list[list[int]]) -> Annotations:
    counts = [len(labels) for labels in labels_per_image]
    total = sum(counts)
    return Annotations(
        root=Path("images"),
        classes=CLASSES,
        category_ids=np.arange(1, 4),
        image_ids=np.arange(len(counts)) + 50,
        file_names=PackedStrings(str(i) for i in range(len(counts))),
        sizes=np.full((len(counts), 2), 64, dtype=np.int32),
        first=np.cumsum([0, *counts]),
        boxes_xywh=np.ones((total, 4)),
        labels=np.concatenate(labels_per_image).astype(np.int32),
        crowd=np.zeros(total, dtype=bool),
        areas=np.ones(total),
        object_ids=np.arange(1, total + 1),
    )


@pytest.mark.parametrize(("labels", "said"), [([[0], [1, 2]], "image 51 .* 2 classes"), ([[0], []], "image 51 .* 0")])
def test_single_label_classification_needs_exactly_one_class(labels, said):
    with pytest.raises(UserError, match=r"heads\.objects\.multi_label: false, but " + said):
        make_head(ClassifyHead).check_data(annotations_with(labels))
    make_head(ClassifyHead, multi_label=True).check_data(annotations_with(labels))
    make_head(ClassifyHead).check_data(annotations_with([[0, 0], [2]]))


def test_evaluators_follow_the_heads():
    annotations = annotations_with([[0], [1]])
    assert type(make_head(FcosHead).evaluator(annotations, engine="pycocotools")).__name__ == "CocoEvaluator"
    for multi_label, metric in ((False, "cls/accuracy"), (True, "cls/mAP")):
        head = make_head(ClassifyHead, multi_label=multi_label)
        evaluator = head.evaluator(annotations)
        features, sizes = make_features(("p5",)), [ImageSize((64, 64), (64, 64))] * 2
        for image_id, prediction in zip((50, 51), head.eval().decode(head(features, sizes), sizes), strict=True):
            evaluator.add(image_id, prediction)
        assert metric in evaluator.summarize(evaluator.state())
