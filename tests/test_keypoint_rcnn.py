"""Keypoint R-CNN: torchvision's losses and keypoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.models.detection import KeypointRCNN
from torchvision.ops import MultiScaleRoIAlign
from two_stage import (
    KEYPOINTS,
    assert_equals_torchvision,
    assert_precisions,
    assert_trains_without_boxes,
    make_batch,
    make_features,
    make_head,
    make_spec,
    torchvision_model,
)

from detbb.core.errors import UserError
from detbb.heads.keypoint_rcnn import KeypointRcnnHead
from detbb.structures.predictions import Predictions

LEVELS = ("p2", "p3", "p4", "p5")


def make_keypoint_head(**arguments):
    return make_head(KeypointRcnnHead, keypoint_channels=[16, 16], keypoint_resolution=6, **arguments)


def test_losses_gradients_and_keypoints_equal_torchvision():
    head = make_keypoint_head()
    model = torchvision_model(
        KeypointRCNN,
        head,
        levels=LEVELS,
        keypoint_roi_pool=MultiScaleRoIAlign(list(LEVELS), 6, 2),
        keypoint_head=head.keypoint_head,
        keypoint_predictor=head.keypoint_predictor,
    )
    assert_equals_torchvision(head, model, make_features(), make_batch())


def test_a_batch_without_boxes_reaches_every_parameter():
    assert_trains_without_boxes(make_keypoint_head())


def test_bf16_autocast_and_fp64_keep_losses_precise():
    assert_precisions(make_keypoint_head())


def test_boxes_without_any_keypoint_train_only_the_box():
    head, batch = make_keypoint_head(), make_batch()
    for target in batch.targets:
        target.keypoints[..., 2] = 0
    losses = head.loss(head(make_features(), batch.sizes), batch)
    gradients = torch.autograd.grad(sum(losses.values()), list(head.parameters()))
    assert losses["loss_keypoint"] == 0 and losses["loss_box_reg"] > 0
    assert all(torch.isfinite(g).all() for g in gradients)


def test_hidden_keypoints_are_learned_too():
    head, batch = make_keypoint_head(), make_batch()
    for target in batch.targets:
        target.keypoints[..., 2] = 1
    assert head.loss(head(make_features(), batch.sizes), batch)["loss_keypoint"] > 0


def test_any_number_of_keypoints_each_with_a_score():
    head = make_keypoint_head(spec=replace(make_spec(), keypoints=("tip", "tail")))
    batch = make_batch()
    for prediction, size in zip(head.decode(head(make_features(), batch.sizes), batch.sizes), batch.sizes, strict=True):
        assert prediction.keypoints.shape == (len(prediction.boxes), 2, 3) and len(prediction.boxes)
        x, y, _ = prediction.keypoints.unbind(-1)
        boxes = prediction.boxes[:, None]
        assert ((x >= boxes[..., 0]) & (x <= boxes[..., 2])).all()
        assert ((y >= boxes[..., 1]) & (y <= boxes[..., 3])).all()
        assert size.hw[1] >= x.max()


def test_a_keypoint_is_learned_and_found_at_its_place():
    head, batch = make_keypoint_head(), make_batch()
    target = batch.targets[0]
    target.keypoints[..., 2] = 2
    rois = head.sample([target.boxes[:0]], [target])
    boxes, points = rois.boxes[0], target.keypoints[rois.matched[0]]
    cells = ((points[..., :2] - boxes[:, None, :2]) / (boxes[:, None, 2:] - boxes[:, None, :2]) * 24).long()
    logits = torch.zeros(len(boxes), len(KEYPOINTS), 24, 24)
    for i, j in torch.cartesian_prod(torch.arange(len(boxes)), torch.arange(len(KEYPOINTS))):
        logits[i, j, cells[i, j, 1], cells[i, j, 0]] = 30.0
    head.keypoint_logits = lambda features, boxes: logits
    assert head.branch_loss({}, rois, [target])["loss_keypoint"] < 1e-3
    found = Predictions(boxes=boxes)
    head.branch_decode({}, [boxes], [found])
    cell = (boxes[:, 2:] - boxes[:, :2])[:, None] / 24
    assert ((found.keypoints[..., :2] - points[..., :2]).abs() <= cell).all()


def test_data_without_keypoints_is_refused():
    with pytest.raises(UserError, match=r"heads\.objects\.data"):
        make_keypoint_head(spec=replace(make_spec(), keypoints=()))
