"""The arrays that one annotation file became, kept for the next start.

An entry is used if the file is, as far as its status tells, the one it was made from.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detbb.core import cache
from detbb.structures.annotations import Annotations, Fault, PackedStrings, Segments

SETTLED_S = 2.0  # since the file's last change: within one tick of a clock, another change would not show
_KINDS = {kind.__name__: kind for kind in (Annotations, Fault, PackedStrings, Segments)}


class AnnotationCache:
    """What reading `file` with `options` gave. Another state of the file replaces it: there is one entry for both."""

    def __init__(self, file: Path, options: object) -> None:
        self._name = cache.key(os.path.abspath(file), options)
        self._file, self._began, self._clock = file, time.time(), time.perf_counter()
        self._state = _state(file)

    def load(self, root: Path) -> Annotations | None:
        """As it was read, with images below `root`; None if there is nothing that can be used."""
        if (found := cache.load(self._name, self._state)) is None:
            return None
        return replace(_unpack(found[1], found[0]), root=root)

    def store(self, data: Annotations) -> None:
        """Keep what was read since this was made. A thread writes; the process's end waits for it, a second or so."""
        slow = time.perf_counter() - self._clock > cache.SLOW_S
        settled = bool(self._state) and self._began - max(self._state[2:]) * 1e-9 > SETTLED_S
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes on this machine
        if first and slow and settled and _state(self._file) == self._state:
            arrays: dict[str, np.ndarray] = {}
            options = {"arrays": arrays, "data": _pack(data, "", arrays)}
            arguments = (self._name, self._state)
            with suppress(RuntimeError):  # no further thread is to be had
                threading.Thread(target=cache.store, args=arguments, kwargs=options, name="annotation cache").start()


def _state(file: Path) -> list[int]:
    """What changes whenever the file does; empty without one."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return []
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """`value` in JSON's types, with its arrays in `arrays`, by names that begin with `name`."""
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {"array": name}
    if type(value) in _KINDS.values():
        fields = {n: _pack(v, f"{name}.{n}".lstrip("."), arrays) for n, v in vars(value).items()}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, tuple):
        return [_pack(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
    return None if isinstance(value, Path) else value  # the caller says where images are


def _unpack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return tuple(_unpack(item, arrays) for item in value)
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    whole = object.__new__(_KINDS[value["kind"]])
    vars(whole).update({name: _unpack(field, arrays) for name, field in value["fields"].items()})
    return whole
