"""A backbone of one's own: strided convolutions in five stages, small enough for any device."""

from typing import Any

from torch import nn

from detbb import Backbone


class TinyBackbone(Backbone):
    """A stem of stride 2, then stages of stride 4, 8, 16 and 32."""

    def __init__(self, arch: str, *, norm_layer: Any) -> None:
        super().__init__(arch)
        self.channels = {"stage1": 16, "stage2": 32, "stage3": 64, "stage4": 128}
        self.strides = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
        self.stages = ("stem", *self.channels)
        width = 3
        for stage, channels in {"stem": 8, **self.channels}.items():
            convolution = nn.Conv2d(width, channels, kernel_size=3, stride=2, padding=1, bias=False)
            self.add_module(stage, nn.Sequential(convolution, norm_layer(channels), nn.ReLU(inplace=True)))
            width = channels
