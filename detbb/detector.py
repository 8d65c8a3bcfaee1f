"""The detector: one backbone, one neck, and named branches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.data.formats import read_split
from detbb.freeze import Freezable, NormRule, freeze, rest_all, trained_names
from detbb.heads import find_head
from detbb.heads.base import Head, HeadSpec
from detbb.modeling.backbones import Backbone, build_backbone
from detbb.modeling.neck import build_neck, stages_needed
from detbb.modeling.weights import PIXEL_MEAN, PIXEL_STD
from detbb.structures.batch import Batch, ImageSize, PrecomputedFeatures
from detbb.structures.class_list import ClassList
from detbb.structures.predictions import Predictions


class Detector(Freezable):
    """Backbone, neck and heads; knows what is frozen.

    State-dict keys: `backbone.<its own name>` (a ResNet's are torchvision's), `neck.…`, `heads.<name>.…`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, backbone: Backbone, neck: nn.Module, heads: dict[str, Head]) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.heads = nn.ModuleDict(heads)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self.classes: dict[str, ClassList] = {}
        self.sources: dict[str, str] = {}  # head -> the data it learns from
        self.loss_weights: dict[str, float] = {}
        # `forward_from`, compiled; used in training steps only
        self.compiled: Callable[[PrecomputedFeatures], dict[str, Tensor]] | None = None

    def head(self, name: str) -> Head:
        return cast(Head, self.heads[name])

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names given to `freeze`."""
        return self._freezing.names

    def freeze(self, names: Sequence[str]) -> Self:
        """As `detbb.freeze(detector, names)`: exactly these submodules are frozen."""
        return freeze(self, names)

    def normalize(self, images: Tensor, sizes: Sequence[ImageSize]) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> the network's input, with padding at exactly 0 (as in torchvision)."""
        x = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        for image, size in zip(x, sizes, strict=True):
            height, width = size.hw
            image[:, height:] = 0
            image[:, :, width:] = 0
        return x.contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor, sizes: Sequence[ImageSize]) -> dict[str, Tensor]:
        """Every level that backbone and neck offer, from uint8 images."""
        return self.forward_from(PrecomputedFeatures("", {"": self.normalize(images, sizes)}))

    def forward_from(self, given: PrecomputedFeatures) -> dict[str, Tensor]:
        """The levels that the heads read, from what is computed already (`after` empty: only the normalized images)."""
        if given.after == "neck":
            return given.levels
        return self.neck(self.backbone.forward_from(given.after, given.levels))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of every branch that learns from this batch, as `<head>/<loss>`; all are to be summed."""
        names = self.active_heads(batch.source)
        given = batch.precomputed or PrecomputedFeatures("", {"": self.normalize(batch.images, batch.sizes)})
        features = (self.compiled if self.compiled is not None and self.training else self.forward_from)(given)
        losses: dict[str, Tensor] = {}
        for name in names:
            head = self.head(name)
            for loss, value in head.loss(head(features, batch.sizes), batch).items():
                losses[f"{name}/{loss}"] = value * self.loss_weights.get(name, 1.0)
        return losses

    def active_heads(self, source: str | None = None, *, frozen: Sequence[str] | None = None) -> list[str]:
        """The heads that learn from `source` (None: from any) and whose loss reaches something that is trained.

        frozen: None for what is frozen now, or names that would be.
        """
        trained = trained_names(self, frozen)
        shared = any(name.startswith(("backbone.", "neck.")) for name in trained)
        return [
            name
            for name in self.heads
            if name in self.sources  # an inherited head has none
            and source in (None, self.sources[name])
            and (shared or any(n.startswith(f"heads.{name}.") for n in trained))
        ]

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: list[ImageSize], *, heads: Sequence[str] | None = None
    ) -> dict[str, list[Predictions]]:
        """What each branch says about each image, in pixels of the resized image, from one backbone pass.

        images: (B, 3, H, W) uint8 RGB padded; sizes: one an image.
        """
        features = self.features(images, sizes)
        chosen = list(self.heads) if heads is None else list(heads)
        return {name: self.head(name).decode(self.head(name)(features, sizes), sizes) for name in chosen}


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def view(module: AnyModule, replaced: Mapping[str, Tensor] = {}) -> AnyModule:
    """A module of its own in eval mode that shares every tensor with `module` but the replaced ones.

    Costs no tensor memory. Evaluating it leaves the live module's mode, gradients and statistics alone.
    """
    # deepcopy looks an object up in `memo` by id before it copies it: with all tensors listed, only modules are copied.
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        tensor = replaced.get(name, parameter.detach()).to(parameter.device, parameter.dtype)
        memo[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
    for name, buffer in module.named_buffers():
        memo[id(buffer)] = replaced[name].to(buffer.device, buffer.dtype) if name in replaced else buffer
    return rest_all(copy.deepcopy(module, memo))


def build_detector(config: Config, classes: Mapping[str, Any] | None = None) -> Detector:
    """A detector with fresh weights in train mode, frozen as the first phase says.

        detector = detbb.build_detector(config, {"objects": ["cat", "dog"]})

    classes: head name -> ClassList, its dict form, or plain class names; None reads them from the training data.

    Raises: UserError: a head asks for levels that backbone and neck do not offer; the data cannot be read.
    """
    if classes is None:
        classes = read_classes(config)
    backbone = build_backbone(config.backbone)
    levels: dict[str, None] = {}  # in order, each once
    stages: set[str] = set()
    for name, head in config.heads.items():
        own = find_head(head.type).levels(head)
        stages.update(stages_needed(own, config.neck.type, backbone.strides, where=f"heads.{name}.levels"))
        levels |= dict.fromkeys(own)
    backbone.keep([stage for stage in backbone.out if stage in stages])
    neck = build_neck(config.neck, backbone.channels, backbone.strides, tuple(levels))
    heads: dict[str, Head] = {}
    lists = {name: ClassList.of(classes[name]) for name in config.heads}
    for name, head_config in config.heads.items():
        names, keypoints = lists[name].names, lists[name].keypoints
        spec = HeadSpec(name, names, neck.channels, neck.strides, config.backbone, keypoints)
        heads[name] = find_head(head_config.type)(head_config, spec)
    detector = Detector(backbone, neck, heads)
    detector.classes = lists
    detector.sources = {name: head.data for name, head in config.own_heads.items()}
    detector.loss_weights = {n: h.loss_weight for n, h in config.heads.items()}
    detector.to(memory_format=torch.channels_last)
    if config.train.precision == "fp64":
        detector.double()
    first = config.phases[0].freeze if config.phases else config.freeze
    inherited = [f"heads.{name}" for name in config.inherited_heads]
    return freeze(detector, [*first, *inherited], norm_rules=_norm_rules(config, detector))


def read_classes(config: Config) -> dict[str, ClassList]:
    """The classes of every head, from the training split of its data."""
    found = {}
    for name, head in config.heads.items():
        annotations = read_split(config.data[head.data], "train", head.data)
        if annotations is None:
            raise UserError(f"data.{head.data}.train: no training split to read the classes of heads.{name} from")
        found[name] = ClassList.of_data(annotations)
    return found


def _norm_rules(config: Config, detector: Detector) -> tuple[NormRule, ...]:
    backbone = config.backbone
    rules = [NormRule(n, p.norm_eval, not p.norm_affine) for n, p in (("backbone", backbone), ("neck", config.neck))]
    for name, head_config in config.heads.items():
        fixed_statistics = bool(getattr(head_config, "norm_eval", False))
        rules.append(NormRule(f"heads.{name}", fixed_statistics, not getattr(head_config, "norm_affine", True)))
        for part in getattr(detector.heads[name], "backbone_parts", ()):  # a C4 head's layer4 follows the backbone
            rules.append(NormRule(f"heads.{name}.{part}", backbone.norm_eval, not backbone.norm_affine))
    return tuple(rules)
