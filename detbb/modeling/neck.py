"""Feature pyramid network (arXiv:1612.03144, with P6 and P7 of arXiv:1708.02002), on torchvision's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from detbb.config.schema import NeckConfig
from detbb.core.errors import unknown_name
from detbb.modeling.norm import norm_layer

LAYERS = ("layer1", "layer2", "layer3", "layer4")
LATERAL = {"p2": "layer1", "p3": "layer2", "p4": "layer3", "p5": "layer4"}
COARSE = {"pool": 64, "p6": 64, "p7": 128}  # made from p5; their strides


def layers_needed(levels: Iterable[str], neck_type: Literal["fpn", "none"], *, where: str = "heads") -> tuple[str, ...]:
    """The backbone stages that feature levels come from, finest first.

    Raises: UserError: an unknown level; `where` (`heads.<name>.levels`) says whose.
    """
    needed: set[str] = set()
    for level in levels:
        valid = LAYERS if neck_type == "none" else (*LAYERS, *LATERAL, *COARSE)
        if level not in valid:
            raise unknown_name(f"{where}: feature level with neck.type {neck_type}", level, valid)
        # an FPN level hears from every coarser stage
        needed |= {level} if level in LAYERS else set(LAYERS[LAYERS.index(LATERAL.get(level, "layer4")) :])
    return tuple(layer for layer in LAYERS if layer in needed)


class Fpn(nn.Module):
    """The backbone's stages and the FPN levels that are asked for.

    Computes what torchvision's FeaturePyramidNetwork with LastLevelP6P7 (on p5) or LastLevelMaxPool computes.
    Parameters are named by level (`inner.layer2.0.weight`, `output.p3.0.weight`, `p6.weight`), so a branch that later
    asks for another level renames and reshapes none. Only what the levels need is built.

    channels, strides: of every level in the output, backbone stages too.
    """

    def __init__(
        self,
        channels_in: Mapping[str, int],
        strides: Mapping[str, int],
        *,
        levels: Sequence[str],
        out_channels: int,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        asked = set(levels) - set(LAYERS)
        if asked & COARSE.keys():
            asked.add("p5")
        if "p7" in asked:
            asked.add("p6")
        self.lateral = {p: layer for p, layer in LATERAL.items() if layer in layers_needed(asked, "fpn")}

        def block(channels: int, kernel_size: int) -> nn.Module:
            return Conv2dNormActivation(
                channels, out_channels, kernel_size, norm_layer=norm_layer, activation_layer=None
            )

        self.inner = nn.ModuleDict({layer: block(channels_in[layer], 1) for layer in self.lateral.values()})
        self.output = nn.ModuleDict({p: block(out_channels, 3) for p in LATERAL if p in asked})
        self.pool = "pool" in asked
        self.p6 = nn.Conv2d(out_channels, out_channels, 3, 2, 1) if "p6" in asked else None
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1) if "p7" in asked else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        steps = {**{p: strides[layer] for p, layer in self.lateral.items()}, **COARSE}
        self.strides = {**strides, **{p: step for p, step in steps.items() if p in asked}}
        self.channels = {**channels_in, **{p: out_channels for p in steps if p in asked}}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """{stage: (B, C, H / stride, W / stride)} -> the same and the FPN levels, each with `out_channels`."""
        levels = {}
        top: Tensor | None = None
        for p, layer in reversed(self.lateral.items()):
            inner = self.inner[layer](features[layer])
            top = inner if top is None else inner + F.interpolate(top, size=inner.shape[-2:], mode="nearest")
            if p in self.output:
                levels[p] = self.output[p](top)
        if self.pool:
            levels["pool"] = F.max_pool2d(levels["p5"], kernel_size=1, stride=2)
        if self.p6 is not None:
            levels["p6"] = self.p6(levels["p5"])
        if self.p7 is not None:
            levels["p7"] = self.p7(F.relu(levels["p6"]))
        return {**features, **{name: levels[name] for name in self.channels if name in levels}}


class NoNeck(nn.Module):
    """Hands the backbone's stages through."""

    def __init__(self, channels: Mapping[str, int], strides: Mapping[str, int]) -> None:
        super().__init__()
        self.channels = dict(channels)
        self.strides = dict(strides)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def build_neck(
    config: NeckConfig, backbone_channels: Mapping[str, int], strides: Mapping[str, int], levels: Sequence[str]
) -> Fpn | NoNeck:
    """The neck that offers `levels` (all heads' together), with `.channels` and `.strides` of what it puts out.

    Raises: UserError: an unknown level.
    """
    layers_needed(levels, config.type)
    if config.type == "none":
        return NoNeck(backbone_channels, strides)
    norm = norm_layer(config.norm) if config.norm else None
    return Fpn(backbone_channels, strides, levels=levels, out_channels=config.channels, norm_layer=norm)
