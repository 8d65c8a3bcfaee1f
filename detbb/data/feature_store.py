"""Stored features by image and view: what the feature cache writes and data workers look up.

Nothing stale is ever read: an entry counts only where the SHA-256 of the image file, as it is now, and that of the
stored bytes are those of its row in the index. So a kill, a full disk or another process leaves nothing to repair.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from detbb.core import cache
from detbb.core.errors import UserError
from detbb.core.files import make_folder
from detbb.data.sample import SampleReader
from detbb.structures.batch import CacheEntry

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
    def slots(self) -> int:
        return self.images * self.variants

    @property
    def record(self) -> int:
        """The bytes of all levels of one image."""
        return sum(h * w * c for h, w, c in self.levels.values()) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """What the records of all images take, at most."""
        return self.slots * (self.record + _ROW)


class Store:
    """The records of one source in a memory-mapped file; all processes of a machine see what one of them adds."""

    def __init__(self, plan: Plan, folder: Path | None = None) -> None:
        """folder: what `open_folder` gave; None: a file without a name, gone with the process however that ends."""
        self.plan = plan
        if folder is None:
            self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 the maps live as long as the store
            _lay_out(self._file, plan, "")
        else:
            self._file = open(folder / cache.FOLDERS_FILE, "r+b")  # noqa: SIM115
        self._file.seek(0)
        start = 8 + int.from_bytes(self._file.read(8), "little")
        self._index = np.memmap(self._file, np.uint8, "r+", start, (plan.slots, _ROW))
        self._first = start + self._index.nbytes
        # (slots, bytes of a record) uint8
        self.records = torch.from_numpy(np.memmap(self._file, np.uint8, "r+", self._first, (plan.slots, plan.record)))
        self._trusted = _shared(plan.slots, 1)[:, 0]  # records that this run wrote or verified
        self._files = _shared(plan.images, 4 * 8 + 32)  # of files seen in this run: size, times, inode; SHA-256
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
            stored = self._trusted[slot] = row[32:] == _sha256(image, self.records[slot].numpy().data)
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
        if not self.full:
            row = entry.image_sha256 + _sha256(entry.image_sha256, record.numpy().data)
            self._index[entry.slot] = np.frombuffer(row, np.uint8)
            self._trusted[entry.slot] = True
        return record

    def _write(self, slot: int, record: np.ndarray) -> bool:
        """Whether the record could be written; not through the map, where a full disk would end the process."""
        try:
            place = self._first + slot * self.plan.record
            return os.pwrite(self._file.fileno(), record.data, place) == self.plan.record
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


def open_folder(root: Path, about: str, plan: Plan) -> Path:
    """The folder of records that depend on `about`, made on first use; it appears whole or not at all.

    Raises: UserError: it cannot be made, or holds something else.
    """
    folder, start = root / cache.key(about), _header(plan, about)

    def fill(unfinished: Path) -> None:
        with open(unfinished / cache.FOLDERS_FILE, "wb") as file:
            _lay_out(file, plan, about)

    try:
        make_folder(folder, fill)
        os.utime(folder)  # marks it as used
        cache.tidy(root)
        with open(folder / cache.FOLDERS_FILE, "r+b") as file:
            whole = file.read(len(start)) == start and file.seek(0, os.SEEK_END) == len(start) + plan.bytes
    except OSError as error:
        raise UserError(f"train.cache_dir: cannot write {folder}: {error.strerror}") from error
    if not whole:
        raise UserError(f"train.cache_dir: {folder} is not what this run would write there; remove it")
    return folder


def _header(plan: Plan, about: str) -> bytes:
    sizes = {"index": _ROW, "features": plan.record}
    arrays = {name: np.broadcast_to(np.uint8(0), (plan.slots, size)) for name, size in sizes.items()}
    return cache.header(arrays, {"about": about})


def _lay_out(file: IO[bytes], plan: Plan, about: str) -> None:
    """Make `file` hold no record yet; it takes space as it is filled."""
    start = _header(plan, about)
    file.write(start)
    file.truncate(len(start) + plan.bytes)
    file.flush()


def _shared(rows: int, size: int) -> np.ndarray:
    """(rows, size) zero bytes that forked workers share; they take memory as they are written."""
    return np.frombuffer(mmap.mmap(-1, max(rows * size, 1)), np.uint8, rows * size).reshape(rows, size)


def _sha256(*parts: bytes | memoryview) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()
