"""Reads a pickle of NumPy arrays, such as Detectron2's weights, without running what it names."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch


class _Dtype:
    """Stands for `numpy.dtype` in a pickle: numbers and texts. An array of objects made of bytes would be pointers."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"numpy.dtype {code}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for `numpy.ndarray` in a pickle."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, columns_first, data = state
        self.array = _array(data, dtype, shape, "F" if columns_first else "C").array


def _array(data: Any, dtype: _Dtype, shape: tuple, order: Any, axes: tuple | None = None) -> _Array:
    made, flat = _Array(), np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.dtype)
    made.array = flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)
    return made


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays in plain containers, as in Detectron2's .pkl; what names anything else is refused.

    NumPy's own functions are not called: with other arguments than NumPy writes, they read any memory.
    """

    known: ClassVar[dict[tuple[str, str], Callable]] = {
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy._core.multiarray", "scalar"): lambda dtype, data: _array(data, dtype, (), "C"),
        ("numpy._core.numeric", "_frombuffer"): _array,
    }

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # NumPy 1's name
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return self.known[module, name]


def read_arrays(path: Path) -> Any:
    """What a pickle of NumPy arrays holds, as tensors; None if it holds anything else."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: convert(item) for name, item in value.items()}
        array = value.array if isinstance(value, _Array) else np.empty(0, "S")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if array.dtype.kind in "biuf" else value

    try:
        with path.open("rb") as file:
            return convert(_ArraysOnly(file, encoding="latin1").load())
    except Exception:  # bytes that are no pickle raise anything
        return None
