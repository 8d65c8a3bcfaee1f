"""Backbones: `BACKBONES` names every one that comes with detbb; `find_backbone` also finds those outside."""

from __future__ import annotations

from collections.abc import Mapping

from detbb.config.schema import BackboneConfig
from detbb.core.doors import lookup, subclass_of
from detbb.core.errors import UserError
from detbb.modeling.backbones.base import Backbone
from detbb.modeling.backbones.resnet import ARCHS, ResNet
from detbb.modeling.norm import NORM_TYPES, norm_layer

BACKBONES: dict[str, type[Backbone]] = dict.fromkeys(ARCHS, ResNet)


def find_backbone(arch: str, *, may_import: bool = True) -> type[Backbone]:
    """The class of a backbone: a name in `BACKBONES`, or `package.module:Class`.

    may_import: False for a name from a file that may be anybody's. Raises: UserError: there is none.
    """
    check, what = subclass_of(Backbone), "subclass of detbb.Backbone"
    return lookup(BACKBONES, arch, key="backbone.arch", check=check, what=what, may_import=may_import)


def known_aliases(arch: str) -> Mapping[str, tuple[str, ...]]:
    """The `aliases` of a backbone that a file names; none where its module is not imported."""
    try:
        return find_backbone(arch, may_import=False).aliases
    except UserError:
        return {}


def build_backbone(config: BackboneConfig) -> Backbone:
    """All stages of the configured backbone with random weights. Raises: UserError: `arch` or `norm` cannot be used."""
    backbone = find_backbone(config.arch)
    for name in ("forward", "forward_from"):  # a frozen prefix runs the stages alone
        if getattr(backbone, name) is not getattr(Backbone, name):
            raise UserError(f"backbone.arch: {config.arch!r} has a {name} of its own; valid: stages that run in order")
    if config.norm is None and backbone.takes_norm:
        valid = ", ".join(NORM_TYPES)
        raise UserError(f"backbone.norm: null, but {config.arch} has no norm of its own; valid: {valid}")
    if config.norm is not None and not backbone.takes_norm:
        raise UserError(f"backbone.norm: {config.norm!r}, but {config.arch} has norms of its own; valid is null")
    return backbone(config.arch, norm_layer=norm_layer(config.norm))  # type: ignore[call-arg]
