"""What is remembered of an annotation file is what reading it gives, and is used for that file alone."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import box, write_coco

from detbb.core.errors import UserError
from detbb.data.formats import annotation_cache as remembered
from detbb.data.formats import coco
from detbb.data.formats.coco import read_coco
from detbb.data.formats.faults import Faults
from detbb.structures.annotations import Annotations, Fault, PackedStrings, Segments

SQUARE = {"size": [30, 40], "counts": [600, 5, 595]}
POLYGON = [1.5, 2, 9, 2, 9, 12.25]
POINTS = {"keypoints": ["left eye", "right eye", "nose"]}
ROWS = [
    box(5, 7, [1, 2, 10, 20], segmentation=[POLYGON, POLYGON[::-1]], keypoints=[1, 2, 2, 3, 4.5, 1, 0, 0, 0]),
    box(0, 0, [1.25, 0, 5, 5], 90, segmentation=[POLYGON]),  # renumbered
    box(9, 7, [3.5, 4.25, 6, 7], iscrowd=1, segmentation=SQUARE),
    box(11, 7, [1, 1, 5, 0], segmentation=[POLYGON]),  # dropped
    box(12, 0, [1, 1, 5, 5], segmentation=[]),
]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were read, as that happens; whatever is read is remembered below tmp_path/cache."""
    found: list[Path] = []

    class Counted(coco.CocoFile):
        def __init__(self, path: Path) -> None:
            found.append(path)
            super().__init__(path)

    monkeypatch.setattr(coco, "CocoFile", Counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"FROM_S": -1.0, "SETTLED_S": -1e9, "ROOM": 0}.items():
        monkeypatch.setattr(remembered, name, value)
    return found


