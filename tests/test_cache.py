"""The cache gives back what was kept, of that file and by this code alone, and never makes anything fail."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from datasets import box, write_coco

from detbb.core import cache
from detbb.core.errors import UserError
from detbb.data.formats import annotation_cache, coco
from detbb.data.formats.base import Request
from detbb.data.formats.coco import read_coco
from detbb.structures.annotations import Annotations, Fault, PackedStrings, Segments

ARRAYS = {"flags": np.array([True, False, True]), "xy": np.arange(7) / 3, "none": np.zeros((0, 4), np.int32)}
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


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The annotation files that were read, as that happens; whatever is read is kept below tmp_path/cache."""
    found: list[Path] = []

    class Counted(coco.CocoFile):
        def __init__(self, path: Path) -> None:
            found.append(path)
            super().__init__(path)

    monkeypatch.setattr(coco, "CocoFile", Counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SLOW_S", -1.0)
    monkeypatch.setattr(cache, "ROOM", 0)
    monkeypatch.setattr(annotation_cache, "SETTLED_S", -1e9)
    return found


def make(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Path:
    categories = [{"id": 90, "name": "zebra"} | POINTS, {"id": 3, "name": "car"} | POINTS]
    return write_coco(folder, rows, categories=categories, **changes)


def start(file: Path, **options: Any) -> Annotations:
    """What a start gets, once everything is written."""
    return finished(Request(file.parent / "images", file, **options))


def finished(request: Request) -> Annotations:
    data = read_coco(request)
    for thread in threading.enumerate():
        if thread.name == "annotation cache":
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


def test_an_entry_is_a_safetensors_file(tmp_path: Path) -> None:
    cache.store("a" * 32, [1], arrays=ARRAYS, data={"names": ["ü"]})
    arrays, data = cache.load("a" * 32, [1]) or ({}, None)
    assert data == {"names": ["ü"]}
    (entry,) = entries(tmp_path)
    for found in (arrays, safetensors.numpy.load_file(entry)):
        assert {n: plain(a) for n, a in found.items()} == {n: plain(a) for n, a in ARRAYS.items()}
    assert all(array.flags.aligned and array.flags.writeable for array in arrays.values())
    assert cache.load("b" * 32, [1]) is None and cache.load("a" * 32, [2]) is None


# --- what must hold, and for each a planted bug that must be seen


def another_state_of_the_file_is_read_again(folder: Path) -> None:
    file = make(folder)
    before, status = plain(start(file)), file.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_text(file.read_text().replace("12.25", "12.75"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = plain(start(file))
    assert changed != before and plain(start(file)) == changed and len(entries(folder)) == 1


def changed_code_makes_new_entries(folder: Path) -> None:
    cache.store("a" * 32, None, arrays=ARRAYS)
    read_bytes = Path.read_bytes
    for name in ("structures/annotations.py", "data/formats/faults.py"):
        cache.code_digest.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Path, "read_bytes", lambda path, name=name: read_bytes(path) + b"#" * str(path).endswith(name)
            )
            assert cache.load("a" * 32, None) is None, name
    cache.code_digest.cache_clear()
    assert cache.load("a" * 32, None) is not None


def a_flipped_bit_or_a_cut_is_no_entry(folder: Path) -> None:
    cache.store("a" * 32, None, arrays=ARRAYS)
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    expected = {name: plain(array) for name, array in ARRAYS.items()}
    flips = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for damaged in [*flips, *(whole[:n] for n in range(0, len(whole), 5)), whole[:-1]]:
        entry.write_bytes(damaged)
        found = cache.load("a" * 32, None)  # bits of the padding are nobody's
        assert found is None or {name: plain(array) for name, array in found[0].items()} == expected
    assert found is None


def what_is_unfinished_or_unused_is_removed(folder: Path) -> None:
    start = f".{'a' * 32}.safetensors"
    names = [f"{start}.{'0' * 8}.tmp", f"{start}.{'1' * 8}.tmp", f"{'b' * 32}.safetensors", f"{'b' * 32}.jpg"]
    place = folder / "cache/detbb/data"
    place.mkdir(parents=True)
    old, new, unused, foreign = (place / name for name in names)
    for path in (old, new, unused, foreign):
        path.touch()
    for path, age_s in ((old, 3600), (unused, 31 * 86400), (foreign, 31 * 86400)):
        os.utime(path, (time.time() - age_s,) * 2)
    cache.store("c" * 32, None, arrays=ARRAYS)
    (used,) = set(entries(folder)) - {new, foreign}  # another process may be writing the new one
    os.utime(used, (1, 1))
    assert cache.load("c" * 32, None) is not None
    cache.store("d" * 32, None, arrays=ARRAYS)
    assert used in entries(folder) and len(entries(folder)) == 4


def nothing_fails_or_is_written_without_a_place(folder: Path) -> None:
    file = make(folder)
    (folder / "file").touch()
    failed: list[Any] = []
    work = folder / "work"
    work.mkdir()
    for home in (folder / "file", "unwritable", None):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(work)
            patch.setattr(threading, "excepthook", failed.append)
            if home is None:
                patch.delenv("XDG_CACHE_HOME")
                patch.setattr(Path, "expanduser", no_home)
            else:
                patch.setenv("XDG_CACHE_HOME", str(folder / home))
                patch.setattr(os, "mkdir", refuse)  # root may write anywhere
            assert plain(start(file)) == plain(start(file))
    assert failed == [] and list(work.iterdir()) == [] and not (folder / "unwritable").exists()


def refuse(*arguments: Any, **options: Any) -> None:
    raise PermissionError(13, "Permission denied")


def no_home(path: Path) -> Path:
    if str(path).startswith("~"):
        raise RuntimeError("no home")
    return path


def size_and_time(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns, 0, 0]


def code_of_the_cache() -> str:
    return str(Path(cache.__file__).read_bytes())


code_of_the_cache.cache_clear = lambda: None  # type: ignore[attr-defined]
HOLDS = {
    another_state_of_the_file_is_read_again: (annotation_cache, "_state", size_and_time),
    changed_code_makes_new_entries: (cache, "code_digest", code_of_the_cache),
    a_flipped_bit_or_a_cut_is_no_entry: (cache, "_checksum", lambda about, arrays: str(sorted(about.items()))),
    what_is_unfinished_or_unused_is_removed: (cache, "tidy", lambda folder: None),
    nothing_fails_or_is_written_without_a_place: (cache, "cache_folder", lambda: Path(".cache")),
}


@pytest.mark.parametrize("claim", HOLDS)
def test_what_the_cache_promises_holds(claim: Callable[[Path], None], tmp_path: Path) -> None:
    claim(tmp_path)


@pytest.mark.parametrize("claim", HOLDS)
def test_a_planted_bug_of_the_cache_is_seen(
    claim: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*HOLDS[claim])
    with pytest.raises((AssertionError, ValueError)):
        claim(tmp_path)


# --- annotation files


def test_cached_annotations_are_every_byte_of_those_read(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    read, request = start(file), Request(file.parent / "images", file)
    again, faults = finished(request), request.faults
    assert plain(again) == plain(read) and len(reads) == 1
    assert len(read.labels) == 4 and read.keypoints is not None and read.crowd.any() and read.segments is not None
    assert again.segments is not None and len(again.segments.polygons(0)) == 2
    assert again.segments.coco(1) == read.segments.coco(1) and again.flip_pairs == ((0, 1),)
    assert len(read.faults) == 2 and faults.found == list(read.faults) and all(f.repaired for f in read.faults)
    for change in ("boxes_xywh", "segments", "faults", "file_names"):  # the comparison would see it
        other = {"boxes_xywh": read.boxes_xywh + 1e-9, "segments": read.segments.take(np.arange(4)[::-1])}
        changed = replace(read, **{change: other.get(change, ())})  # type: ignore[arg-type]
        assert plain(changed) != plain(read), change
    again.boxes_xywh[:] = 0  # writes to no entry
    assert plain(start(file)) == plain(read) and len(reads) == 1
    assert read_coco(Request(tmp_path / "elsewhere", file)).root == tmp_path / "elsewhere" and len(reads) == 1


def test_another_file_of_the_same_bytes_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    start(file)
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.replace(file)
    start(file)
    assert len(reads) == 2 and len(entries(tmp_path)) == 1


def test_other_options_have_other_entries(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path)
    start(file)
    assert start(file, classes=("zebra",)).classes == ("zebra",) and len(reads) == 2
    assert start(file, classes=("zebra", "car")).classes == ("zebra", "car") and len(reads) == 3
    with pytest.raises(UserError, match="lacks: car"):
        start(file, classes=("zebra",), exact=True)
    assert len(entries(tmp_path)) == 3


def test_what_is_not_the_files_alone_is_not_kept(tmp_path: Path, reads: list[Path]) -> None:
    unsized = [{"id": i, "file_name": n} for i, n in ((7, "b.png"), (0, "a.png"), (900, "c.png"))]
    assert len(start(make(tmp_path, images=unsized))) == 3
    bad = [*ROWS, box(43, 7, [5, 5, -3, 3])]
    file = make(tmp_path, bad)
    assert any(not f.repaired for f in start(file, strict=False).faults)
    with pytest.raises(UserError, match="negative"):
        start(file)
    assert entries(tmp_path) == [] and len(reads) == 3
    good = make(tmp_path)  # what is not refused is the same for the doctor and for training
    assert plain(start(good, strict=False)) == plain(start(good)) and len(reads) == 4


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(tmp_path)
    time.sleep(0.02)
    with monkeypatch.context() as patch:
        patch.setattr(coco, "flip_pairs", lambda names: os.utime(file) or ())
        start(file)
    assert entries(tmp_path) == []
    monkeypatch.setattr(annotation_cache, "SETTLED_S", 3600.0)
    start(file)
    assert entries(tmp_path) == []  # changed just now: another change might not show


def test_small_files_later_ranks_and_full_disks_keep_nothing(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path)
    for name, value in (("SLOW_S", 3600.0), ("ROOM", 2**62)):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            start(file)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        start(file)
    monkeypatch.setenv("LOCAL_RANK", "1")
    start(file)
    assert entries(tmp_path) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    start(file)
    monkeypatch.setenv("LOCAL_RANK", "1")
    start(file)
    assert len(reads) == 5 and len(entries(tmp_path)) == 1


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
