"""Branches: `HEADS` names every one that comes with detbb; `find_head` also finds those outside."""

from __future__ import annotations

import importlib
import sys

from detbb.config.schema import HeadConfig
from detbb.core.errors import UserError, unknown_name
from detbb.heads.base import Head, HeadSpec
from detbb.heads.classify import ClassifyHead
from detbb.heads.faster_rcnn import FasterRcnnHead
from detbb.heads.faster_rcnn_c4 import FasterRcnnC4Head
from detbb.heads.fcos import FcosHead
from detbb.heads.keypoint_rcnn import KeypointRcnnHead
from detbb.heads.mask_rcnn import MaskRcnnHead
from detbb.heads.retinanet import RetinaNetHead
from detbb.heads.semantic import SemanticHead
from detbb.structures.predictions import Predictions

__all__ = ["HEADS", "Head", "HeadConfig", "HeadSpec", "Predictions", "find_head", "known_head"]

HEADS: dict[str, type[Head]] = {
    "classify": ClassifyHead,
    "faster_rcnn": FasterRcnnHead,
    "faster_rcnn_c4": FasterRcnnC4Head,
    "fcos": FcosHead,
    "keypoint_rcnn": KeypointRcnnHead,
    "mask_rcnn": MaskRcnnHead,
    "retinanet": RetinaNetHead,
    "semantic": SemanticHead,
}


def find_head(type_name: str) -> type[Head]:
    """The class of a head: a name in `HEADS`, or `package.module:Class`. Raises UserError if there is none."""
    if type_name in HEADS:
        return HEADS[type_name]
    if ":" not in type_name:
        raise unknown_name("head type", type_name, [*HEADS, "package.module:Class"])
    module_name, _, class_name = type_name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:  # whatever the user's module raises, and what `importlib` says of a relative name
        raise UserError(
            f"head type {type_name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); is it "
            "installed or on PYTHONPATH?"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Head)):
        raise UserError(f"head type {type_name!r}: {class_name!r} of {module_name!r} is no subclass of detbb.Head")
    return found


def known_head(type_name: str) -> type[Head]:
    """`find_head` for what a file names that may be anybody's: imports nothing."""
    module_name, outside, _ = type_name.partition(":")
    if outside and module_name not in sys.modules:
        raise UserError(
            f"head type {type_name!r}: {module_name!r} is not imported, and a file must not choose what code runs; "
            f"if it is yours, add --import {module_name} (in Python: import {module_name})"
        )
    return find_head(type_name)
