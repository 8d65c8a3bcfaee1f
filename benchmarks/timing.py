"""What the benchmarks share: candidates measured in turn, medians, a table, and JSON with the machine and versions."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def arguments(description: str, *, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each candidate")
    parser.add_argument("--cpu-time", action="store_true", help="CPU instead of wall time, for a machine that is busy")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    return parser


def in_turn(
    candidates: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 2, cpu_time: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call: A, B, A, B, …, so that a slow moment of the machine meets all candidates."""
    clock = time.process_time if cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warm_up, repeats):
        for name, function in candidates.items():
            began = clock()
            function()
            if turn >= 0:
                seconds[name].append(clock() - began)
    return seconds


def row(case: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians in ms with quartiles, and how many times faster the second candidate is: the median over the turns."""
    peer, ours = seconds.values()
    result: dict[str, Any] = {"case": case}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = {"median_ms": 1e3 * median, "quartiles_ms": [1e3 * low, 1e3 * high]}
    result["ratio"] = statistics.median(a / b for a, b in zip(peer, ours, strict=True))
    return result


def show(rows: list[dict[str, Any]]) -> None:
    """One line a row: medians with quartiles, and the ratio."""
    for line in rows:
        named = {k: v for k, v in line.items() if isinstance(v, dict) and "median_ms" in v}
        parts = [
            f"{name} {v['median_ms']:8.1f} ms [{v['quartiles_ms'][0]:.1f}, {v['quartiles_ms'][1]:.1f}]"
            for name, v in named.items()
        ]
        print(f"{line['case']:<44} {'   '.join(parts)}   {line['ratio']:.2f} x", flush=True)


def machine() -> dict[str, Any]:
    import torch

    names = ("torch", "torchvision", "numpy", "cv2", "albumentations")
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.import_module(name).__version__ for name in names},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def finish(path: Path | None, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write `rows` and the machine, if a path was given."""
    if path is not None:
        path.write_text(json.dumps({"rows": rows, "machine": machine(), **more}, indent=1) + "\n")
