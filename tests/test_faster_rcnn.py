"""Faster R-CNN, with an FPN and C4: torchvision's losses and detections, seeded sampling, global normalisers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from two_stage import (
    CHANNELS,
    SMALL,
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
from detbb.heads import rpn as rpn_module
from detbb.heads.faster_rcnn import FasterRcnnHead
from detbb.heads.faster_rcnn_c4 import FasterRcnnC4Head
from detbb.heads.sampling import SeededSampler

C4 = {"box_resolution": 4, "anchor_sizes": [[16.0, 32.0, 64.0]]}
C4_SPEC = {"strides": {"layer3": 16}, "channels": 256}


def make_c4_head(**arguments):
    shared = {k: v for k, v in SMALL.items() if k != "box_channels"}
    torch.manual_seed(0)
    config = FasterRcnnC4Head.Config(type="faster_rcnn_c4", data="x", **{**shared, **C4, **arguments})
    return FasterRcnnC4Head(config, make_spec(**C4_SPEC))


def test_losses_gradients_and_detections_equal_torchvision():
    head = make_head(FasterRcnnHead)
    model = torchvision_model(FasterRCNN, head, levels=("p2", "p3", "p4", "p5"))
    assert_equals_torchvision(head, model, make_features(), make_batch())


def test_equal_torchvision_where_no_level_divides_the_image():
    features = make_features(side=160) | {"pool": torch.randn(2, CHANNELS, 3, 3)}
    head = make_head(FasterRcnnHead)
    model = torchvision_model(FasterRCNN, head, levels=("p2", "p3", "p4", "p5"))
    assert_equals_torchvision(head, model, features, make_batch(side=160))


def test_c4_losses_gradients_and_detections_equal_torchvision():
    head = make_c4_head().eval()  # batch norm in eval mode in both
    box_head = nn.Sequential(head.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = torchvision_model(FasterRCNN, head, levels=("layer3",), box_head=box_head, config=C4)
    model.train = lambda mode=True: _train_but_layer4(model, head, mode)
    assert_equals_torchvision(head, model, make_features(**C4_SPEC), make_batch())


def _train_but_layer4(model, head, mode):
    nn.Module.train(model, mode)
    head.layer4.eval()
    return model


def test_c4_layer4_takes_weights_and_norm_of_the_backbone():
    head = make_c4_head()
    state = {f"layer4.{k}": torch.full_like(v, 7) for k, v in head.layer4.state_dict().items()}
    head.load_backbone_weights({**state, "conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})
    assert all(torch.equal(v, state[f"layer4.{k}"]) for k, v in head.layer4.state_dict().items())
    assert head.backbone_parts == ("layer4",)
    config = FasterRcnnC4Head.Config(type="faster_rcnn_c4", data="x")
    norms = FasterRcnnC4Head(config, make_spec(**C4_SPEC, norm="gn")).layer4
    assert {type(m) for m in norms.modules() if "Norm" in type(m).__name__} == {nn.GroupNorm}


@pytest.mark.parametrize("make", [lambda: make_head(FasterRcnnHead), make_c4_head], ids=["fpn", "c4"])
def test_fixed_statistics_give_the_same_output_in_both_modes(make):
    head = make()
    features = make_features(**C4_SPEC) if isinstance(head, FasterRcnnC4Head) else make_features()
    batch, results = make_batch(), []
    for mode in (True, False):
        head.train(mode)
        if isinstance(head, FasterRcnnC4Head):
            head.layer4.eval()
        output = head(features, batch.sizes)
        results.append((head.loss(output, batch), head.decode(output, batch.sizes)[0].boxes))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_batch_without_boxes_reaches_every_parameter():
    assert_trains_without_boxes(make_head(FasterRcnnHead))


def test_bf16_autocast_and_fp64_keep_losses_precise():
    assert_precisions(make_head(FasterRcnnHead))


def test_two_shares_of_a_batch_average_to_the_whole(monkeypatch):
    """DDP's mean over two ranks is the loss of the whole batch, though their samples differ in number."""
    head = make_head(FasterRcnnHead).double()
    features, batch = {k: v.double() for k, v in make_features().items()}, make_batch()
    batch.targets[1] = replace(batch.targets[1], boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    totals: list[torch.Tensor] = []
    counts: list[float] = []

    def record(count):
        totals.append(count)
        return count

    monkeypatch.setattr(rpn_module, "shared_count", record)
    whole = head.loss(head(features, batch.sizes), batch)

    def share(i):
        remaining = iter(totals)

        def of_all_ranks(count):
            counts.append(float(count))
            return next(remaining) / 2

        monkeypatch.setattr(rpn_module, "shared_count", of_all_ranks)
        part = replace(batch, images=batch.images[i : i + 1], targets=batch.targets[i : i + 1])
        return head.loss(head({k: v[i : i + 1] for k, v in features.items()}, part.sizes), part)

    first, second = share(0), share(1)
    assert counts[0] != counts[2] and counts[1] != counts[3]  # else the local mean would pass too
    for name, loss in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, loss, rtol=1e-10, atol=1e-12)


