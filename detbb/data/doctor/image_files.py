"""What only the image files can tell: missing and unusable ones, other sizes than annotated, images in both splits.

Only headers are read, whole masks, and the bytes of files of one size that are in both splits. The findings are
kept by the name, size and time of every file, so that only the first pass over a large set takes long.
"""

from __future__ import annotations

import hashlib
import os
import time
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from detbb.config.schema import DataConfig
from detbb.core import cache
from detbb.data.formats.faults import Faults
from detbb.data.formats.semantic import read_mask
from detbb.data.images import THREADS, BadImage, image_header, safe_join, with_reasons
from detbb.structures.annotations import Annotations, Fault

MISSING = "image file that is not there"
UNREADABLE = "image file that cannot be used"
RENAMED = "file name that is on disk in another Unicode normal form"
TOO_LARGE = "image file of more than max_pixels"
OTHER_SIZE = "image whose size is not what its annotations say"


@dataclass
class Findings:
    """Faults of one split's files, and the indices of the images that have one."""

    faults: list[Fault] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)


_FINDINGS = TypeAdapter(dict[str, Findings])


def examine_files(source: DataConfig, splits: Mapping[str, Annotations]) -> dict[str, Findings]:
    """Findings of each split (`train`, `val`); those of a pass that took long are kept in the cache."""
    with ThreadPoolExecutor(THREADS) as threads:
        stats = {
            s: np.array(list(threads.map(_stat, _paths(a))), dtype=np.int64).reshape(-1, 2) for s, a in splits.items()
        }
        key = _cache_key(source, splits, stats)
        if (entry := cache.load(key, None)) is not None:
            return _FINDINGS.validate_python(entry[1])
        began = time.perf_counter()
        found = {s: _look(source, a, stats[s][: len(a)], threads) for s, a in splits.items()}
        if len(splits) == 2:
            _find_leaks(source, splits, stats, found["val"])
        if time.perf_counter() - began > cache.SLOW_S:
            cache.store(key, None, arrays={}, data=_FINDINGS.dump_python(found, mode="json"))
    return found


def on_disk(path: Path) -> Path | None:
    """The file of this name in whatever Unicode normal form; None if there is none."""
    names = (path.name, *(unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")))
    return next((path.with_name(name) for name in names if os.path.lexists(path.with_name(name))), None)


def _paths(annotations: Annotations) -> list[Path]:
    """Those of the images, then those of the masks."""
    masks = annotations.mask_files or ()
    return [*(annotations.root / name for name in annotations.file_names), *map(Path, masks)]


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _look(source: DataConfig, annotations: Annotations, stats: np.ndarray, threads: ThreadPoolExecutor) -> Findings:
    def look(index: int) -> tuple[str, str, str] | None:
        """(kind, file, reason) of what is wrong with one image."""
        name, size = annotations.file_names[index], tuple(annotations.sizes[index].tolist())
        path = annotations.root / name
        if stats[index, 0] < 0:
            other = on_disk(path)
            return (RENAMED if other is not None and other != path else MISSING), name, ""
        try:
            header = image_header(safe_join(annotations.root, name, links=source.allow_links))
            if header[0] * header[1] > source.max_pixels:
                return TOO_LARGE, name, f"{header[1]} x {header[0]}"
            if header != size:
                return OTHER_SIZE, name, f"file {header[1]} x {header[0]}, annotations {size[1]} x {size[0]}"
            if annotations.mask_files is not None:
                read_mask(annotations, index)
        except BadImage as error:
            return UNREADABLE, name, f"{'' if error.path == str(path) else 'its mask '}{error.reason}"
        return None

    results = list(threads.map(look, range(len(annotations))))
    faults = Faults("", strict=False)
    skips = source.on_bad_image == "skip"
    for kind in (MISSING, RENAMED, UNREADABLE, TOO_LARGE, OTHER_SIZE):
        note = faults.repair if skips else faults.refuse
        note(f"{kind}{' (replaced)' * skips}:", with_reasons(r[1:] for r in filter(None, results) if r[0] == kind))
    claims = annotations.sizes.astype(np.int64).prod(axis=1) > source.max_pixels
    wrong = [r[1] for r, claim in zip(results, claims, strict=True) if claim and r is not None and r[0] != TOO_LARGE]
    if skips:  # what stands in would be evaluated at that size
        faults.refuse(f"annotated size of more than max_pixels ({source.max_pixels}), and not the file's:", wrong)
    return Findings(faults.found, {index for index, result in enumerate(results) if result is not None})


def _find_leaks(
    source: DataConfig, splits: Mapping[str, Annotations], stats: Mapping[str, np.ndarray], val: Findings
) -> None:
    """Add to `val` its images that have the bytes of an image of train."""
    sizes = {split: stats[split][: len(a), 0] for split, a in splits.items()}
    common = np.intersect1d(sizes["train"], sizes["val"])
    digests: dict[str, dict[int, bytes]] = {}
    for split, a in splits.items():
        candidates = np.flatnonzero(np.isin(sizes[split], common) & (sizes[split] > 0)).tolist()
        digests[split] = {index: digest for index in candidates if (digest := _digest(a.path(index))) is not None}
    of_train = {digest: index for index, digest in digests["train"].items()}
    leaked = {index: of_train[digest] for index, digest in digests["val"].items() if digest in of_train}
    what = [f"{splits['val'].file_names[i]} = {splits['train'].file_names[k]}" for i, k in leaked.items()]
    faults = Faults("", strict=False)
    by_heart = len(leaked) == len(splits["val"])  # all of val is of train: nobody does that by accident
    if source.allow_leak or by_heart:
        reason = "allow_leak" if source.allow_leak else "all of val is: this measures learning by heart"
        faults.repair(f"image of val that is in train, too ({reason}):", what)
    else:
        faults.refuse("image of val that is in train, too (leave it out, or say allow_leak: true):", what)
        val.bad |= set(leaked)
    val.faults += faults.found


def _digest(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None


def _cache_key(source: DataConfig, splits: Mapping[str, Annotations], stats: Mapping[str, np.ndarray]) -> str:
    """Follows from exactly these files, and from what is asked about them."""
    parts: list[object] = [source.on_bad_image, source.max_pixels, source.allow_leak, source.allow_links]
    for split, a in splits.items():
        parts += [split, [*map(os.path.abspath, _paths(a))], a.sizes, stats[split], a.mask_values]
    return cache.key(*parts)
