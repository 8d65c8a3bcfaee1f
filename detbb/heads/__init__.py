"""Branches: `HEADS` names every one that comes with detbb; `find_head` also finds those outside."""

from __future__ import annotations

from detbb.config.schema import HeadConfig
from detbb.core.doors import lookup, refuse_import
from detbb.heads.base import Evaluator, Head, HeadSpec
from detbb.heads.classify import ClassifyHead
from detbb.heads.faster_rcnn import FasterRcnnHead
from detbb.heads.faster_rcnn_c4 import FasterRcnnC4Head
from detbb.heads.fcos import FcosHead
from detbb.heads.keypoint_rcnn import KeypointRcnnHead
from detbb.heads.mask_rcnn import MaskRcnnHead
from detbb.heads.retinanet import RetinaNetHead
from detbb.heads.semantic import SemanticHead
from detbb.structures.predictions import Predictions

__all__ = ["HEADS", "Evaluator", "Head", "HeadConfig", "HeadSpec", "Predictions", "find_head", "known_head"]

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
    return lookup(HEADS, type_name, key="head type", check=_is_head, what="subclass of detbb.Head")


def known_head(type_name: str) -> type[Head]:
    """`find_head` for what a file names that may be anybody's: imports nothing."""
    refuse_import(type_name, key="head type")
    return find_head(type_name)


def _is_head(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Head)