def make(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Path:
    categories = [{"id": 90, "name": "zebra"} | POINTS, {"id": 3, "name": "car"} | POINTS]
    return write_coco(folder, rows, categories=categories, **changes)


def start(file: Path, **options: Any) -> Annotations:
    """What a start gets, once everything is written."""
    data = read_coco(file.parent / "images", file, **options)
    for thread in threading.enumerate():
        if thread.name == "remember":
            thread.join()
    return data


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/detbb/data/*"), key=lambda path: path.name.lstrip("."))


def plain(value: Any) -> Any:
    """Everything in `value`, down to the bytes, types and order of its fields."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (Annotations, Segments, PackedStrings, Fault)):
        return type(value), [(name, plain(field)) for name, field in vars(value).items()]
    return type(value), [plain(v) for v in value] if isinstance(value, tuple) else value


def test_a_recalled_set_is_every_byte_of_the_one_read(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    read, faults = start(file), Faults(file)
    recalled = start(file, faults=faults)
    assert plain(recalled) == plain(read) and len(reads) == 1
    assert len(read.labels) == 4 and read.keypoints is not None and read.crowd.any() and read.segments is not None
    assert recalled.segments is not None and len(recalled.segments.polygons(0)) == 2
    assert recalled.segments.coco(1) == read.segments.coco(1) and recalled.flip_pairs == ((0, 1),)
    assert len(read.faults) == 2 and faults.found == list(read.faults) and all(f.repaired for f in read.faults)
    for change in ("boxes_xywh", "segments", "faults", "file_names"):  # the comparison would see it
        other = {"boxes_xywh": read.boxes_xywh + 1e-9, "segments": read.segments.take(np.arange(4)[::-1])}
        changed = replace(read, **{change: other.get(change, ())})  # type: ignore[arg-type]
        assert plain(changed) != plain(read), change


def test_writing_to_recalled_arrays_changes_no_entry(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    read = plain(start(file))
    start(file).boxes_xywh[:] = 0
    assert plain(start(file)) == read and len(reads) == 1


def test_images_are_where_this_start_says(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    start(file)
    assert read_coco(tmp_path / "elsewhere", file).root == tmp_path / "elsewhere" and len(reads) == 1


def touch(file: Path) -> None:
    os.utime(file)


def same_size_and_time(file: Path) -> None:
    before = file.stat()
    file.write_text(file.read_text().replace("12.25", "12.75"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_file(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.replace(file)


@pytest.mark.parametrize("change", [touch, same_size_and_time, another_file])
def test_a_changed_file_is_read_again_and_replaces_its_entry(
    tmp_path: Path, reads: list[Path], change: Callable[[Path], None]
) -> None:
    file = make(tmp_path)
    start(file)
    time.sleep(0.02)  # a tick of the file system's clock
    change(file)
    changed = start(file)
    assert len(reads) == 2 and len(entries(tmp_path)) == 1
    assert plain(start(file)) == plain(changed) and len(reads) == 2


def test_other_classes_versions_and_checks_are_read_again(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path)
    start(file)
    assert start(file, classes=["zebra"]).classes == ("zebra",) and len(reads) == 2
    assert start(file, classes=["zebra", "car"]).classes == ("zebra", "car") and len(reads) == 3
    with pytest.raises(UserError, match="lacks: car"):
        start(file, classes=["zebra"], exact=True)
    for version in ("detbb.__version__", "detbb.data.formats.annotation_cache._CODE"):
        monkeypatch.setattr(version, "another")
        start(file)
    assert len(reads) == 6 and len(entries(tmp_path)) == 3


def test_a_damaged_entry_is_never_used(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    read = plain(start(file))
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    header = 16 + int.from_bytes(whole[8:12], "little")
    first = -(-header // 64) * 64
    assert json.loads(whole[16:header])["size"] == len(whole) - first and first < len(whole)
    cuts = [whole[:n] for n in (0, 1, 15, 16, 100, header, first, len(whole) - 1)] + [whole + b"\0"]
    flips = [*range(0, header, 7), first, first + 64, len(whole) - 64]
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in flips]
    for count, damaged in enumerate([*cuts, *flipped], 2):
        entry.write_bytes(damaged)
        assert plain(start(file)) == read and len(reads) == count
        assert entry.read_bytes() == whole


def test_what_is_not_the_files_alone_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    unsized = [{"id": i, "file_name": n} for i, n in ((7, "b.png"), (0, "a.png"), (900, "c.png"))]
    assert len(start(make(tmp_path, images=unsized))) == 3
    bad = [*ROWS, box(43, 7, [5, 5, -3, 3])]
    file = make(tmp_path, bad)
    assert any(not f.repaired for f in start(file, faults=Faults(file, strict=False)).faults)
    with pytest.raises(UserError, match="negative"):
        start(file)
    assert entries(tmp_path) == [] and len(reads) == 3
    good = make(tmp_path)  # what is not refused is the same for the doctor and for training
    assert plain(start(good, faults=Faults(good, strict=False))) == plain(start(good)) and len(reads) == 4


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path)
    time.sleep(0.02)
    with monkeypatch.context() as patch:
        patch.setattr(coco, "flip_pairs", lambda names: touch(file) or ())
        start(file)
    assert entries(tmp_path) == []
    monkeypatch.setattr(remembered, "SETTLED_S", 3600.0)
    start(file)
    assert entries(tmp_path) == []  # changed just now: another change might not show


def test_small_files_later_ranks_and_full_disks_leave_nothing(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path)
    for name, value in (("FROM_S", 3600.0), ("ROOM", 2**62)):
        with monkeypatch.context() as patch:
            patch.setattr(remembered, name, value)
            start(file)
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        start(file)
        assert entries(tmp_path) == []
        patch.setenv("LOCAL_RANK", "0")
        start(file)
        patch.setenv("LOCAL_RANK", "1")
        start(file)
    assert len(reads) == 4 and len(entries(tmp_path)) == 1


@pytest.mark.parametrize("place", ["file", "unwritable", "nobody", "no thread"])
def test_a_cache_that_cannot_be_written_is_harmless(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    file, cache = make(tmp_path), tmp_path / "cache"
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    if place == "file":
        cache.touch()
    elif place == "unwritable":
        cache.mkdir()
        cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
        monkeypatch.setattr("os.mkdir", refuse)  # root may write anywhere
    elif place == "no thread":
        monkeypatch.setattr(threading.Thread, "start", no_thread)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert plain(start(file)) == plain(start(file)) and len(reads) == 2 and failed == []


def refuse(*arguments: Any, **options: Any) -> None:
    raise PermissionError(13, "Permission denied")


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_an_entry_that_was_not_used_for_a_month_is_removed(tmp_path: Path, reads: list[Path]) -> None:
    month = 30 * 86400
    unused, used = make(tmp_path / "unused"), make(tmp_path / "used")
    start(unused)
    (of_unused,) = entries(tmp_path)
    start(used)
    for entry in entries(tmp_path):
        os.utime(entry, (time.time() - month - 60,) * 2)
    start(used)  # which counts as a use
    start(make(tmp_path / "third"))
    assert len(reads) == 3 and len(entries(tmp_path)) == 2 and of_unused not in entries(tmp_path)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    start(file)
    (entry,) = entries(tmp_path)
    old, new = (entry.with_name(f".{entry.name}.{name}.tmp") for name in ("old", "new"))
    for left in (old, new):
        left.touch()
    os.utime(old, (1, 1))
    touch(file)
    start(file)
    assert set(entries(tmp_path)) == {entry, new}  # another process may be writing that one
