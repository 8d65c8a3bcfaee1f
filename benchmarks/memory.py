"""Peak memory of training steps with the whole backbone frozen against torchvision's, each in its own process.

    python benchmarks/memory.py                       # R50 FCOS, 512 x 512, batch 2
    python benchmarks/memory.py --arch resnet18 --json memory.json

`cache`: the frozen levels come from the feature cache, so the backbone is not computed. MiB above what imports take.
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


def peak(way: str, options: Any) -> float:
    """MiB at most in use during three steps; for a process of its own."""
    import gc

    import train_step

    from detbb.data.batch import Given

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    batch = train_step.made_batch(options.size, options.batch)
    before = status("VmRSS")
    if way == "torchvision":
        model = train_step.reference(options.arch, options.head, trainable=0, size=options.size)
        step = train_step.reference_step(model, batch)
    else:
        model = train_step.reference(options.arch, options.head, trainable=0, size=options.size)
        made = train_step.learner(options.arch, options.head, ["backbone"], model)
        del model
        if way == "detbb, cache":
            made.prefix, prefix = None, made.prefix  # still there, as in a run, for images that are not stored yet
            stored = prefix(batch).given.levels
            batch.given = Given(prefix.after, {name: level.clone() for name, level in stored.items()})
        step = train_step.step_of(made, batch)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: building is not training
    for _ in range(3):
        step()
    return status("VmHWM") - before


def main() -> None:
    parser = timing.arguments(__doc__ or "", repeats=3)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--head", default="fcos", choices=["fcos", "retinanet"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="measure this one alone, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(peak(options.way, options)))
        return
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [{"case": way, "peak_mib": statistics.median(found[way])} for way in WAYS]
    for row in rows:
        row["ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
        print(f"{row['case']:<14} {row['peak_mib']:8.0f} MiB   {row['ratio']:.2f} x")
    timing.finish(options.json, rows)


if __name__ == "__main__":
    main()
