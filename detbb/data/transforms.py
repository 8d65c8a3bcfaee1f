"""Resizing and augmentation of one image with everything that is marked on it."""

from __future__ import annotations

import copy
import inspect
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from detbb.config.schema import DataConfig
from detbb.core.errors import UserError, one_line, unknown_name
from detbb.data.formats.semantic import IGNORE
from detbb.data.sampler import hash_seed
from detbb.structures.annotations import Segments

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else importing it asks the network for a newer version
import albumentations as A

_KEEP_SIZE = (
    *("HorizontalFlip", "VerticalFlip", "CoarseDropout", "GridDropout", "XYMasking", "Rotate", "SafeRotate", "Affine"),
    *("ShiftScaleRotate", "Perspective", "ElasticTransform", "GridDistortion", "OpticalDistortion"),
)
MIN_SIDE = 0.1  # pixels; what augmentation leaves of a box must not be thinner


@dataclass
class Sample:
    """One image and what is marked on it, in its pixels; n objects."""

    image: np.ndarray  # (h, w, 3) uint8
    boxes: np.ndarray  # (n, 4) float64 xyxy
    objects: np.ndarray  # (n,) int64: which objects of the untransformed image these are
    masks: np.ndarray | None = None  # (n, h, w) uint8
    keypoints: np.ndarray | None = None  # (n, K, 3) float32 x, y, visibility
    semantic: np.ndarray | None = None  # (h, w) uint8


class Transform:
    """`size` says what an image is resized to, calling it augments the resized sample; both follow from the seed alone.

    Resizing follows Detectron2: the short side becomes `image_size[0]`, unless the long side would exceed
    `image_size[1]`. In training, `augment: default` draws the short side from 0.8 … 1 of that, and mirrors half of all
    images.
    """

    def __init__(
        self, config: DataConfig, *, train: bool, flip_pairs: Sequence[tuple[int, int]] = (), semantic: bool = False
    ) -> None:
        self._short, self._long = config.image_size
        self.draws_size = train and config.augment == "default"
        self._flip_pairs = list(flip_pairs)
        self._compose: A.Compose | None = None
        self.changes_size = False  # whether the augmentation might, after resizing
        self.flips: str | None = ""  # the flips it consists of (h, v); None: there is something else
        specs = config.augment if train else "none"
        if isinstance(specs, str):
            specs = [{"type": "HorizontalFlip", "p": 0.5}] if specs == "default" else []
        if specs:
            transforms = [_build(spec, f"augment[{i}]", semantic=semantic) for i, spec in enumerate(specs)]
            self._compose = _composed(transforms)
            self._try_out(transforms)
            kinds = {"HorizontalFlip": "h", "VerticalFlip": "v"}
            named = sorted({kinds.get(type(t).__name__, "?") for t in transforms})
            self.flips = None if "?" in named else "".join(named)
            self.changes_size = not all(_keeps_size(t) for _, t in _leaves(transforms, ""))

    @property
    def only_flips(self) -> bool:
        """Whether all that training does with images is to flip them, or nothing."""
        return self.flips is not None and not self.draws_size

    def size(self, hw: tuple[int, int], seed: int | None = None) -> tuple[int, int]:
        """(height, width) that an image of `hw` is resized to; without a seed, the largest that may be drawn."""
        short = float(self._short)
        if self.draws_size and seed is not None:
            short = round(short * np.random.default_rng(seed).uniform(0.8, 1.0))
        scale = min(short / min(hw), self._long / max(hw))
        return max(int(hw[0] * scale + 0.5), 1), max(int(hw[1] * scale + 0.5), 1)

    def __call__(self, sample: Sample, seed: int) -> Sample:
        if self._compose is None:
            return _without_slivers(sample)
        # one stream for all transforms: set_random_seed() would give each the same stream, so that their draws coincide
        stream = hash_seed(seed, 1)
        self._compose.set_random_state(np.random.default_rng(stream), random.Random(stream))
        return _without_slivers(_apply(self._compose, sample, self._flip_pairs))

    def flipped(self, seed: int) -> int:
        """How a call with this seed flips, where it does nothing else: 1 left to right, 2 upside down, 3 both."""
        corners = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) // 3
        return int(self(Sample(corners, np.zeros((0, 4)), np.zeros(0, np.int64)), seed).image[0, 0, 0])

    def _try_out(self, transforms: list[Any]) -> None:
        """Run every transform once, so that what cannot work fails now."""
        h, w = self._short, self._long
        boxes = np.array([[0.2 * w, 0.2 * h, 0.8 * w, 0.8 * h]])
        points = np.array([[[0.5 * w, 0.5 * h, 2.0]]], dtype=np.float32)
        masks = np.ones((1, h, w), dtype=np.uint8)
        sample = Sample(np.full((h, w, 3), 128, np.uint8), boxes, np.zeros(1, np.int64), masks, points, masks[0])
        for position, leaf in _leaves(transforms, "augment"):
            certain = copy.deepcopy(leaf)
            certain.p = 1.0
            try:
                result = _apply(_composed([certain]), sample, [])
            except Exception as e:  # a transform may raise anything
                raise UserError(f"{position}: {type(leaf).__name__} cannot be used: {one_line(e)}") from None
            if result.image.dtype != np.uint8 or result.image.shape[2:] != (3,):
                raise UserError(
                    f"{position}: {type(leaf).__name__} does not give a uint8 RGB image; the network normalises"
                )


