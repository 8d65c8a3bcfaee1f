"""One split of a data source as flat arrays.

Arrays instead of Python objects: a forked DataLoader worker reads them without ever writing a reference count, so the
pages stay shared and memory does not grow with the number of workers.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np

Segmentation = list[list[float]] | dict[str, Any] | None  # of one object, as COCO writes it


class PackedStrings:
    """A read-only list of strings in two arrays."""

    def __init__(self, items: Iterable[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in items]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._first = np.concatenate([[0], np.cumsum([len(s) for s in encoded], dtype=np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._first[index] : self._first[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Segments:
    """The masks of M objects: each a list of polygons, or one run-length code (COCO's compressed string form).

    `polygons(i)` gives float64 arrays (points, 2) of x, y in original pixels; `rle(i)` gives
    `(height, width, counts)` or None. `wrong`: indices of objects whose mask is left out: a polygon has an odd
    number of coordinates, or a code does not cover its image.
    """

    def __init__(self, runs: Iterable[tuple[Sequence[Segmentation], np.ndarray | None]]) -> None:
        """The masks of all runs of (items, sizes); only one run's Python numbers are in memory at a time.

        items: one COCO `segmentation` each: a list of flat polygons, an RLE dict, or None. sizes: (items, 2) height,
        width of their images; without, run-length codes are taken as they are.
        """
        xy = array("d")  # flat coordinates; it grows in its place, where joining arrays would take twice their memory
        all_lengths, counts = [], []  # numbers a polygon; polygons an object
        codes: dict[int, tuple[int, int, bytes]] = {}
        unfit, size = [], 0
        for items, sizes in runs:
            for row in [row for row, item in enumerate(items) if type(item) is dict]:
                if sizes is None or rle_fits(items[row], *sizes[row].tolist()):  # type: ignore[arg-type]
                    codes[size + row] = _compressed_rle(items[row])  # type: ignore[arg-type]
                else:
                    unfit.append(size + row)
            lists = [item if type(item) is list else [] for item in items]
            polygons = list(chain.from_iterable(lists))
            counts.append(np.fromiter(map(len, lists), np.int64, len(lists)))
            all_lengths.append(np.fromiter(map(len, polygons), np.int64, len(polygons)))
            areas = all_lengths[-1] >= 6
            if not areas.all():
                polygons = list(compress(polygons, areas))
            numbers = np.fromiter(chain.from_iterable(polygons), np.float64, int(all_lengths[-1][areas].sum()))
            xy.frombytes(numbers.view(np.uint8).data)
            size += len(items)
        lengths, owners = np.concatenate(all_lengths), np.repeat(np.arange(size), np.concatenate(counts))
        self.wrong = np.union1d(unfit, owners[lengths % 2 == 1]).astype(np.int64)
        lengths, owners = lengths[lengths >= 6], owners[lengths >= 6]
        self._xy = np.frombuffer(xy, np.float64)
        self._polygon_first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._first = np.searchsorted(owners, np.arange(size + 1)).astype(np.int64)
        self._rle_rows = np.array(list(codes), dtype=np.int64)
        self._rle_hw = np.array([code[:2] for code in codes.values()], dtype=np.int64).reshape(-1, 2)
        self._rle_counts = PackedStrings(code[2].decode("ascii") for code in codes.values())
        self._rows = np.arange(size)  # where each object is in the arrays above

    def take(self, rows: np.ndarray) -> Segments:
        """These objects, sharing the arrays."""
        taken = copy.copy(self)
        taken._rows, taken.wrong = self._rows[rows], np.flatnonzero(np.isin(rows, self.wrong))
        return taken

    def __len__(self) -> int:
        return len(self._rows)

    def empty(self) -> np.ndarray:
        """(M,) bool: objects with neither a polygon nor a run-length code."""
        empty = np.diff(self._first) == 0
        empty[self._rle_rows] = False
        return empty[self._rows]

    def polygons(self, index: int) -> list[np.ndarray]:
        row = self._rows[index]
        return [
            self._xy[self._polygon_first[p] : self._polygon_first[p + 1]].reshape(-1, 2)
            for p in range(self._first[row], self._first[row + 1])
        ]

    def rle(self, index: int) -> tuple[int, int, bytes] | None:
        place = int(np.searchsorted(self._rle_rows, self._rows[index]))
        if place == len(self._rle_rows) or self._rle_rows[place] != self._rows[index]:
            return None
        height, width = self._rle_hw[place].tolist()
        return height, width, self._rle_counts[place].encode("ascii")

    def beyond(self, limit: float) -> np.ndarray:
        """Indices of the objects with a polygon coordinate not finite, or further than `limit` from 0."""
        if not len(self._xy) or (-limit <= self._xy.min() and self._xy.max() <= limit):  # not so where there is a NaN
            return np.zeros(0, dtype=np.int64)
        numbers = np.flatnonzero(~(np.abs(self._xy) <= limit))
        polygons = np.searchsorted(self._polygon_first, numbers, side="right") - 1
        return np.flatnonzero(np.isin(self._rows, np.searchsorted(self._first, polygons, side="right") - 1))

    def coco(self, index: int) -> list[list[float]] | dict:
        """The object's COCO `segmentation`, as the evaluators read it."""
        if (rle := self.rle(index)) is not None:
            return {"size": [rle[0], rle[1]], "counts": rle[2].decode("ascii")}
        return [p.ravel().tolist() for p in self.polygons(index)]


def _compressed_rle(item: dict) -> tuple[int, int, bytes]:
    from pycocotools import mask as coco_mask

    height, width = (int(v) for v in item["size"])
    counts = item["counts"]
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects(item, height, width)["counts"]
    return height, width, counts.encode("ascii") if isinstance(counts, str) else counts


def rle_fits(item: dict[str, Any], height: int, width: int) -> bool:
    """Whether a COCO run-length code covers height x width pixels exactly. pycocotools writes out of bounds if not."""
    size, counts = item.get("size"), item.get("counts")
    if not isinstance(size, list) or size != [height, width]:
        return False
    if isinstance(counts, list):
        return all(type(n) is int and n >= 0 for n in counts) and sum(counts) == height * width
    text = counts.encode() if isinstance(counts, str) and counts.isascii() else b""
    code = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(code) or (code < 0).any() or (code > 63).any() or code[-1] & 32:
        return False
    ends = np.flatnonzero(code & 32 == 0)  # 5 bits a character, the sixth says that more follow
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return False
    shifts = 5 * (np.arange(len(code)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((code & 31) << shifts, starts)
    runs[code[ends] & 16 > 0] -= 1 << 5 * lengths[code[ends] & 16 > 0]
    runs[1::2] = np.cumsum(runs[1::2])  # stored as differences to the run before last
    runs[2::2] = np.cumsum(runs[2::2])
    return bool((runs >= 0).all() and runs.sum() == height * width)


@dataclass(frozen=True)
class Fault:
    """One kind of fault in one file of annotations."""

    kind: str
    count: int
    first: tuple[Any, ...]  # ids or names, at most ten
    repaired: bool

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.first) else ""
        return f"{self.count} x {self.kind} {', '.join(map(str, self.first))}{more}"


@dataclass(frozen=True)
class Annotations:
    """N images with M objects of C classes; the objects of image i are rows `first[i] … first[i + 1]`."""

    root: Path  # folder of the images
    classes: tuple[str, ...]  # label 0 … C - 1
    category_ids: np.ndarray  # (C,) int64, the ids of the file
    image_ids: np.ndarray  # (N,) int64, the ids of the file
    file_names: PackedStrings  # (N,), below root
    sizes: np.ndarray  # (N, 2) int32 height, width in pixels, after EXIF rotation
    first: np.ndarray  # (N + 1,) int64
    boxes_xywh: np.ndarray  # (M, 4) float64 as in the file, original pixels
    labels: np.ndarray  # (M,) int32
    crowd: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float64, pixels²
    object_ids: np.ndarray  # (M,) int64, unique and never 0 (an id of 0 would score AP 0)
    segments: Segments | None = None  # (M,)
    keypoints: np.ndarray | None = None  # (M, K, 3) float32 x, y, visibility
    keypoint_names: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()  # keypoints that change places when the image is mirrored
    mask_files: PackedStrings | None = None  # (N,) class-index PNGs, whole paths
    mask_values: np.ndarray | None = None  # (256,) uint8: mask value -> label, 255 to ignore, 254 for no class at all
    faults: tuple[Fault, ...] = ()  # what the reader repaired, with counts
    notes: tuple[Fault, ...] = ()  # nothing to repair, good to know

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, index: int) -> slice:
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of image `index` without crowds, and their boxes: (n,) int64 and (n, 4) float64 xyxy."""
        rows = np.arange(*self.first[index : index + 2])
        rows = rows[~self.crowd[rows]]
        boxes = self.boxes_xywh[rows]
        boxes[:, 2:] += boxes[:, :2]
        return rows, boxes

    def path(self, index: int) -> Path:
        return self.root / self.file_names[index]

    def has(self, need: str) -> bool:
        """Whether heads that need `boxes`, `masks`, `keypoints`, `semantic` or `labels` can learn from this split."""
        return {
            "boxes": self.mask_files is None,
            "labels": self.mask_files is None,
            "masks": self.segments is not None,
            "keypoints": self.keypoints is not None,
            "semantic": self.mask_files is not None,
        }[need]
