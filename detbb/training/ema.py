"""Exponential moving average of what is trained, and of nothing else.

e += (1 - d) (w - e) by `torch._foreach_lerp_`: exact where e equals w, unlike d e + (1 - d) w, which drifts by
rounding. A frozen tensor is never stored: its average is the tensor. Averages are kept in fp32 at least (a bf16 one
would not move at d = 0.999). BN running statistics that move are averaged like weights. Integer buffers are not stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detbb.core.errors import UserError
from detbb.freeze import averaged_names


class Ema:
    """The averages of what a module trains, by state-dict name, and how often they were updated.

        ema = detbb.Ema(model, decay=0.9998, warmup_steps=2000)
        ...
        optimizer.step()
        ema.update()

    Give it the module itself, not a DDP around it. Evaluate with `detbb.detector.view(model, ema.tensors)`.
    Raises: UserError: `decay` is not in [0, 1), or `warmup_steps` is negative.
    """

    def __init__(self, module: nn.Module, *, decay: float, warmup_steps: int = 0) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema.decay: {decay!r} is not valid; valid is at least 0 and below 1")
        if not warmup_steps >= 0:
            raise UserError(f"ema.warmup_steps: {warmup_steps!r} is not valid; valid is 0 or more")
        self.module = module
        self.decay, self.warmup_steps = decay, warmup_steps
        self.updates = 0
        self.tensors: dict[str, Tensor] = {}
        self.follow()

    def follow(self) -> None:
        """Average exactly what the module trains now; call it after freezing, and after a move to another device.

        Newly trained tensors start from their value, newly frozen ones are dropped (their average is the tensor), and
        the update counter goes on.
        """
        state = self.module.state_dict()
        self._owners = _owners(self.module)
        self.tensors = {
            name: self.tensors[name].to(state[name].device) if name in self.tensors else _first_average(state[name])
            for name in averaged_names(self.module)
        }

    def decay_at(self, update: int) -> float:
        """The decay of update number `update` (from 1): d (1 - exp(-update / warmup_steps))."""
        return self.decay * (1 - math.exp(-update / self.warmup_steps) if self.warmup_steps else 1)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live tensors; once per optimizer step that was taken."""
        self.updates += 1
        # Read from the modules each time, since `.to()` and assignments replace tensors.
        owned = [(*self._owners[name], average.dtype) for name, average in self.tensors.items()]
        live = [getattr(owner, own).to(dtype) for owner, own, dtype in owned]
        if live:
            torch._foreach_lerp_(list(self.tensors.values()), live, 1 - self.decay_at(self.updates))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensors": dict(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take saved averages, from any device; call `follow` if other tensors are trained now.

        Raises: UserError: the module has no such tensors.
        """
        own = self.module.state_dict()
        if wrong := [n for n, t in state["tensors"].items() if n not in own or own[n].shape != t.shape]:
            raise UserError(f"ema: the saved average of {wrong[0]} does not fit the module")
        self.updates = int(state["updates"])
        self.tensors = {name: tensor.to(own[name].device, copy=True) for name, tensor in state["tensors"].items()}


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module that holds each parameter and buffer, and its name there."""
    return {
        name: (owner, name.rpartition(".")[2])
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for name, _ in (
            *owner.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *owner.named_buffers(prefix, recurse=False, remove_duplicate=False),
        )
    }


def _first_average(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
