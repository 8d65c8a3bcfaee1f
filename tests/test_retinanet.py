"""RetinaNet: torchvision's losses, matching and detections."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    assert_equals_torchvision,
    make_batch,
    make_features,
    make_head,
    random_boxes,
    torchvision_targets,
    torchvision_twin,
)
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher

from detbb.core.errors import UserError
from detbb.heads.retinanet import RetinaNetHead

LEVELS = ("p3", "p4", "p5", "p6", "p7")
DEFAULTS = {"num_convs": 4, "score_threshold": 0.005, "detections_per_image": 100}


def twin_of(head, features, **arguments):
    limits = {"score_thresh": head.config.score_threshold, "detections_per_img": 100}
    return torchvision_twin(RetinaNet, head, features, **limits, **arguments)


@pytest.mark.parametrize("objects", [0, 1, 12])
@pytest.mark.parametrize("hw", [(96, 128), (160, 224)])
def test_losses_gradients_and_detections_equal_torchvisions(objects, hw):
    batch = make_batch(((hw[0] - 9, hw[1]), (hw[0], hw[1] - 30)), objects=objects, padded=hw)
    head, features = make_head(RetinaNetHead, **DEFAULTS), make_features(LEVELS, hw)
    assert_equals_torchvision(head, twin_of(head, features), features, batch)


def test_an_image_without_boxes_in_a_batch_equals_torchvision():
    batch = make_batch()
    batch.targets[0] = make_batch(objects=0).targets[0]
    head, features = make_head(RetinaNetHead, **DEFAULTS), make_features(LEVELS)
    assert_equals_torchvision(head, twin_of(head, features), features, batch)


@pytest.mark.parametrize(("foreground", "background"), [(0.5, 0.4), (0.6, 0.6), (0.9, 0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_every_anchor_learns_the_box_that_torchvision_gives_it(foreground, background, seed):
    hw, generator = (160, 224), torch.Generator().manual_seed(seed)
    batch = make_batch((hw, hw), padded=hw)
    for target, count in zip(batch.targets, (40, 25), strict=True):
        target.boxes = random_boxes(count, hw, generator)
        target.labels = torch.randint(3, (count,), generator=generator)
    head = make_head(RetinaNetHead, num_convs=4, foreground_iou=foreground, background_iou=background)
    features = make_features(LEVELS, hw)
    matcher = Matcher(foreground, background, allow_low_quality_matches=True)
    twin, caught = twin_of(head, features, proposal_matcher=matcher).train(), []
    twin.head.compute_loss = lambda targets, outputs, anchors, matched: caught.append(matched) or {}
    twin(*torchvision_targets(batch))

    matched = head.match(batch, head.anchors(head(features, batch.sizes)))
    matched[1] = torch.where(matched[1] >= 0, matched[1] - 40, matched[1])
    assert (matched >= 0).any() and ((matched == -2).any() or foreground == background)
    assert torch.equal(matched, torch.stack(caught[0]))


def test_fewer_convolutions_keep_torchvisions_names():
    few, full = (set(make_head(RetinaNetHead, num_convs=n).state_dict()) for n in (2, 4))
    assert few < full and "classification_head.conv.1.0.weight" in few


@pytest.mark.parametrize("norm", ["gn", "bn", "frozen_bn"])
def test_towers_take_a_norm(norm):
    head, batch = make_head(RetinaNetHead, norm=norm), make_batch()
    losses = head.loss(head(make_features(LEVELS), batch.sizes), batch)
    assert all(loss.isfinite() for loss in losses.values())
    assert "classification_head.conv.0.1.weight" in head.state_dict()


def test_torchvision_has_four_convolutions_to_take_from():
    with pytest.raises(UserError, match=r"heads\.objects\.num_convs: 5; valid are 0 … 4"):
        make_head(RetinaNetHead, num_convs=5)
