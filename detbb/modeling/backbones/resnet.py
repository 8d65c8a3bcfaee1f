"""ResNet, ResNeXt and wide ResNet backbones: torchvision's blocks, torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detbb.core.errors import UserError, unknown_name
from detbb.distributed.collectives import rank
from detbb.modeling.weights import load_backbone_weights

ARCHS = tuple(
    name
    for name in torchvision.models.list_models(torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
)
STEM = ("conv1", "bn1", "relu", "maxpool")
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}


class Backbone(nn.Module):
    """A ResNet up to the last stage that is used; its state-dict keys are torchvision's own.

    arch: torchvision's name. out: the stages that `forward` returns, finest first. channels, strides: of each of them.
    stages: what runs, in order; `stem` is conv1, bn1, relu and maxpool, the others are submodules. aliases: names for
    several submodules, as `freeze` takes them.
    """

    aliases: ClassVar = {"stem": ("conv1", "bn1")}

    def __init__(self, resnet: nn.Module, arch: str, out: Sequence[str]) -> None:
        super().__init__()
        for name in out:
            if name not in STRIDES:
                raise unknown_name("backbone out", name, STRIDES)
        if not out:
            raise UserError(f"backbone out: nothing is named; valid are {', '.join(STRIDES)}")
        self.arch = arch
        self.out = tuple(name for name in STRIDES if name in out)
        layers = tuple(STRIDES)[: tuple(STRIDES).index(self.out[-1]) + 1]
        self.stages = ("stem", *layers)
        for name in (*STEM, *layers):
            self.add_module(name, resnet.get_submodule(name))
        self.channels = {name: _out_channels(self.get_submodule(name)) for name in self.out}
        self.strides = {name: STRIDES[name] for name in self.out}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """{stage: (B, channels, H / stride, W / stride)} of x: (B, 3, H, W), RGB less ImageNet's mean, over its std."""
        return self.forward_from("", {"": x})

    def forward_from(self, after: str, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `forward`, from the outputs of the stages up to `after` (empty: from the input)."""
        x, features = known[after], {name: known[name] for name in self.out if name in known}
        for stage in self.stages[self.stages.index(after) + 1 if after else 0 :]:
            x = self.run_stage(stage, x)
            if stage in self.out:
                features[stage] = x
        return features

    def run_stage(self, stage: str, x: Tensor) -> Tensor:
        """The output of one of `stages`, given that of the stage before."""
        for module in self.stage_modules(stage):
            x = module(x)
        return x

    def stage_modules(self, stage: str) -> list[nn.Module]:
        """What runs as one of `stages`, in order."""
        names = STEM if stage == "stem" else (stage,)
        return [self.get_submodule(name) for name in names]


class C4Head(nn.Sequential):
    """A ResNet's layer4 as RoI head: (n, C, h, w) -> (n, out_channels, h / 2, w / 2). Keys: `0.conv1.weight`, …."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__(*layer4.children())
        self.out_channels = _out_channels(self)


def build_resnet(
    arch: str,
    *,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
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
    # All of it is drawn, so the initial weights of a stage do not depend on which stages are kept.
    resnet = torchvision.models.get_model(arch, weights=None, norm_layer=norm_layer)
    backbone = Backbone(resnet, arch, out)
    if weights is not None:
        coverage = load_backbone_weights(backbone, weights)
        if rank() == 0:
            print(coverage.table())
    return backbone


def build_resnet_c4(
    arch: str, *, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d, weights: str | None = None
) -> tuple[Backbone, C4Head]:
    """(the backbone up to layer3, layer4 as the RoI head), both with `weights`.

        backbone, head = detbb.build_resnet_c4("resnet50", norm_layer=FrozenBatchNorm2d)

    Arguments are those of `build_resnet`.
    """
    whole = build_resnet(arch, norm_layer=norm_layer, weights=weights, out=("layer4",))
    return Backbone(whole, arch, ("layer3",)), C4Head(whole.get_submodule("layer4"))


def _out_channels(stage: nn.Module) -> int:
    last = list(stage.children())[-1]
    assert isinstance(last, BasicBlock | Bottleneck)
    return (last.conv3 if isinstance(last, Bottleneck) else last.conv2).out_channels
