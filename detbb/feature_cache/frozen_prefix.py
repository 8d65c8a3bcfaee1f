"""The frozen beginning of the network: computed without gradients, on copies that fold each norm into its convolution.

Only training steps use it. Evaluation, prediction and export compute with the modules themselves whatever is frozen, so
a branch's results keep their bytes when other branches are added. The copies live outside the detector: no state-dict
key, no average, no DDP bucket, no digest knows of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from detbb.config.schema import TrainConfig
from detbb.core.errors import one_line
from detbb.detector import Detector
from detbb.freeze import averaged_names, tensors_of
from detbb.modeling.norm import FrozenBatchNorm2d, SyncBatchNorm
from detbb.modeling.precision import AUTOCAST
from detbb.structures.batch import Batch, ImageSize, PrecomputedFeatures

# Exact types, since a subclass may compute something else: modules that run a norm right after the convolution before
# it among their children, and norms that can be folded.
_IN_ORDER = (nn.Sequential, Conv2dNormActivation, BasicBlock, Bottleneck)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)


def last_frozen(detector: Detector, names: Sequence[str] | None = None) -> str | None:
    """The part up to which everything is frozen: `stem`, `layer1` … `layer4`, `neck`, or None if the stem is not.

    In a frozen part nothing is trained and no statistics move. names: as `freeze` takes them; None: those of now.
    """
    moving, last = set(averaged_names(detector, names)), None
    for stage in detector.backbone.stages:
        if moving & tensors_of(detector, f"backbone.{stage}"):
            return last
        last = stage
    return last if moving & tensors_of(detector, "neck") else "neck"


class FrozenPrefix:
    """Gives batches what the frozen parts up to `after` make of their images.

    Make it anew whenever the detector's weights or what is frozen change. With `fold_frozen: auto`, relative
    differences to the modules themselves stay below 1e-4 in fp32 (rounding alone). The folded copies are made when a
    batch first needs them.
    """

    def __init__(self, detector: Detector, config: TrainConfig, *, log: Callable[[str], None] = print) -> None:
        """Raises ValueError if not even the stem is frozen."""
        after = last_frozen(detector)
        if after is None:
            raise ValueError("nothing is frozen from the stem on")
        self.after = after
        self._detector = detector
        self._autocast = AUTOCAST.get(config.precision)
        self._config = config
        self._stages: dict[str, nn.Module] = {}
        self._neck: nn.Module | None = None
        self._run = compiled(self._levels, "the frozen prefix", log) if config.compile else self._levels

    def __call__(self, batch: Batch) -> Batch:
        return replace(batch, precomputed=PrecomputedFeatures(self.after, self.levels(batch.images, batch.sizes)))

    @torch.no_grad()
    def levels(self, images: Tensor, sizes: list[ImageSize]) -> dict[str, Tensor]:
        """The outputs that later parts may read, by stage or level name, from (B, 3, H, W) uint8 images."""
        if not self._stages:
            self._make()
        with torch.autocast(images.device.type, self._autocast, self._autocast is not None):
            return self._run(self._detector.normalize(images, sizes))

    def release(self) -> None:
        """Let go of the copies until a batch needs them again; not of compiled ones, which take long to make."""
        if not self._config.compile:
            self._stages, self._neck = {}, None

    def _make(self) -> None:
        detector = self._detector
        stages = detector.backbone.stages
        names = stages if self.after == "neck" else stages[: stages.index(self.after) + 1]
        self._stages = {name: nn.Sequential(*detector.backbone.stage_modules(name)) for name in names}
        self._neck = detector.neck if self.after == "neck" else None
        if self._config.fold_frozen == "auto":
            dtype = self._autocast or detector.pixel_mean.dtype
            self._stages = {name: folded(stage, dtype) for name, stage in self._stages.items()}
            self._neck = folded(self._neck, dtype) if self._neck is not None else None

    def _levels(self, x: Tensor) -> dict[str, Tensor]:
        levels = {}
        for name, stage in self._stages.items():
            x = stage(x)
            if name in self._detector.backbone.out or name == self.after:
                levels[name] = x
        return self._neck(levels) if self._neck is not None else levels


def folded(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `part` for computing in eval mode: convolution and norm as one convolution, weights in `dtype`.

    Folds in fp64 each norm with statistics of its own (batch, sync and frozen) that directly follows a convolution in
    a module known to run its children in order; others stay as they are. Shares every tensor that it does not change.
    """
    copied = copy.deepcopy(part, {id(t): t for t in [*part.parameters(), *part.buffers()]}).eval()
    for module in [m for m in copied.modules() if type(m) in _IN_ORDER]:
        for (_, conv), (name, norm) in pairwise([*module.named_children()]):
            if type(conv) is nn.Conv2d and type(norm) in _NORMS and norm.running_mean is not None:
                of_norm = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                wide: list[Any] = [
                    t.double() if isinstance(t, Tensor) else t for t in (conv.weight, conv.bias, *of_norm)
                ]
                conv.weight, conv.bias = fuse_conv_bn_weights(*wide)
                setattr(module, name, nn.Identity())
    for conv in copied.modules():
        if type(conv) is nn.Conv2d:
            weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
            conv.weight = nn.Parameter(weight, requires_grad=False)
            if conv.bias is not None:
                conv.bias = nn.Parameter(conv.bias.detach().to(dtype), requires_grad=False)
    return copied


def compiled(function: Callable[..., Any], name: str, log: Callable[[str], None]) -> Callable[..., Any]:
    """`function` through torch.compile; from the first failure on, itself, after one line that says so."""
    fast = torch.compile(function, fullgraph=True)  # one graph: nothing has run when compiling it fails

    def run(*args: Any) -> Any:
        nonlocal fast
        if fast is not function:
            try:
                with torch._dynamo.config.patch(recompile_limit=64):  # one graph a shape, and padded batches have many
                    return fast(*args)
            except Exception as error:  # what compilers raise is not of one kind
                fast = function
                reason = f"{type(error).__name__}: {one_line(error, 160)}"
                log(f"WARNING: train.compile: {name} runs uncompiled: {reason}")
        return function(*args)

    return run
