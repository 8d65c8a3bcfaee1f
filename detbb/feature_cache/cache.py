"""The feature cache: what the frozen prefix puts out, computed once for each image and view.

Nothing stale is ever read. What features depend on besides the image is in the name of their folder (weights, modules,
levels, sizes, transforms, versions); and an entry counts only where the SHA-256 of the image file, as it is now, and
that of the stored bytes are those of its row in the index. So a kill, a full disk or another process leaves nothing to
repair.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detbb.core.errors import UserError
from detbb.core.files import sync_folder
from detbb.data.sample import SampleReader
from detbb.feature_cache.frozen_prefix import FrozenPrefix
from detbb.structures.batch import Batch, CacheEntry, PrecomputedFeatures

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
RELEASE_AFTER = 20  # batches in a row without a miss, and the prefix rests: its copies are as large as its weights
_ROW = 64  # bytes of an index row: SHA-256 of the image file, SHA-256 of that and the record


@dataclass(frozen=True)
class Plan:
    """What one source's records look like."""

    images: int
    variants: int  # records an image: how it may be augmented
    hw: tuple[int, int]  # of every padded image
    levels: dict[str, tuple[int, int, int]]  # height, width, channels, which is also the order in memory
    dtype: torch.dtype

    @property
    def record(self) -> int:
        return sum(h * w * c for h, w, c in self.levels.values()) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """What the records of all images take, at most."""
        return self.images * self.variants * (self.record + _ROW)


class Store:
    """The records of one source, in memory or in files; forked workers see what the main process adds."""

    def __init__(self, plan: Plan, folder: Path | None) -> None:
        """folder: an opened one (see `open_folder`); None: in memory."""
        self.plan = plan
        slots = plan.images * plan.variants
        self._file = None if folder is None else os.open(folder / "features", os.O_RDWR)
        if folder is None:
            self._index, self._data = _shared((slots, _ROW)), _shared((slots, plan.record))
        else:
            self._index = np.memmap(folder / "index", np.uint8, "r+", shape=(slots, _ROW))
            self._data = np.memmap(folder / "features", np.uint8, "r+", shape=(slots, plan.record))
        self._records = torch.from_numpy(self._data)
        self._trusted = _shared((slots,))  # records that this run wrote or verified
        self._files = _shared((plan.images, 4 * 8 + 32))  # of files seen in this run: size, times, inode; SHA-256
        self.full = False  # the disk, or it cannot be written

    @property
    def filled(self) -> int:
        """How many entries there are, other processes' too."""
        return int(np.count_nonzero(self._index.view(np.uint64)[:, 0]))

    def find(self, reader: SampleReader, index: int, epoch: int) -> CacheEntry:
        """The entry of an image as this epoch augments it; called by workers."""
        image = self._digest(reader, index)
        slot = index * self.plan.variants + reader.variant(index, epoch)
        row = self._index[slot].tobytes()
        stored = bool(image) and row[:32] == image
        if stored and not self._trusted[slot]:
            stored = self._trusted[slot] = row[32:] == _sha256(image, self._data[slot].data)
        return CacheEntry(slot, image, bool(stored))

    def checked(self, entry: CacheEntry, reader: SampleReader, index: int) -> CacheEntry:
        """`entry`, not to be stored if the file changed while it was read."""
        return entry if self._digest(reader, index) == entry.image_sha256 else entry._replace(image_sha256=b"")

    def put(self, entry: CacheEntry, levels: Mapping[str, Tensor]) -> Tensor:
        """The record (bytes) of one image's (C, h, w) levels, stored too where the entry allows it."""
        parts = [levels[name].detach().permute(1, 2, 0).to(self.plan.dtype).reshape(-1) for name in self.plan.levels]
        record = torch.cat(parts).cpu().view(torch.uint8)
        if not entry.image_sha256 or self.full:
            return record
        self.full = not self._write(entry.slot, record.numpy())
        if self.full:
            return record
        row = entry.image_sha256 + _sha256(entry.image_sha256, record.numpy().data)
        self._index[entry.slot] = np.frombuffer(row, np.uint8)
        self._trusted[entry.slot] = True
        return record

    def record(self, slot: int) -> Tensor:
        return self._records[slot]

    def _write(self, slot: int, record: np.ndarray) -> bool:
        """Whether the record could be written; not through the map, where a full disk would end the process."""
        if self._file is None:
            self._data[slot] = record
            return True
        try:
            return os.pwrite(self._file, record.data, slot * self.plan.record) == self.plan.record
        except OSError:
            return False

    def _digest(self, reader: SampleReader, index: int) -> bytes:
        """SHA-256 of the image file, hashed once a run unless it changes; empty if it cannot be read."""
        try:
            path = reader.path(index)
            stat = os.stat(path)
            now = np.array([stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], np.uint64).view(np.uint8)
            known = self._files[index]
            if not (known[:32] == now).all():
                known[32:] = np.frombuffer(_sha256(path.read_bytes()), np.uint8)
                known[:32] = now
            return known[32:].tobytes()
        except (OSError, UserError):  # reading the image says what is wrong
            return b""


