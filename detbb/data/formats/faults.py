"""What readers find wrong with annotations: repaired and counted, or refused with the first ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detbb.core.errors import UserError
from detbb.structures.annotations import Fault, Segments

SHOWN = 10
MAX_COORDINATE = 1e9  # pixels; products and float32 of larger ones overflow


class Faults:
    """The faults of one file, in the order found. A reader collects all of them, leaving out what it cannot use.

    strict: `finish` refuses; else the reader goes on with what is left, for the dataset doctor to report and repair.
    skip_bad_images: images that cannot be read are left out and counted (`on_bad_image: skip`). allow_links: files may
    be links out of their folder.
    """

    def __init__(
        self, origin: str | Path, *, strict: bool = True, skip_bad_images: bool = False, allow_links: bool = False
    ) -> None:
        self.origin = origin
        self.strict, self.skip_bad_images, self.allow_links = strict, skip_bad_images, allow_links
        self.found: list[Fault] = []
        self.notes: list[Fault] = []  # nothing to repair, good to know
        self.of_images = False  # whether image files were read, too: then the result is not the annotation file's alone

    def repair(self, kind: str, ids: Iterable[Any]) -> None:
        self._add(kind, ids, repaired=True)

    def refuse(self, kind: str, ids: Iterable[Any]) -> None:
        self._add(kind, ids, repaired=False)

    def note(self, kind: str, ids: Iterable[Any]) -> None:
        self._add(kind, ids, repaired=True, to=self.notes)

    def bad_images(self, kind: str, names: Iterable[str]) -> None:
        """Images that cannot be read: what becomes of them is the user's choice."""
        self._add(f"{kind}{' (left out)' * self.skip_bad_images}:", names, repaired=self.skip_bad_images)

    def _add(self, kind: str, ids: Iterable[Any], *, repaired: bool, to: list[Fault] | None = None) -> None:
        items = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if items:
            (self.found if to is None else to).append(Fault(kind, len(items), tuple(items[:SHOWN]), repaired))

    def finish(self) -> tuple[Fault, ...]:
        """All of them; raises UserError with everything that is refused, where strict."""
        refused = [str(f) for f in self.found if not f.repaired]
        if refused and self.strict:
            raise UserError(f"{self.origin}: {'; '.join(refused)}")
        return tuple(self.found)


@dataclass
class Rows:
    """Objects as a reader found them, in any order."""

    image: np.ndarray  # (M,) int64 index of the image
    label: np.ndarray  # (M,) int64; -1: of a class that is not wanted
    boxes_xywh: np.ndarray  # (M, 4) float64
    area: np.ndarray | None = None  # (M,) float64, NaN where missing; None: of the boxes
    crowd: np.ndarray | None = None  # (M,) bool; None: there are no crowds
    ids: np.ndarray | None = None  # (M,) int64, 0 where missing; None: counted from 1
    segments: Segments | None = None  # (M,)
    keypoints: np.ndarray | None = None  # (M, K, 3) float32


def validate_objects(rows: Rows, sizes: np.ndarray, faults: Faults) -> dict[str, Any]:
    """The object fields of `Annotations`, sorted by image, faulty rows repaired, dropped or noted as refused."""
    boxes = rows.boxes_xywh
    area = boxes[:, 2:].prod(axis=1) if rows.area is None else rows.area
    crowd = np.zeros(len(boxes), dtype=bool) if rows.crowd is None else rows.crowd
    ids = np.arange(1, len(boxes) + 1) if rows.ids is None else rows.ids
    height, width = sizes[rows.image].astype(np.float64).reshape(-1, 2).T
    x, y, w, h = boxes.T
    finite = (np.abs(boxes) <= MAX_COORDINATE).all(axis=1)
    faults.refuse("box that is not finite or beyond 1e9, annotation ids", ids[~finite])
    negative = finite & ((w < 0) | (h < 0))
    faults.refuse("box of negative width or height, annotation ids", ids[negative])
    zero = finite & ~negative & ((w == 0) | (h == 0))
    faults.repair("box of no area (dropped), annotation ids", ids[zero])
    outside = finite & ~negative & ~zero & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    faults.repair("box outside its image (dropped), annotation ids", ids[outside])
    no_area = ~(np.isfinite(area) & (area >= 0))
    faults.repair("missing area (from the box), annotation ids", ids[no_area])
    keep = np.flatnonzero(finite & ~negative & ~zero & ~outside & (rows.label >= 0))
    order = keep[np.argsort(rows.image[keep], kind="stable")]
    segments = None
    if rows.segments is not None:
        order, segments = _segments(rows.segments, order, ids, sizes, faults)
    fields: dict[str, Any] = {
        "first": np.searchsorted(rows.image[order], np.arange(len(sizes) + 1)).astype(np.int64),
        "boxes_xywh": np.ascontiguousarray(boxes[order]),
        "labels": rows.label[order].astype(np.int32),
        "crowd": crowd[order],
        "areas": np.where(no_area[order], w[order] * h[order], area[order]),
        "object_ids": unique_ids(ids, faults)[order],
    }
    if segments is not None:
        fields["segments"] = segments
    if rows.keypoints is not None:
        fields["keypoints"] = rows.keypoints[order]
    return fields


def unique_ids(ids: np.ndarray, faults: Faults) -> np.ndarray:
    """`ids` with fresh ones for 0 (scores AP 0), below (no engine takes it) and every second use (counts once)."""
    first_use = np.zeros(len(ids), dtype=bool)
    first_use[np.unique(ids, return_index=True)[1]] = True
    fresh = ~first_use | (ids <= 0)
    faults.repair("annotation id missing, below 1 or used twice (renumbered), annotation ids", ids[fresh])
    result = ids.copy()
    result[fresh] = max(int(ids.max(initial=0)), 0) + 1 + np.arange(fresh.sum())
    return result


def _segments(
    segments: Segments, order: np.ndarray, ids: np.ndarray, sizes: np.ndarray, faults: Faults
) -> tuple[np.ndarray, Segments]:
    """`order` without the objects whose mask cannot be used, and the masks of the others."""
    segments = segments.take(order)
    faults.refuse(
        "segmentation with an odd number of coordinates, or run lengths that do not cover its image, annotation ids",
        ids[np.sort(order[segments.wrong])],
    )
    far = segments.beyond(min(2.0 * sizes.max(initial=0), 2e5))  # filling them would take any amount of memory
    far = np.setdiff1d(far, segments.wrong)
    faults.refuse("polygon that is not finite or far outside its image, annotation ids", ids[order[far]])
    if len(far) or len(segments.wrong):
        kept = np.delete(np.arange(len(order)), np.union1d(far, segments.wrong))
        order, segments = order[kept], segments.take(kept)
    return order, segments
