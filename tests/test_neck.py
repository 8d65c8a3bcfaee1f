"""The FPN computes what torchvision's computes, under names that stay when other levels are added."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detbb.config.schema import NeckConfig
from detbb.core.errors import UserError
from detbb.modeling.neck import COARSE, FINE, Fpn, build_neck, lateral, stages_needed

CHANNELS = {"layer1": 8, "layer2": 16, "layer3": 24, "layer4": 32}
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
LATERAL = {"p2": "layer1", "p3": "layer2", "p4": "layer3", "p5": "layer4"}
RETINA = ("p3", "p4", "p5", "p6", "p7")


def features(height: int = 128, width: int = 160) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, channels, -(-height // STRIDES[name]), -(-width // STRIDES[name]), generator=generator)
        for name, channels in CHANNELS.items()
    }


def fpn(levels, norm=None) -> Fpn:
    return build_neck(NeckConfig(channels=12, norm=norm), CHANNELS, STRIDES, levels)


def theirs(neck: Fpn, levels, *, norm_layer=None) -> FeaturePyramidNetwork:
    """torchvision's FPN over the layers of `neck`, with its weights."""
    extra = LastLevelP6P7(12, 12) if "p7" in levels else LastLevelMaxPool()
    layers = [LATERAL[p] for p in levels if p in LATERAL]
    network = FeaturePyramidNetwork([CHANNELS[layer] for layer in layers], 12, extra, norm_layer)
    for i, layer in enumerate(layers):
        network.inner_blocks[i].load_state_dict(neck.inner[layer].state_dict())
        network.layer_blocks[i].load_state_dict(neck.output[levels[i]].state_dict())
    if "p7" in levels:
        extra.p6.load_state_dict(neck.p6.state_dict())
        extra.p7.load_state_dict(neck.p7.state_dict())
    return network


@pytest.mark.parametrize("levels", [RETINA, ("p2", "p3", "p4", "p5", "pool")])
@pytest.mark.parametrize("size", [(128, 160), (100, 75)])
@pytest.mark.parametrize("norm", [None, "bn"])
def test_levels_are_torchvisions_bit_for_bit(levels, size, norm):
    neck = fpn(levels, norm)
    network = theirs(neck, levels, norm_layer=nn.BatchNorm2d if norm else None)
    x = features(*size)
    used = OrderedDict((layer, x[layer]) for p, layer in LATERAL.items() if p in levels)
    expected = network(used)
    found = neck(x)
    for level, value in zip(levels, expected.values(), strict=True):
        assert torch.equal(found[level], value), level
        assert neck.channels[level] == value.shape[1]
        assert neck.strides[level] == {**FINE, **COARSE}[level]
    assert all(found[name] is x[name] for name in x)


def test_adding_levels_renames_and_reshapes_nothing():
    before = {k: v.shape for k, v in fpn(RETINA).state_dict().items()}
    after = {k: v.shape for k, v in fpn(("p2", "pool", *RETINA, "layer1")).state_dict().items()}
    assert {k: after[k] for k in before} == before
    added = {f"{block}.0.{kind}" for block in ("inner.layer1", "output.p2") for kind in ("weight", "bias")}
    assert set(after) - set(before) == added
    assert {"inner.layer2.0.weight", "output.p3.0.bias", "p6.weight", "p7.bias"} <= set(before)


def test_levels_added_later_change_no_bit_of_the_others():
    old, new = fpn(RETINA), fpn(("p2", "pool", *RETINA))
    new.load_state_dict(old.state_dict(), strict=False)
    x = features()
    expected, found = old(x), new(x)
    assert all(torch.equal(found[level], expected[level]) for level in RETINA)


@pytest.mark.parametrize(
    ("levels", "inner", "output"),
    [
        (("p4",), ["layer3", "layer4"], ["p4"]),
        (("pool",), ["layer4"], ["p5"]),
        (("p7",), ["layer4"], ["p5"]),
        (("layer2",), [], []),
        (("p2", "p5"), ["layer1", "layer2", "layer3", "layer4"], ["p2", "p5"]),
    ],
)
def test_only_what_is_needed_is_built_and_all_of_it_is_used(levels, inner, output):
    neck = fpn(levels)
    assert (list(neck.inner), list(neck.output)) == (inner, output)
    out = neck({name: x for name, x in features().items()})
    assert set(out) == set(neck.channels) == set(neck.strides)
    if inner:
        sum(out[level].sum() for level in out if level not in CHANNELS).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_initialisation_is_torchvisions():
    neck = fpn(RETINA)
    bound = (6 / ((1 + 1) * 12 * 9)) ** 0.5  # kaiming_uniform with a = 1
    for name, parameter in neck.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif not name.startswith("inner"):
            assert 0.95 * bound < parameter.abs().max() <= bound


def test_only_the_stages_that_levels_come_from_are_needed():
    assert stages_needed(("p3", "p7"), "fpn", STRIDES) == ("layer2", "layer3", "layer4")
    assert stages_needed(("pool", "layer1"), "fpn", STRIDES) == ("layer1", "layer4")
    assert stages_needed(("layer3", "layer2"), "none", STRIDES) == ("layer2", "layer3")


def test_fpn_levels_come_from_the_stages_of_their_stride():
    """Of several stages of one stride, from the last; a level without one is not offered."""
    strides = {"a": 8, "b": 16, "c": 16, "d": 32}
    assert lateral(strides) == {"p3": "a", "p4": "c", "p5": "d"}
    assert stages_needed(("p4",), "fpn", strides) == ("c", "d")
    with pytest.raises(UserError, match=r"'p2' is not known; valid are a, b, c, d, p3, p4, p5, pool"):
        stages_needed(("p2",), "fpn", strides)
    with pytest.raises(UserError, match=r"'p6' is not known; valid are a, b, c, p3, p4$"):
        stages_needed(("p6",), "fpn", {"a": 8, "b": 16, "c": 16})


def test_unknown_levels_are_refused_naming_the_head():
    with pytest.raises(UserError, match=r"heads\.boxes\.levels: .*'p8' is not known; valid are layer1, .*pool, p6, p7"):
        stages_needed(("p3", "p8"), "fpn", STRIDES, where="heads.boxes.levels")
    with pytest.raises(
        UserError, match=r"neck\.type none: 'p3' is not known; valid are layer1, layer2, layer3, layer4"
    ):
        build_neck(NeckConfig(type="none"), CHANNELS, STRIDES, ("p3",))


def test_no_neck_hands_the_stages_through():
    neck = build_neck(NeckConfig(type="none"), CHANNELS, STRIDES, ("layer3",))
    x = features()
    assert neck(x) == x
    assert (neck.channels, neck.strides, list(neck.parameters())) == (CHANNELS, STRIDES, [])
