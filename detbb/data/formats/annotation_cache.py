"""The arrays that one file became, kept for the next start.

An entry is a JSON header and the arrays as they are, each at a multiple of 64 bytes. It is used if the file is the one
it was made from, the code is the one that made it, and every byte has its checksum; anything else means to read again.
Arrays are read and not mapped: a map of a file that another machine replaces would end the run with a bus error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import detbb
from detbb.core.errors import UserError
from detbb.core.files import write_atomically
from detbb.structures.annotations import Annotations, Fault, PackedStrings, Segments

FROM_S = 1.0  # readings that took longer are remembered
SETTLED_S = 2.0  # since the file's last change: within one tick of a clock, another change would not show
ROOM = 5  # times an entry's size must be free
LEFT_S = 600.0  # since when a file half written is one that a killed process left
UNUSED_S = 30 * 86400.0  # since when an entry is forgotten
_ALIGNED = 64
_START = struct.Struct("<8sII")  # what it is, the header's length and its checksum
_MAGIC = b"detbb\0\r\n"
_CODE = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))  # that reads
_KINDS = {kind.__name__: kind for kind in (Annotations, Fault, PackedStrings, Segments)}


def cache_folder() -> Path:
    """Where findings about data are kept; it need not be there, nor can it always be made."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "detbb", "data")
    except RuntimeError:  # a user without a home
        return Path(os.devnull, "detbb")


class Remembered:
    """What reading `file` with `options` gave. Another state of the file replaces it: there is one entry for both."""

    def __init__(self, file: Path, options: object) -> None:
        key = repr((os.path.abspath(file), options)).encode("utf-8", "backslashreplace")
        self._path = cache_folder() / f"{hashlib.blake2b(key, digest_size=16).hexdigest()}.arrays"
        self._file, self._began, self._clock = file, time.time(), time.perf_counter()
        self._of: dict[str, Any] = {"version": [detbb.__version__, _CODE], "state": _state(file)}

    def recall(self, root: Path) -> Annotations | None:
        """As it was read, with images below `root`; None if there is nothing that can be used."""
        try:
            content = np.fromfile(self._path, np.uint8)
            os.utime(self._path)  # it is in use
        except OSError:
            return None
        magic, length, checksum = _START.unpack(content[: _START.size].tobytes().ljust(_START.size, b"\0"))
        text = content[_START.size : _START.size + length].tobytes()
        if magic != _MAGIC or zlib.crc32(text) != checksum:
            return None
        header, first = json.loads(text), _padded(_START.size + length)
        if header["of"] != self._of or len(content) != first + header["size"]:
            return None
        try:
            return replace(_unpack(header["data"], content, first), root=root)
        except _DamagedError:
            return None

    def remember(self, data: Annotations) -> None:
        """Keep what was read since this was made. A thread writes; the process's end waits for it, a second or so."""
        changed_s = max(self._of["state"][2:], default=math.inf) * 1e-9
        slow, settled = time.perf_counter() - self._clock > FROM_S, self._began - changed_s > SETTLED_S
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes on this machine
        if first and slow and settled and _state(self._file) == self._of["state"]:
            with suppress(RuntimeError):  # no further thread is to be had
                threading.Thread(target=self._write, args=(data,), name="remember").start()

    def _write(self, data: Annotations) -> None:
        arrays: list[np.ndarray] = []
        folder = self._path.parent
        try:
            packed = _pack(data, arrays)
            header = {"of": self._of, "size": sum(_padded(a.nbytes) for a in arrays), "data": packed}
            text = json.dumps(header).encode()
            folder.mkdir(parents=True, exist_ok=True)
            _tidy(folder, ".*.arrays.*.tmp", LEFT_S)
            _tidy(folder, "*.arrays", UNUSED_S)
            if shutil.disk_usage(folder).free > ROOM * int(header["size"]):
                start = _START.pack(_MAGIC, len(text), zlib.crc32(text)) + text
                write_atomically(self._path, lambda file: _write_all(file, start, arrays))
        except (OSError, TypeError, ValueError, UserError):  # nowhere to write to: the next start takes as long
            return


class _DamagedError(Exception):
    """Bytes that are not those written."""


def _tidy(folder: Path, pattern: str, age_s: float) -> None:
    for left in folder.glob(pattern):
        with suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > age_s:
                left.unlink()


def _state(file: Path) -> list[int]:
    """What changes whenever the file does; nothing without one."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return []
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _pack(value: Any, arrays: list[np.ndarray]) -> Any:
    """`value` in JSON's types, its arrays in `arrays`."""
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value))
        return {"dtype": value.dtype.str, "shape": value.shape, "crc32": zlib.crc32(arrays[-1].data)}
    if type(value) in _KINDS.values():
        return {"kind": type(value).__name__, "fields": {n: _pack(v, arrays) for n, v in vars(value).items()}}
    if isinstance(value, tuple):
        return [_pack(item, arrays) for item in value]
    return None if isinstance(value, Path) else value  # the caller says where images are


def _unpack(value: Any, content: np.ndarray, first: int) -> Any:
    """What `_pack` packed; its arrays begin at `first`."""
    place = first

    def made(value: Any) -> Any:
        nonlocal place
        if isinstance(value, list):
            return tuple(map(made, value))
        if not isinstance(value, dict):
            return value
        if "kind" in value:
            whole = object.__new__(_KINDS[value["kind"]])
            vars(whole).update({name: made(field) for name, field in value["fields"].items()})
            return whole
        array = np.ndarray(value["shape"], value["dtype"], content.data, place)
        if zlib.crc32(array.data) != value["crc32"]:
            raise _DamagedError
        place += _padded(array.nbytes)
        return array

    return made(value)


def _write_all(file: BinaryIO, start: bytes, arrays: list[np.ndarray]) -> None:
    file.write(start.ljust(_padded(len(start)), b"\0"))
    for array in arrays:
        file.write(array.data)
        file.write(bytes(-array.nbytes % _ALIGNED))


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
