"""Peak memory of training steps with the whole backbone frozen against torchvision's, each in its own process.

    python benchmarks/memory.py                       # R50 FCOS and RetinaNet, 512 x 512, batch 2
    python benchmarks/memory.py --arch resnet18 --json memory.json

`cache`: the frozen levels come from the feature cache, which holds them all. MiB above what imports take.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timing

WAYS = ("torchvision", "detbb", "detbb, cache")


def peak(way: str, head: str, options: Any) -> float:
    """MiB at most in use during three steps; for a process of its own."""
    import gc

    import torch
    import train_step

    from detbb.data.feature_store import Plan, Store
    from detbb.feature_cache.cache import RELEASE_AFTER, FeatureCache
    from detbb.structures.batch import CacheEntry

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    batch = train_step.made_batch(options.size, options.batch)
    before = status("VmRSS")
    if way == "torchvision":
        model = train_step.reference(options.arch, head, trainable=0, size=options.size)
        step = train_step.reference_step(model, batch)
    else:
        model = train_step.reference(options.arch, head, trainable=0, size=options.size)
        made = train_step.make_state(options.arch, head, ["backbone"], model)
        del model
        if way == "detbb, cache":
            prefix = made.prefix
            shapes = {n: (*level.shape[2:], level.shape[1]) for n, level in prefix(batch).precomputed.levels.items()}
            plan = Plan(options.batch, 1, (options.size, options.size), shapes, torch.float32)
            made.prefix = FeatureCache(prefix, {batch.source: Store(plan)})
            batch.entries = tuple(CacheEntry(slot, bytes(range(32)), is_stored=False) for slot in range(options.batch))
            made.prefix(batch)
            batch.images, batch.entries = batch.images[:0], tuple(e._replace(is_stored=True) for e in batch.entries)
            for _ in range(RELEASE_AFTER):
                made.prefix(batch)
        step = train_step.step_of(made, batch)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: building is not training
    for _ in range(3):
        step()
    return status("VmHWM") - before


def main() -> None:
    parser = timing.arguments(__doc__ or "", repeats=3)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--head", nargs="+", default=["fcos", "retinanet"], choices=["fcos", "retinanet"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="measure this one alone, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(peak(options.way, options.head[0], options)))
        return
    rows = [row for head in options.head for row in compare(head, options)]
    timing.finish(options.json, rows)


def compare(head: str, options: Any) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--head", head, "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for way, values in found.items():
        peak_mib = statistics.median(values)
        ratio = peak_mib / statistics.median(found[WAYS[0]])
        rows.append({"case": f"{head}, {way}", "peak_mib": peak_mib, "from": min(values), "to": max(values)})
        rows[-1]["ratio"] = ratio
        print(f"{rows[-1]['case']:<26} {peak_mib:6.0f} MiB [{min(values):.0f}, {max(values):.0f}]   {ratio:.2f} x")
    return rows


if __name__ == "__main__":
    main()
