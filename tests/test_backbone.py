"""Backbones are torchvision's ResNets: same keys, same bits, only the stages that are used."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from detbb.core.errors import UserError
from detbb.modeling.backbones import BACKBONES, Backbone
from detbb.modeling.backbones.resnet import STRIDES, build_resnet, build_resnet_c4
from detbb.modeling.norm import FrozenBatchNorm2d, group_norm, is_norm

WHOLE = ("layer1", "layer2", "layer3", "layer4")


def reference(arch: str, *, seed: int = 0) -> nn.Module:
    """torchvision's model in eval mode, with running statistics that are neither 0 nor 1."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch, weights=None)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and "fc" not in name:
            tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.5)
    return model.eval()


def stages_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = {}
    for name in WHOLE:
        x = features[name] = getattr(model, name)(x)
    return features


def take(backbone: nn.Module, model: nn.Module) -> None:
    own = backbone.state_dict()
    backbone.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_features_are_torchvisions_bit_for_bit(arch, norm):
    model = reference(arch)
    backbone = build_resnet(arch, norm_layer=norm, out=WHOLE).eval()
    take(backbone, model)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = stages_of(model, x), backbone(x)
    assert list(found) == list(WHOLE)
    for name, feature in found.items():
        assert torch.equal(feature, expected[name]), name
        assert feature.shape == (2, backbone.channels[name], 64 // backbone.strides[name], 96 // backbone.strides[name])


def test_keys_are_torchvisions_and_unused_stages_are_not_there():
    model = torchvision.models.resnet50(weights=None)
    backbone = build_resnet("resnet50", out=("layer3", "layer2"))
    later = ("layer4.", "fc.")
    assert list(backbone.state_dict()) == [k for k in model.state_dict() if not k.startswith(later)]
    assert (backbone.out, backbone.stages) == (("layer2", "layer3"), ("stem", "layer1", "layer2", "layer3"))
    assert (backbone.channels, backbone.strides) == ({"layer2": 512, "layer3": 1024}, {"layer2": 8, "layer3": 16})
    assert not hasattr(backbone, "layer4")


@pytest.mark.parametrize("arch", ["resnext50_32x4d", "wide_resnet50_2"])
def test_other_architectures_have_torchvisions_shapes(arch):
    model = torchvision.models.get_model(arch, weights=None)
    backbone = build_resnet(arch, out=("layer4",))
    expected = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in backbone.state_dict().items()} == expected
    assert backbone.channels == {"layer4": 2048}


def test_every_resnet_of_torchvision_is_offered():
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_64x4d", "wide_resnet101_2"} <= {
        *BACKBONES
    }
    assert len(BACKBONES) >= 10


def test_norm_layer_makes_every_norm_including_downsample():
    class Marked(nn.GroupNorm):
        pass

    backbone = build_resnet("resnet18", norm_layer=lambda channels: Marked(4, channels), out=WHOLE)
    norms = {name: type(m) for name, m in backbone.named_modules() if is_norm(m)}
    assert set(norms.values()) == {Marked}
    assert len(norms) == 20 and "layer2.0.downsample.1" in norms and "bn1" in norms
    assert backbone.train()(torch.randn(1, 3, 64, 64))["layer4"].shape == (1, 512, 2, 2)


def test_initial_weights_do_not_depend_on_the_stages_kept():
    torch.manual_seed(3)
    small = build_resnet("resnet18", norm_layer=group_norm, out=("layer2",)).state_dict()
    torch.manual_seed(3)
    large = build_resnet("resnet18", norm_layer=group_norm, out=WHOLE).state_dict()
    assert all(torch.equal(tensor, large[name]) for name, tensor in small.items())


def test_running_stage_by_stage_is_the_forward():
    backbone = build_resnet("resnet18", out=("layer1", "layer3")).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(x)
        for stage in backbone.stages:
            x = torch.nn.Sequential(*backbone.stage_modules(stage))(x)
            assert stage not in expected or torch.equal(x, expected[stage])


@pytest.mark.parametrize(("arch", "tensors", "parameters"), [("resnet18", 15, 157_504), ("resnet50", 33, 225_344)])
def test_stem_and_layer1_have_the_parameters_of_freeze_at_2(arch, tensors, parameters):
    backbone = build_resnet(arch, out=("layer1",))
    found = [p for m in (*backbone.stage_modules("stem"), backbone.layer1) for p in m.parameters()]
    assert (len(found), sum(p.numel() for p in found)) == (tensors, parameters)


def test_c4_splits_torchvisions_network_before_layer4():
    model = reference("resnet50")
    backbone, head = build_resnet_c4("resnet50")
    assert (backbone.channels, backbone.strides, head.out_channels) == ({"layer3": 1024}, {"layer3": 16}, 2048)
    assert isinstance(backbone, Backbone) and not hasattr(backbone, "layer4")
    assert list(head.state_dict()) == list(model.layer4.state_dict())
    take(backbone, model)
    head.load_state_dict(model.layer4.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(head.eval()(backbone.eval()(x)["layer3"]), stages_of(model, x)["layer4"])


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(
        UserError, match=r"backbone.arch: 'resnet51' is not known; valid are resnet.*did you mean 'resnet"
    ):
        build_resnet("resnet51")
    with pytest.raises(
        UserError, match=r"'layer5' is not known; valid are layer1, layer2, layer3, layer4; did you mean"
    ):
        build_resnet("resnet18", out=("layer2", "layer5"))
    with pytest.raises(UserError, match="nothing is named"):
        build_resnet("resnet18", out=())
    assert tuple(STRIDES) == WHOLE