class FeatureCache:
    """Gives batches their features: from the stores where they are, from the prefix otherwise, and stores those.

    On CPU images are computed one by one, so features do not depend on which images are in a batch or stored already:
    they differ from those of a whole batch by rounding alone, and a resumed run learns from the same bits.
    """

    def __init__(self, prefix: FrozenPrefix, stores: dict[str, Store]) -> None:
        self._prefix, self.stores = prefix, stores
        self._said = self._share()
        self._said_full = False
        self._hits = 0  # batches in a row

    def __call__(self, batch: Batch) -> Batch:
        store = self.stores.get(batch.source)
        if store is None:
            return self._prefix(batch)
        device, sizes = batch.images.device, batch.sizes
        missing = [i for i, entry in enumerate(batch.entries) if not entry.is_stored]
        assert len(missing) == len(batch.images) and len(batch.entries) == len(sizes)
        self._hits = 0 if missing else self._hits + 1
        if self._hits == RELEASE_AFTER:
            self._prefix.release()
        rows = {i: store.record(e.slot) for i, e in enumerate(batch.entries) if e.is_stored}
        at_once = 1 if device.type == "cpu" else max(len(missing), 1)
        for first in range(0, len(missing), at_once):
            group = missing[first : first + at_once]
            levels = self._prefix.levels(batch.images[first : first + at_once], [sizes[i] for i in group])
            for row, i in enumerate(group):
                rows[i] = store.put(batch.entries[i], {name: levels[name][row] for name in store.plan.levels})
        levels, end = {}, 0
        for name, (h, w, c) in store.plan.levels.items():
            start, end = end, end + h * w * c * store.plan.dtype.itemsize
            values = torch.stack([rows[i][start:end] for i in range(len(sizes))]).view(store.plan.dtype)
            features = values.view(-1, h, w, c).permute(0, 3, 1, 2).to(device, non_blocking=True)
            levels[name] = features.to(torch.promote_types(features.dtype, torch.float32))
        return replace(batch, precomputed=PrecomputedFeatures(self._prefix.after, levels))

    def new_messages(self) -> list[str]:
        """Lines for the log: each further quarter that is stored, and a full disk."""
        lines = []
        if self._said < 100 and (share := self._share()) // 25 > self._said // 25:
            self._said = share
            lines.append(f"feature cache: {share} % stored")
        if not self._said_full and any(store.full for store in self.stores.values()):
            self._said_full = True
            lines.append(
                "WARNING: feature cache: the disk is full or fails; what is not stored yet is computed at every step"
            )
        return lines

    def _share(self) -> int:
        slots = sum(s.plan.images * s.plan.variants for s in self.stores.values())
        return 100 * sum(s.filled for s in self.stores.values()) // max(slots, 1)


def folder_name(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def open_folder(root: Path, about: Mapping[str, Any], plan: Plan) -> Path:
    """The folder of records that depend on `about`, made on first use; it appears whole or not at all.

    Raises: UserError: it cannot be made, or holds something else.
    """
    folder = root / folder_name(about)
    text = json.dumps(about, sort_keys=True, indent=1)
    slots = plan.images * plan.variants
    sizes = {"index": slots * _ROW, "features": slots * plan.record}
    try:
        if not folder.exists():
            root.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=".unfinished_", dir=root))
            try:
                (unfinished / "about.json").write_text(text)
                for name, size in sizes.items():
                    with open(unfinished / name, "wb") as file:
                        file.truncate(size)  # takes space as it is filled
                unfinished.chmod(0o755)
                os.rename(unfinished, folder)
                sync_folder(root)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        if not whole or (folder / "about.json").read_text() != text:
            raise UserError(f"train.cache_dir: {folder} is not what this run would write there; remove it")
    except OSError as error:
        raise UserError(f"train.cache_dir: cannot write {folder}: {error.strerror}") from error
    return folder


def _shared(shape: tuple[int, ...]) -> np.ndarray:
    """Zero bytes that forked processes share; they take memory as they are written."""
    size = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size).reshape(shape)


def _sha256(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
