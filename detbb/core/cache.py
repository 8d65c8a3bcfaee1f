"""What was found once, kept for the next start in `$XDG_CACHE_HOME/detbb/data` (`~/.cache/detbb/data`).

An entry is a safetensors file: arrays, with what they were made from and a checksum over everything in its metadata. An
entry that is not whole, or of something else, is no entry; and where nothing can be written, nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from detbb.core.errors import UserError
from detbb.core.files import write_atomically

SLOW_S = 1.0  # work that took longer is worth an entry
ROOM = 5  # times an entry's size must be free on the disk
UNFINISHED_S = 600.0  # a file or folder that is unfinished for so long was left by a killed process
UNUSED_S = 30 * 86400.0
_DTYPES = {"BOOL": "|b1", "U8": "|u1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}  # safetensors, NumPy
FOLDERS_FILE = "features.safetensors"  # all that a folder among the entries holds
_OUR_FILE = re.compile(r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{32}\.safetensors\.[0-9a-f]{8}\.tmp")
_OUR_FOLDER = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.[0-9a-f]{8}")  # unfinished ones begin with a dot


def cache_folder() -> Path | None:
    """Where entries are kept, which need not be there yet; None for a user without a home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return folder / "detbb" / "data" if folder.is_absolute() else None


@functools.cache
def code_digest() -> str:
    """SHA-256 of this package's code. Entries that other code made are not used."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def key(*parts: object) -> str:
    """A file name of 32 digits that follows from all parts: arrays by their bytes, anything else by its `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def load(name: str, made_from: object) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays and the data of an entry; None if there is none, it is damaged, or made by other code or from another.

    The file is read, not mapped: a map of a file that another machine replaces would end the run with a bus error.
    """
    if (folder := cache_folder()) is None:
        return None
    path = folder / f"{name}.safetensors"
    try:
        content = np.fromfile(path, np.uint8)
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        entries = json.loads(content[8:start].tobytes())
        about = entries.pop("__metadata__")
        arrays = {n: _array(content[start:], **entry) for n, entry in entries.items()}
        if about.pop("sha256") != _checksum(about, arrays) or about["made_from"] != _made_from(made_from):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged header can be anything
        return None
    with suppress(OSError):  # a cache that can only be read
        os.utime(path)  # marks the entry as used
    return arrays, json.loads(about["data"])


def store(name: str, made_from: object, *, arrays: Mapping[str, np.ndarray], data: object = None) -> None:
    """Keep arrays and data (of JSON's types) under `name`, if they can be kept; replaces what was there."""
    if (folder := cache_folder()) is None:
        return
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)  # so that all are aligned
    arrays = {name: np.ascontiguousarray(array) for name, array in ordered}
    about = {"made_from": _made_from(made_from), "data": json.dumps(data)}
    start = header(arrays, about | {"sha256": _checksum(about, arrays)})
    with suppress(OSError, UserError):  # nowhere to write to: the next start takes as long
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        if shutil.disk_usage(folder).free > ROOM * sum(array.nbytes for array in arrays.values()):
            parts: list[Any] = [start, *(array.data for array in arrays.values())]
            write_atomically(folder / f"{name}.safetensors", lambda file: file.writelines(parts))


def tidy(folder: Path) -> None:
    """Remove the unfinished entries of killed processes, and entries that were not used for 30 days; nothing else."""
    for path in folder.iterdir():
        with suppress(OSError):  # another process was faster
            age_s = time.time() - path.stat().st_mtime
            if age_s <= (UNFINISHED_S if path.name.startswith(".") else UNUSED_S):
                continue
            if path.is_file() and _OUR_FILE.fullmatch(path.name):
                path.unlink()
            elif _OUR_FOLDER.fullmatch(path.name) and os.listdir(path) == [FOLDERS_FILE]:
                shutil.rmtree(path)


def header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file; those of the arrays follow, in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    names, end = {dtype: name for name, dtype in _DTYPES.items()}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": names[array.dtype.str], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _made_from(what: object) -> str:
    return json.dumps([code_digest(), what])


def _array(data: np.ndarray, *, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    """The array that a header's entry describes, as a view of the bytes after the header."""
    return data[slice(*data_offsets)].view(_DTYPES[dtype]).reshape(shape)


def _checksum(about: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
