"""Branches: `HEADS` names every one that comes with detbb; `find_head` also finds those outside."""

from __future__ import annotations

from detbb.config.schema import HeadConfig
from detbb.core.doors import lookup, subclass_of
from detbb.heads.base import Head, HeadSpec
from detbb.heads.classify import ClassifyHead
from detbb.heads.faster_rcnn import FasterRcnnHead
from detbb.heads.faster_rcnn_c4 import FasterRcnnC4Head
from detbb.heads.fcos import FcosHead
from detbb.heads.keypoint_rcnn import KeypointRcnnHead
from detbb.heads.mask_rcnn import MaskRcnnHead
from detbb.heads.retinanet import RetinaNetHead
from detbb.heads.semantic import SemanticHead
from detbb.metrics.evaluators import Evaluator
from detbb.structures.predictions import Predictions

__all__ = ["HEADS", "Evaluator", "Head", "HeadConfig", "HeadSpec", "Predictions", "find_head"]

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


def find_head(type_name: str, *, may_import: bool = True) -> type[Head]:
    """The class of a head: a name in `HEADS`, or `package.module:Class`.

    may_import: False for a name from a file that may be anybody's. Raises: UserError: there is none.
    """
    what = "subclass of detbb.Head"
    return lookup(HEADS, type_name, key="head type", check=subclass_of(Head), what=what, may_import=may_import)
