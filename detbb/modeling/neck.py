"""Feature pyramid network (arXiv:1612.03144, with P6 and P7 of arXiv:1708.02002), on torchvision's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from detbb.config.schema import NeckConfig
from detbb.core.errors import unknown_name
from detbb.modeling.norm import NormLayer, norm_layer

FINE = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}  # made from the backbone's stage of this stride
COARSE = {"pool": 64, "p6": 64, "p7": 128}  # made from p5; their strides


def lateral(strides: Mapping[str, int]) -> dict[str, str]:
    """The backbone stage that each of `p2` … `p5` is made from: the last one of its stride, where there is one."""
    by_stride = {stride: stage for stage, stride in strides.items()}
    return {level: by_stride[stride] for level, stride in FINE.items() if stride in by_stride}


def stages_needed(
    levels: Iterable[str], neck_type: Literal["fpn", "none"], strides: Mapping[str, int], *, where: str = "heads"
) -> tuple[str, ...]:
    """The backbone stages that feature levels come from, finest first. strides: of every stage the backbone has.

    Raises: UserError: an unknown level; `where` (`heads.<name>.levels`) says whose.
    """
    made = lateral(strides) if neck_type == "fpn" else {}
    valid = [*strides, *made, *(COARSE if "p5" in made else ())]
    needed: set[str] = set()
    for level in levels:
        if level not in valid:
            raise unknown_name(f"{where}: feature level with neck.type {neck_type}", level, valid)
        # the top-down path brings every coarser stage to an FPN level
        fine = level if level in made else "p5"
        needed |= {level} if level in strides else {stage for p, stage in made.items() if p >= fine}
    return tuple(stage for stage in strides if stage in needed)


class Fpn(nn.Module):
    """The backbone's stages and the FPN levels that are asked for.

    Computes what torchvision's FeaturePyramidNetwork with LastLevelP6P7 (on p5) or LastLevelMaxPool computes.
    Parameters are named by stage or level (`inner.layer2.0.weight`, `output.p3.0.weight`, `p6.weight`), so a branch
    that later asks for another level renames and reshapes none. Only what the levels need is built.

    channels, strides: of every level in the output, backbone stages too.
    """

    def __init__(
        self,
        channels_in: Mapping[str, int],
        strides: Mapping[str, int],
        *,
        levels: Sequence[str],
        out_channels: int,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        asked = set(levels) - set(strides)
        if asked & COARSE.keys():
            asked.add("p5")
        if "p7" in asked:
            asked.add("p6")
        needed = stages_needed(asked, "fpn", strides)
        self.lateral = {p: stage for p, stage in lateral(strides).items() if stage in needed}

        def block(channels: int, kernel_size: int) -> nn.Module:
            options: dict[str, Any] = {"norm_layer": norm_layer, "activation_layer": None}
            return Conv2dNormActivation(channels, out_channels, kernel_size, **options)

        self.inner = nn.ModuleDict({stage: block(channels_in[stage], 1) for stage in self.lateral.values()})
        self.output = nn.ModuleDict({p: block(out_channels, 3) for p in FINE if p in asked})
        self.pool = "pool" in asked
        self.p6 = nn.Conv2d(out_channels, out_channels, 3, 2, 1) if "p6" in asked else None
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1) if "p7" in asked else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        made = {level: stride for level, stride in {**FINE, **COARSE}.items() if level in asked}
        self.strides = {**strides, **made}
        self.channels = {**channels_in, **dict.fromkeys(made, out_channels)}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """{stage: (B, C, H / stride, W / stride)} -> the same and the FPN levels, each with `out_channels`."""
        levels = {}
        top: Tensor | None = None
        for p, stage in reversed(self.lateral.items()):
            inner = self.inner[stage](features[stage])
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


def build_neck(
    config: NeckConfig, backbone_channels: Mapping[str, int], strides: Mapping[str, int], levels: Sequence[str]
) -> Fpn:
    """The neck that offers `levels` (all heads' together); with `type: none` it hands the backbone's stages through.

    Raises: UserError: an unknown level.
    """
    stages_needed(levels, config.type, strides)
    norm = norm_layer(config.norm)
    return Fpn(backbone_channels, strides, levels=levels, out_channels=config.channels, norm_layer=norm)
