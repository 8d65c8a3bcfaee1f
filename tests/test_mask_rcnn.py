"""Mask R-CNN: torchvision's losses and masks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torchvision.models.detection import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign
from two_stage import (
    assert_equals_torchvision,
    assert_precisions,
    assert_trains_without_boxes,
    make_batch,
    make_features,
    make_head,
    torchvision_model,
)

from detbb.heads.mask_rcnn import MaskRcnnHead

LEVELS = ("p2", "p3", "p4", "p5")


def make_mask_head(**arguments):
    return make_head(MaskRcnnHead, mask_channels=[16, 16], mask_resolution=7, **arguments)


def test_losses_gradients_and_masks_equal_torchvision():
    head = make_mask_head()
    model = torchvision_model(
        MaskRCNN,
        head,
        levels=LEVELS,
        mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), 7, 2),
        mask_head=head.mask_head,
        mask_predictor=head.mask_predictor,
    )
    assert_equals_torchvision(head, model, make_features(), make_batch())


def test_a_batch_without_boxes_reaches_every_parameter():
    assert_trains_without_boxes(make_mask_head())


def test_objects_without_a_mask_do_not_train_masks():
    head, features, batch = make_mask_head(), make_features(), make_batch()
    target = batch.targets[0]
    target.masks[1] = 0
    rois = head.sample([target.boxes[:0]], [target])
    with_mask = rois.select([rois.matched[0] != 1])
    assert len(with_mask.boxes[0]) == 2 == len(rois.boxes[0]) - 1
    one = {name: level[:1] for name, level in features.items()}
    assert torch.equal(*(head.branch_loss(one, r, [target])["loss_mask"] for r in (rois, with_mask)))


def test_bf16_autocast_and_fp64_keep_losses_precise():
    assert_precisions(make_mask_head())


def test_masks_have_28_cells_a_side_and_are_empty_without_boxes():
    head = make_head(MaskRcnnHead, mask_channels=[16])
    batch = make_batch()
    output = head(make_features(), batch.sizes)
    prediction = head.decode(output, batch.sizes)[0]
    assert prediction.masks.shape == (len(prediction.boxes), 28, 28) and len(prediction.boxes)
    assert prediction.masks.min() >= 0 and prediction.masks.max() <= 1
    empty = make_head(MaskRcnnHead, mask_channels=[16], score_threshold=1.0).decode(output, batch.sizes)
    assert [p.masks.shape for p in empty] == [(0, 28, 28)] * 2


def test_a_mask_is_learned_where_it_lies_in_its_box():
    """The loss is small for logits that hold the box's crop of the target, and for no other class's channel."""
    head, batch = make_mask_head(), make_batch()
    target = replace(batch.targets[0], masks=torch.zeros(3, 128, 128, dtype=torch.uint8))
    target.masks[0, 12:36, 10:50] = 1  # the upper half of box 0
    rois = head.sample([target.boxes[:0]], [target])  # the boxes themselves
    rois = rois.select([rois.matched[0] == 0])
    logits = torch.full((1, 4, 14, 14), -5.0)
    logits[:, 1, :7] = 5.0
    head.mask_logits = lambda features, boxes: logits
    assert head.branch_loss({}, rois, [target])["loss_mask"] < 0.3
    logits = logits.roll(1, dims=1)
    assert head.branch_loss({}, rois, [target])["loss_mask"] > 2
