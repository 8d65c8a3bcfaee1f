"""ResNet, ResNeXt and wide ResNet backbones: torchvision's blocks, torchvision's keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detbb.core.errors import printable, unknown_name
from detbb.distributed.collectives import rank
from detbb.modeling.backbones.base import Backbone
from detbb.modeling.norm import NormLayer
from detbb.modeling.weights import load_backbone_weights

ARCHS = tuple(
    name
    for name in torchvision.models.list_models(torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
)
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}


class ResNet(Backbone):
    """A ResNet without its classifier; arch is torchvision's name, and state-dict keys are torchvision's own."""

    aliases: ClassVar = {"stem": ("conv1", "bn1", "relu", "maxpool")}

    def __init__(self, arch: str, *, norm_layer: NormLayer | None) -> None:
        super().__init__(arch)
        self.stages = ("stem", *STRIDES)
        resnet = torchvision.models.get_model(arch, weights=None, norm_layer=norm_layer)
        for name in (*self.aliases["stem"], *STRIDES):
            self.add_module(name, resnet.get_submodule(name))
        self.strides = dict(STRIDES)
        self.channels = {name: _out_channels(self.get_submodule(name)) for name in STRIDES}


class C4Head(nn.Sequential):
    """A ResNet's layer4 as RoI head: (n, C, h, w) -> (n, out_channels, h / 2, w / 2). Keys: `0.conv1.weight`, …."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__(*layer4.children())
        self.out_channels = _out_channels(self)


def build_resnet(
    arch: str,
    *,
    norm_layer: NormLayer | None = nn.BatchNorm2d,
    weights: str | None = None,
    out: Sequence[str] = ("layer2", "layer3", "layer4"),
) -> Backbone:
    """Any ResNet, ResNeXt or wide ResNet of torchvision, without the stages after the last one in `out`.

        backbone = detbb.build_resnet("resnet50", weights="imagenet", out=("layer3", "layer4"))

    norm_layer: channels -> module, for every norm including downsample branches. weights: None (torchvision's
    initialisation), `imagenet` or a file, see `load_backbone_weights`; its coverage table is printed.

    Raises: UserError: `arch`, `out` or `weights` cannot be used.
    """
    if arch not in ARCHS:
        raise unknown_name("backbone.arch", arch, ARCHS)
    # All of it is drawn first, so the initial weights of a stage do not depend on which stages are kept.
    backbone = ResNet(arch, norm_layer=norm_layer).keep(out)
    if weights is not None:
        coverage = load_backbone_weights(backbone, weights)
        if rank() == 0:
            print(printable(coverage.table()))
    return backbone


def build_resnet_c4(
    arch: str, *, norm_layer: NormLayer | None = nn.BatchNorm2d, weights: str | None = None
) -> tuple[Backbone, C4Head]:
    """(the backbone up to layer3, layer4 as the RoI head), both with `weights`.

        backbone, head = detbb.build_resnet_c4("resnet50", norm_layer=FrozenBatchNorm2d)

    Arguments are those of `build_resnet`.
    """
    whole = build_resnet(arch, norm_layer=norm_layer, weights=weights, out=("layer3", "layer4"))
    head = C4Head(whole.get_submodule("layer4"))
    return whole.keep(("layer3",)), head


def _out_channels(stage: nn.Module) -> int:
    last = list(stage.children())[-1]
    assert isinstance(last, BasicBlock | Bottleneck)
    return (last.conv3 if isinstance(last, Bottleneck) else last.conv2).out_channels
