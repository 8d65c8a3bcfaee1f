"""FCOS: torchvision's losses, assignment and detections from fewer operations."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    assert_equals_torchvision,
    make_batch,
    make_features,
    make_head,
    make_spec,
    random_boxes,
    torchvision_targets,
    torchvision_twin,
)
from torch import nn
from torchvision.models.detection import FCOS

from detbb.core.errors import UserError
from detbb.heads.fcos import FcosHead
from detbb.modeling.norm import FrozenBatchNorm2d
from detbb.structures.batch import ImageSize

LEVELS = ("p3", "p4", "p5", "p6", "p7")
DEFAULTS = {"num_convs": 4, "score_threshold": 0.05, "detections_per_image": 100}


def twin_of(head, features, **arguments):
    return torchvision_twin(FCOS, head, features, score_thresh=head.config.score_threshold, **arguments)


@pytest.mark.parametrize("objects", [0, 1, 12])
@pytest.mark.parametrize("hw", [(96, 128), (160, 224)])  # in both, torchvision's anchor stride of p7 is not 128
def test_losses_gradients_and_detections_equal_torchvisions(objects, hw):
    batch = make_batch(((hw[0] - 9, hw[1]), (hw[0], hw[1] - 30)), objects=objects, padded=hw)
    head, features = make_head(FcosHead, **DEFAULTS), make_features(LEVELS, hw)
    assert_equals_torchvision(head, twin_of(head, features), features, batch)


@pytest.mark.parametrize("radius", [0.5, 1.5, 3.2])
@pytest.mark.parametrize("seed", range(4))
def test_every_cell_learns_the_box_that_torchvision_gives_it(radius, seed):
    hw, generator = (160, 224), torch.Generator().manual_seed(seed)
    batch = make_batch((hw, hw), padded=hw)
    for target, count in zip(batch.targets, (60, 25), strict=True):
        target.boxes = random_boxes(count, hw, generator)
        target.labels = torch.randint(3, (count,), generator=generator)
    head, features = make_head(FcosHead, num_convs=4, center_sampling_radius=radius), make_features(LEVELS, hw)
    twin, caught = twin_of(head, features, center_sampling_radius=radius).train(), []
    twin.head.compute_loss = lambda targets, outputs, anchors, matched: caught.append(matched) or {}
    twin(*torchvision_targets(batch))

    image = torch.tensor([0] * 60 + [1] * 25)
    output = head(features, batch.sizes)
    found = head.assign(torch.cat([t.boxes for t in batch.targets]), image, output)
    cells = output.logits.shape[1]
    matched = torch.full((2, cells), -1)
    matched.view(-1)[found.cell[found.won]] = found.box[found.won]
    matched[1] = torch.where(matched[1] >= 0, matched[1] - 60, -1)
    assert found.won.sum() == (matched >= 0).sum() > 40  # each cell once
    assert torch.equal(matched, torch.stack(caught[0]))


def test_of_boxes_with_tied_areas_the_first_wins():
    head, features = make_head(FcosHead), make_features(LEVELS)
    same = torch.tensor([[20.0, 20.0, 44.0, 44.0]]).repeat(3, 1)
    found = head.assign(same, torch.zeros(3, dtype=torch.long), head(features, make_batch().sizes))
    assert found.won.any() and (found.box[found.won] == 0).all()


def test_score_is_the_geometric_mean_of_class_and_centerness():
    head, features = make_head(FcosHead, detections_per_image=1), make_features(LEVELS, count=1)
    sizes = [ImageSize((96, 128), (96, 128))]
    with torch.no_grad():
        output = head(features, sizes)
        best = (output.logits[0].sigmoid() * output.centerness[0].sigmoid()[:, None]).max().sqrt()
        assert head.decode(output, sizes)[0].scores.item() == pytest.approx(best.item())


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("gn", nn.GroupNorm), ("bn", nn.BatchNorm2d), ("frozen_bn", FrozenBatchNorm2d), (None, nn.Identity)],
)
def test_every_tower_convolution_has_the_configured_norm(norm, kind):
    head = make_head(FcosHead, norm=norm, num_convs=3)
    for tower in (head.classification_head.conv, head.regression_head.conv):
        assert [type(m) for m in tower] == [nn.Conv2d, kind, nn.ReLU] * 3
    batch = make_batch()
    assert head.loss(head(make_features(LEVELS), batch.sizes), batch)["loss_cls"].isfinite()


def test_one_level_of_a_bare_backbone_works():
    head, batch = make_head(FcosHead, levels=["layer4"], num_convs=1), make_batch()
    losses = head.loss(head(make_features(("layer4",)), batch.sizes), batch)
    assert all(loss.isfinite() for loss in losses.values())


def test_fresh_scores_start_at_the_prior():
    head = make_head(FcosHead, prior_probability=0.2)
    assert head.classification_head.cls_logits.bias.sigmoid().mean().item() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"levels": ["layer3", "layer4"]}, r"heads\.objects\.levels: channels differ .*layer3.*256.*layer4.*512"),
        ({"levels": []}, r"heads\.objects\.levels: \[\]; valid are"),
        ({"levels": ["p3", "p3"]}, r"heads\.objects\.levels: \['p3', 'p3'\]; valid are, each once"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        make_head(FcosHead, **arguments)


def test_levels_are_read_finest_first_in_any_order():
    features, batch = make_features(LEVELS), make_batch()
    one, other = (make_head(FcosHead, levels=list(names)) for names in (LEVELS, LEVELS[::-1]))
    for name, loss in one.loss(one(features, batch.sizes), batch).items():
        assert torch.equal(loss, other.loss(other(features, batch.sizes), batch)[name])
    assert make_spec().pick(["p5", "p3"]) == ("p3", "p5")