def test_what_is_sampled_depends_on_the_image_alone():
    head = make_head(FasterRcnnHead, rpn_samples=16, box_samples=6)
    features, batch = make_features(), make_batch()
    proposals = head.rpn.proposals(head(features, batch.sizes).rpn, batch.sizes, "train")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    both = head.sample(proposals, batch.targets)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    swapped = head.sample(proposals[::-1], batch.targets[::-1])
    alone = head.sample(proposals[1:], batch.targets[1:])
    assert torch.equal(both.boxes[1], swapped.boxes[0]) and torch.equal(both.boxes[1], alone.boxes[0])
    other = head.sample(proposals[1:], [replace(batch.targets[1], seed=5)])
    assert not torch.equal(both.boxes[1], other.boxes[0])


@pytest.mark.parametrize(("positives", "negatives"), [(3, 100), (50, 100), (50, 4), (0, 7), (0, 0)])
def test_sampler_takes_as_many_as_torchvisions(positives, negatives):
    labels = torch.cat([torch.full((positives,), 2), torch.zeros(negatives), torch.full((9,), -1)]).long()
    expected = BalancedPositiveNegativeSampler(20, 0.25)([labels])
    for indices, mask in zip(SeededSampler(20, 0.25, "a")(labels, 0), expected, strict=True):
        assert len(indices) == int(mask[0].sum())
        assert torch.equal(indices, indices.unique())


def test_sampler_takes_each_candidate_equally_often():
    labels = torch.zeros(40, dtype=torch.int64)
    sampler = SeededSampler(10, 0.5, "a")
    drawn = torch.cat([sampler(labels, seed)[1] for seed in range(2000)])
    frequency = drawn.bincount(minlength=40) / 2000
    assert (frequency - 0.25).abs().max() < 0.05  # five standard deviations
    assert not torch.equal(sampler(labels, 0)[1], SeededSampler(10, 0.5, "b")(labels, 0)[1])


def test_rois_are_read_at_the_scale_of_their_level():
    """A 40-pixel image in a 128-pixel batch: torchvision's pooling would infer the scale 2 from it."""
    head = make_head(FasterRcnnHead)
    features = make_features()
    features["p2"] = torch.arange(32.0).repeat(32, 1).expand(2, CHANNELS, 32, 32).contiguous()  # the column's index
    pooled = head.box_pool(features, [torch.tensor([[8.0, 8, 40, 40]]), torch.zeros(0, 4)], [(40, 40), (40, 40)])
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([3.0, 5.0, 7.0, 9.0]))


def test_a_threshold_above_all_scores_gives_no_detections():
    head = make_head(FasterRcnnHead, score_threshold=1.0)
    batch = make_batch()
    assert [p.boxes.shape for p in head.decode(head(make_features(), batch.sizes), batch.sizes)] == [(0, 4), (0, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchor_sizes": [[32.0]]}, "heads.objects.anchor_sizes"),
        ({"anchor_sizes": [[8.0], [16.0], [32.0], [64.0], [128.0, 256.0]]}, "all of one length"),
        ({"roi_levels": ["p2", "p4"]}, "heads.objects.roi_levels: p2, p4 .strides .4, 16.."),
        ({"levels": ["p2", "p9"]}, "'p9'"),
    ],
)
def test_levels_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_head(FasterRcnnHead, **arguments)
