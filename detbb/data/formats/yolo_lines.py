"""The dialects of YOLO's label lines: which one a set is written in shows only over all of its lines.

A line is a class number and `x y w h` (centre and size), a polygon, a box with keypoints of two or three numbers, or
the four corners of an oriented box; tools that save predictions add a confidence, a track id, or both. Coordinates are
parts of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from detbb.data.formats.faults import Faults

SLACK = 0.02  # of the image, by which tools let a box or a keypoint leave what it lies in
PIXELS = 2.0  # no part of an image is larger; a coordinate in pixels is


@dataclass(frozen=True, eq=False)
class Line:
    where: str  # file, number and text
    file: str
    image: int
    at: int  # in its file
    label: int  # index of the class
    values: np.ndarray  # (n,) float64, without the class number


def readable(lines: Sequence[Line], sizes: np.ndarray, points: int | None, faults: Faults) -> list[Line]:
    """The lines that are boxes (4 numbers), polygons (an even number from 6) or, with `points`, boxes with keypoints.

    sizes: (N, 2) height, width of the images. points: keypoints that the config names; 0: there are none, lines of more
    numbers are polygons; None: not said. Lines in any other dialect are refused with its name, or cut to their boxes.
    """
    files = len({line.file for line in lines})
    far = {line.file for line in lines if (np.abs(line.values[:4]) > PIXELS).any()}
    faults.refuse(f"file (of {files}) with coordinates above 1; lines are parts of the image (0 to 1):", sorted(far))
    lines = [line for line in lines if line.file not in far]
    boxes, others = [x for x in lines if len(x.values) == 4], [x for x in lines if len(x.values) != 4]
    if boxes and _are_corners(np.array([line.values for line in boxes])):
        faults.refuse(
            "line of two corners, `class x1 y1 x2 y2` (write `class x y w h`: centre and size):", [boxes[0].where]
        )
        boxes = []
    if points:
        return _in_order(boxes + _with_keypoints(others, points, faults))
    name = _dialect_of_all(others, sizes, known=points is not None)
    if name is not None and name.startswith("box with "):
        faults.note(
            f"line that is a {name}: only boxes are read (name the keypoints in `keypoints`, or say `keypoints: []` if "
            "these are polygons):",
            [line.where for line in others],
        )
        others = [replace(line, values=line.values[:4]) for line in others]
    elif name == "oriented box":
        faults.note("line that is an oriented box (four corners, read as a polygon):", [x.where for x in others])
    elif name is not None:
        faults.refuse(f"line that is a {name}:", [line.where for line in others])
        others = []
    others = _refuse(
        others,
        lambda n: len(n) != 4 and (len(n) < 6 or len(n) % 2 == 1),
        "line that is not `class x y w h` or `class x1 y1 x2 y2 x3 y3 …`:",
        faults,
    )
    if boxes and others and name is None:
        faults.note(f"line with a polygon, beside {len(boxes)} lines with a box alone:", [x.where for x in others])
    return _in_order(boxes + others)


def _refuse(lines: list[Line], is_wrong: Callable[[np.ndarray], bool], kind: str, faults: Faults) -> list[Line]:
    """The lines whose values are not wrong; the others are refused."""
    faults.refuse(kind, [line.where for line in lines if is_wrong(line.values)])
    return [line for line in lines if not is_wrong(line.values)]


def _in_order(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: (line.image, line.at))


def _with_keypoints(lines: list[Line], points: int, faults: Faults) -> list[Line]:
    two, three = 4 + 2 * points, 4 + 3 * points
    wanted = f"`class x y w h` and {points} keypoints of two or three numbers ({two} or {three} after the class)"
    lines = _refuse(lines, lambda n: len(n) not in (two, three), f"line that is not {wanted}:", faults)
    far = "line with a keypoint that is no part of the image (0 to 1):"
    lines = _refuse(lines, lambda n: not (np.abs(n) <= PIXELS).all(), far, faults)
    unclear = "keypoint whose third number is no visibility (0, 1 or 2; a confidence belongs to predictions):"
    return _refuse(lines, lambda n: len(n) == three and not np.isin(n[6::3], (0, 1, 2)).all(), unclear, faults)


def keypoints_of(line: Line, points: int, hw: Sequence[int]) -> np.ndarray:
    """(K, 3) x, y in pixels and visibility; a keypoint at 0, 0 or of visibility 0 is not there."""
    found = np.zeros((points, 3))
    if len(line.values) > 4:
        given = line.values[4:].reshape(points, -1)
        found[:, : given.shape[1]] = given
        if given.shape[1] == 2:
            found[:, 2] = 2 * (given != 0).any(axis=1)
        found[:, :2] *= (hw[1], hw[0])
        found[found[:, 2] == 0] = 0
    return found


def _are_corners(table: np.ndarray) -> bool:
    """Whether (m, 4) boxes must be two corners: as centre and size, most of them leave the image."""
    leaves = np.abs(table[:, :2] - 0.5) + table[:, 2:] / 2 > 0.5 + 2 * SLACK
    return bool((table[:, 2:] > table[:, :2]).all() and leaves.any(axis=1).mean() > 0.5)


def _dialect_of_all(lines: list[Line], sizes: np.ndarray, *, known: bool) -> str | None:
    """What lines of other than four numbers are, if they are no polygons; known: that there are no keypoints.

    A single polygon may look like another dialect by chance, so lines of equal length are judged together, and the
    majority decides.
    """
    groups: dict[int, list[Line]] = {}
    for line in lines:
        groups.setdefault(len(line.values), []).append(line)
    kinds: Counter[str] = Counter()
    for group in groups.values():
        name = _dialect(group, sizes, known=known)
        kinds["polygon" if name is None or (name == "oriented box" and len(groups) > 1) else name] += len(group)
    if 2 * kinds["polygon"] >= len(lines):
        return None
    kinds = +kinds
    if len(kinds) == 1:
        return next(iter(kinds))
    return f"mix of dialects ({', '.join(f'{count} x {name}' for name, count in kinds.items())})"


def _dialect(lines: list[Line], sizes: np.ndarray, *, known: bool) -> str | None:
    """What lines of one length are, if they are no polygons."""
    count = len(lines[0].values)
    last = np.array([line.values[-1] for line in lines if count])
    if count == 5:
        return f"box and {_extra(last)} (of predictions: take the last column away)"
    if count < 6:
        return None
    table = np.array([line.values for line in lines])
    if count == 6 and _framed(table) and _whole(table[:, 5]) and (table[:, 5] > 1).any():
        return "box, a confidence and a track id (of predictions: take the last two columns away)"
    if count == 8 and _are_rectangles(table.reshape(-1, 4, 2) * sizes[[x.image for x in lines], None, ::-1]):
        return "oriented box"
    if _framed(table):
        for extra in range(3) if not known else ():  # a confidence, a track id, or both may follow
            for dimensions, thirds in ((3, (0, 1, 2)), (2, None), (3, None)):
                points, rest = divmod(count - 4 - extra, dimensions)
                if rest == 0 and points > 0 and _are_keypoints(table[:, : count - extra], dimensions, thirds):
                    if extra == 0:
                        return f"box with {points} keypoints of {dimensions} numbers"
                    if extra == 1 or _whole(table[:, -1]):
                        return f"box, {points} keypoints and {_extra(last)} (of predictions: take what is last away)"
    if count % 2 == 1:
        return f"polygon and {_extra(last)} (of predictions: take the last column away)"
    if _whole(last) and (last > 1).any():
        return "polygon, a confidence and a track id (of predictions: take the last two columns away)"
    return None


def _extra(last: np.ndarray) -> str:
    return "a track id" if _whole(last) and (last > 1).any() else "a confidence"


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.round(values)).all())


def _framed(table: np.ndarray) -> bool:
    """Whether the first four numbers of every row are the centre and size of a box in the image."""
    inside = np.abs(table[:, :2] - 0.5) + table[:, 2:4] / 2 <= 0.5 + SLACK
    return bool(inside.all() and (table[:, 2:4] > 0).all())


def _are_keypoints(table: np.ndarray, dimensions: int, thirds: tuple[int, ...] | None) -> bool:
    """Whether what follows the box are keypoints: each lies in the box, or is not there; `thirds`: third numbers."""
    points = table[:, 4:].reshape(len(table), -1, dimensions)
    centre, size = table[:, None, :2], table[:, None, 2:4]
    there = (points[..., :2] != 0).any(axis=-1)
    if dimensions == 3:
        third = points[..., 2]
        if not (np.isin(third, thirds) if thirds else (third >= 0) & (third <= 1)).all():
            return False
        there &= third > 0
    inside = (np.abs(points[..., :2] - centre) <= size / 2 + SLACK).all(axis=-1)
    return bool((inside | ~there).all())


def _are_rectangles(corners: np.ndarray) -> bool:
    """Whether (m, 4, 2) points in pixels are rectangles, to a pixel and a hundredth."""
    sides = np.roll(corners, -1, axis=1) - corners
    slack = 1 + 0.01 * np.abs(sides).max(axis=(1, 2), initial=0)
    closed = np.abs(sides[:, 0] + sides[:, 2]).max(axis=1) <= 2 * slack
    lengths = np.linalg.norm(sides, axis=-1)
    straight = np.abs((sides[:, 0] * sides[:, 1]).sum(axis=1)) <= slack * lengths[:, :2].max(axis=1)
    return bool((closed & straight).all())
