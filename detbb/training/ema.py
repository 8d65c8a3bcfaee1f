"""Exponential moving average of what is trained, and of nothing else.

e += (1 - d) (w - e) by `torch._foreach_lerp_`: exact where e equals w, unlike d e + (1 - d) w, which drifts by
rounding. A frozen tensor is never stored: its average is the tensor. Averages are kept in fp32 at least (a bf16 one
would stand still at d = 0.999). BN running statistics that move are averaged like weights, with the same decay; integer
buffers are not stored either: a view reads the live ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detbb.config.schema import EmaConfig
from detbb.detector import Detector
from detbb.freeze import averaged_names


class Ema:
    """The averages by state-dict name, and how often they were updated."""

    def __init__(self, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self.tensors: dict[str, Tensor] = {}
        self._live: list[Tensor] = []

    def follow(self, detector: Detector) -> None:
        """Average exactly what `detector` trains now; call it whenever that changes.

        Newly trained tensors start from their value, newly frozen ones are dropped (their average is the tensor from
        here on), and the update counter goes on.
        """
        state = detector.state_dict()
        self.tensors = {
            name: self.tensors[name].to(state[name].device) if name in self.tensors else _start(state[name])
            for name in averaged_names(detector)
        }
        self._live = [state[name] for name in self.tensors]

    def decay(self, update: int) -> float:
        """The decay of update number `update` (from 1): d (1 - exp(-update / warmup_steps))."""
        if self.config.warmup_steps == 0:
            return self.config.decay
        return self.config.decay * (1 - math.exp(-update / self.config.warmup_steps))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live tensors; once per optimizer step that was taken."""
        self.updates += 1
        averages = list(self.tensors.values())
        live = [w if w.dtype == e.dtype else w.to(e.dtype) for e, w in zip(averages, self._live, strict=True)]
        if averages:
            torch._foreach_lerp_(averages, live, 1 - self.decay(self.updates))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensors": dict(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take saved averages, from any device; call `follow` afterwards."""
        self.updates = int(state["updates"])
        self.tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}


def _start(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
