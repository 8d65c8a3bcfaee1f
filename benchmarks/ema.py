"""An update of the average against timm's ModelEmaV3 and torch.optim.swa_utils, and the memory it takes.

python benchmarks/ema.py                 # R50 with FPN and an FCOS head, all trained; then the head alone
python benchmarks/ema.py --repeats 50 --json ema.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timing
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detbb.config.schema import Config
from detbb.detector import build_detector
from detbb.heads import find_head
from detbb.training.ema import Ema

CASES = {"all trained": [], "head trained": ["backbone", "neck"]}
DECAY = 0.999


def mib(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def state(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def compare(case: str, frozen: list[str], options: Any) -> list[dict[str, Any]]:
    config = Config()
    config.heads = {"objects": find_head("fcos").Config(type="fcos", data="made")}
    detector = build_detector(config, {"objects": [f"class {i}" for i in range(80)]}).freeze(frozen).train()
    ours = Ema(detector, decay=DECAY)
    timm = ModelEmaV3(detector, decay=DECAY, foreach=True)
    swa = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    swa.update_parameters(detector)  # the first call copies
    updates = {
        "timm": lambda: timm.update(detector),
        "swa_utils": lambda: swa.update_parameters(detector),
        "detbb": ours.update,
    }
    seconds = timing.in_turn(updates, repeats=options.repeats, cpu_time=options.cpu_time)
    memory = {"timm": mib(state(timm.module)), "swa_utils": mib(state(swa.module)), "detbb": mib(ours.tensors.values())}
    rows = []
    for peer in ("timm", "swa_utils"):
        row = timing.row(f"{case}, {peer}", {peer: seconds[peer], "detbb": seconds["detbb"]})
        row["memory_mib"] = {name: memory[name] for name in (peer, "detbb")}
        rows.append(row)
        timing.show([row])
        print(
            f"    memory {memory[peer]:.1f} MiB and {memory['detbb']:.1f} MiB, {memory['detbb'] / memory[peer]:.2f} x"
        )
    return rows


def main() -> None:
    options = timing.arguments(__doc__ or "", repeats=31).parse_args()
    rows = [row for case, frozen in CASES.items() for row in compare(case, frozen, options)]
    timing.finish(options.json, rows)


if __name__ == "__main__":
    main()