def resize(sample: Sample, hw: tuple[int, int], original_hw: tuple[int, int] | None = None) -> Sample:
    """The sample at size `hw`, but for instance masks, which are drawn there (`rasterize`).

    original_hw: what boxes, keypoints and labels of pixels refer to, where the image itself is resized already.
    """
    old_h, old_w = original_hw or sample.image.shape[:2]
    scale = np.array([hw[1] / old_w, hw[0] / old_h])
    keypoints, semantic = sample.keypoints, sample.semantic
    if keypoints is not None:
        keypoints = keypoints * np.array([*scale, 1], dtype=np.float32)
    image = sample.image
    if image.shape[:2] != hw:
        shrinks = hw[0] * hw[1] < old_h * old_w
        image = cv2.resize(image, hw[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if semantic is not None and (old_h, old_w) != hw:
        semantic = cv2.resize(semantic, hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return replace(sample, image=image, boxes=sample.boxes * np.tile(scale, 2), keypoints=keypoints, semantic=semantic)


def rasterize(segments: Segments, rows: np.ndarray, original_hw: tuple[int, int], hw: tuple[int, int]) -> np.ndarray:
    """(len(rows), *hw) uint8 masks: polygons are scaled and then filled as COCO does, run-length codes resized."""
    masks = np.zeros((len(rows), *hw), dtype=np.uint8)
    scale = np.array([hw[1] / original_hw[1], hw[0] / original_hw[0]])
    for mask, row in zip(masks, rows.tolist(), strict=True):
        if (code := segments.rle(row)) is not None:
            decoded = coco_mask.decode({"size": list(code[:2]), "counts": code[2]})
            mask[:] = cv2.resize(decoded, hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        elif polygons := segments.polygons(row):
            codes = coco_mask.frPyObjects([(p * scale).ravel().tolist() for p in polygons], *hw)
            mask[:] = coco_mask.decode(coco_mask.merge(codes))
    return masks


def _keeps_size(transform: Any) -> bool:
    if isinstance(transform, A.ImageOnlyTransform):
        return True
    options = ("crop_border", "fit_output") if not isinstance(transform, A.SafeRotate) else ()  # it shrinks to fit
    changes = any(getattr(transform, key, False) for key in options) or not getattr(transform, "keep_size", True)
    return type(transform).__name__ in _KEEP_SIZE and not changes


def _composed(transforms: list[Any]) -> A.Compose:
    with warnings.catch_warnings():  # that a list which moves nothing needs no boxes
        warnings.simplefilter("ignore")
        return A.Compose(
            transforms,
            bbox_params=A.BboxParams("pascal_voc", label_fields=["row"], clip=True, filter_invalid_bboxes=True),
            keypoint_params=A.KeypointParams("xy", label_fields=["point"], remove_invisible=False),
        )


def _apply(compose: A.Compose, sample: Sample, flip_pairs: list[tuple[int, int]]) -> Sample:
    """albumentations on the whole sample. Three more points tell whether the image was mirrored."""
    h, w = sample.image.shape[:2]
    count = len(sample.boxes)
    points = np.array([[w / 4, h / 4], [3 * w / 4, h / 4], [w / 4, 3 * h / 4]])
    if sample.keypoints is not None:
        points = np.concatenate([points, sample.keypoints[..., :2].reshape(-1, 2)])
    data = {
        "image": sample.image,
        "bboxes": sample.boxes,
        "row": np.arange(count),
        "keypoints": points - 0.5,  # there, 0 is the centre of the first pixel; in boxes, its left edge
        "point": np.arange(len(points)),
    }
    if sample.masks is not None and count:
        data["masks"] = sample.masks
    if sample.semantic is not None:
        data["mask"] = sample.semantic
    out = compose(**data)
    rows = np.asarray(out["row"], dtype=np.int64).reshape(-1)
    image = np.ascontiguousarray(out["image"])
    masks, keypoints = sample.masks, sample.keypoints
    if masks is not None:
        masks = np.stack(list(out["masks"]))[rows] if count else np.zeros((0, *image.shape[:2]), dtype=np.uint8)
    if keypoints is not None:
        keypoints = _moved(keypoints, out, image.shape[:2], flip_pairs)[rows]
    boxes = np.asarray(out["bboxes"], dtype=np.float64).reshape(-1, 4)
    return Sample(image, boxes, sample.objects[rows], masks, keypoints, out.get("mask"))


def _moved(
    keypoints: np.ndarray, out: dict[str, Any], hw: tuple[int, int], flip_pairs: list[tuple[int, int]]
) -> np.ndarray:
    """(n, K, 3) keypoints where albumentations put them; those outside the image become absent."""
    moved = np.full((3 + keypoints.shape[0] * keypoints.shape[1], 2), np.nan)
    moved[np.asarray(out["point"], dtype=np.int64)] = (
        np.asarray(out["keypoints"], dtype=np.float64).reshape(-1, 2) + 0.5
    )
    across, down = moved[1] - moved[0], moved[2] - moved[0]
    xy = moved[3:].reshape(*keypoints.shape[:2], 2)
    seen = keypoints[..., 2] * ((xy >= 0) & (xy <= hw[::-1])).all(axis=2)
    result = np.concatenate([np.nan_to_num(xy), seen[..., None]], axis=2).astype(np.float32)
    if across[0] * down[1] - across[1] * down[0] < 0:  # left and right changed places
        for a, b in flip_pairs:
            result[:, [a, b]] = result[:, [b, a]]
    return result


def _without_slivers(sample: Sample) -> Sample:
    """Boxes clipped to the image; objects left out of whose box nothing remains."""
    h, w = sample.image.shape[:2]
    boxes = sample.boxes.clip(0, [w, h, w, h])
    keep = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
    return replace(
        sample,
        boxes=boxes[keep],
        objects=sample.objects[keep],
        masks=None if sample.masks is None else sample.masks[keep],
        keypoints=None if sample.keypoints is None else sample.keypoints[keep],
    )


def _build(spec: Any, position: str, *, semantic: bool) -> Any:
    """The albumentations transform that one entry of `augment` describes; entries below `transforms` likewise."""
    arguments = dict(spec) if hasattr(spec, "keys") else {}
    name = arguments.pop("type", None)
    if not isinstance(name, str):
        raise UserError(f"{position}: {spec!r} is not {{type: Name, …arguments}}")
    known = {
        n: c for n, c in vars(A).items() if inspect.isclass(c) and issubclass(c, (A.BasicTransform, A.BaseCompose))
    }
    if name not in known:
        raise unknown_name(position, name, sorted(known))
    valid = list(inspect.signature(known[name].__init__).parameters)[1:]
    for key in arguments:
        if key not in valid:
            raise unknown_name(f"{position} ({name})", str(key), valid)
    if "transforms" in arguments:
        inner = enumerate(arguments["transforms"])
        arguments["transforms"] = [_build(s, f"{position}.transforms[{i}]", semantic=semantic) for i, s in inner]
    if semantic and "fill_mask" in valid and "Dropout" not in name:
        arguments.setdefault("fill_mask", IGNORE)
    try:
        return known[name](**arguments)
    except Exception as e:  # argument checks of albumentations
        raise UserError(f"{position} ({name}): {one_line(e)}") from None


def _leaves(transforms: Sequence[Any], position: str) -> Iterator[tuple[str, Any]]:
    for i, t in enumerate(transforms):
        if isinstance(t, A.BaseCompose):
            yield from _leaves(t.transforms, f"{position}[{i}].transforms")
        else:
            yield f"{position}[{i}]", t
