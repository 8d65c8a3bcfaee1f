"""What a backbone is: named stages that run one after the other, from the image to ever coarser features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from torch import Tensor, nn

from detbb.core.errors import UserError, unknown_name


class Backbone(nn.Module):
    """A network whose stages can be frozen, cached and read by name.

        class TinyBackbone(detbb.Backbone): ...  # examples/tiny_backbone.py

    A subclass is called as `Class(arch, norm_layer=…)` and builds every stage with random weights; `keep` then drops
    what no head reads. It sets `stages`, and `channels` and `strides` of each stage that heads may read. A stage is the
    submodule of its name, or the submodules that `aliases` lists for it, run in order; `forward` is no more than that.
    """

    stages: tuple[str, ...]  # in running order; the first is `stem`
    channels: dict[str, int]  # of each output, finest first
    strides: dict[str, int]  # input pixels per cell of each output; FPN level p3 is the output of stride 8, and so on
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # stage -> submodules: what `freeze: [backbone.stem]` means
    takes_norm: ClassVar[bool] = True  # False: it has norms of its own, and `backbone.norm` must be null

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch

    @property
    def out(self) -> tuple[str, ...]:
        """The stages that `forward` returns, finest first."""
        return tuple(self.strides)

    def keep(self, out: Sequence[str]) -> Self:
        """This backbone with the outputs `out` alone, and without the stages after the last of them."""
        for name in out:
            if name not in self.strides:
                raise unknown_name("backbone out", name, self.strides)
        if not out:
            raise UserError(f"backbone out: nothing is named; valid are {', '.join(self.strides)}")
        count = max(map(self.stages.index, out)) + 1
        for name in (n for stage in self.stages[count:] for n in self.aliases.get(stage, (stage,))):
            delattr(self, name)
        self.stages = self.stages[:count]
        vars(self)["aliases"] = {stage: names for stage, names in self.aliases.items() if stage in self.stages}
        self.strides = {name: stride for name, stride in self.strides.items() if name in out}
        self.channels = {name: self.channels[name] for name in self.strides}
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """{stage: (B, channels, H / stride, W / stride)} of x: (B, 3, H, W), RGB less ImageNet's mean, over its std."""
        return self.forward_from("", {"": x})

    def forward_from(self, after: str, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `forward`, from the outputs of the stages up to `after` (empty: from the input)."""
        x, features = known[after], {name: known[name] for name in self.out if name in known}
        for stage in self.stages[self.stages.index(after) + 1 if after else 0 :]:
            for module in self.stage_modules(stage):
                x = module(x)
            if stage in self.out:
                features[stage] = x
        return features

    def stage_modules(self, stage: str) -> list[nn.Module]:
        """What runs as one of `stages`, in order."""
        return [self.get_submodule(name) for name in self.aliases.get(stage, (stage,))]
