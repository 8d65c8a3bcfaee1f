"""Parameter groups and update rule; the learning rate as a pure function of the step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detbb.config.schema import OptimizerConfig, ScheduleConfig
from detbb.core.doors import lookup
from detbb.core.errors import UserError
from detbb.freeze import tensors_of
from detbb.modeling.norm import is_norm

Schedule = Callable[[int, ScheduleConfig, int], float]  # (step from 0, its config, steps of the run) -> a factor
Groups = list[dict[str, Any]]


def _sgd(groups: Groups, config: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    if config.momentum:
        # Zeros give the same first step as no buffer; the fused kernel needs buffers for all parameters or none.
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for g in sgd.param_groups for p in g["params"]})
    return sgd


def _adamw(groups: Groups, config: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=fused)


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda step, schedule, total_steps: 1.0,
    "cosine": lambda step, schedule, total_steps: 0.5 * (1 + math.cos(math.pi * step / total_steps)),
    "multistep": lambda step, schedule, total_steps: schedule.gamma ** bisect.bisect_right(schedule.milestones, step),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}


def find_schedule(name: str) -> Schedule:
    """A name in `SCHEDULES`, or `package.module:function`. Raises: UserError: there is none."""
    what = "function (step, schedule config, total steps) -> factor"
    return lookup(SCHEDULES, name, key="schedule.type", check=callable, what=what)


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """A name in `OPTIMIZERS`, or `package.module:function`. Raises: UserError: there is none."""
    what = "function (parameter groups, optimizer config, *, fused) -> torch.optim.Optimizer"
    return lookup(OPTIMIZERS, name, key="optimizer.type", check=callable, what=what)


def lr_factor(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """What the learning rate is multiplied by in step number `step` (from 0).

    Warm-up rises linearly from 1/1000 to 1 over `warmup_steps` and multiplies the rest.
    """
    warm = 1e-3 + (1 - 1e-3) * step / schedule.warmup_steps if step < schedule.warmup_steps else 1.0
    return warm * find_schedule(schedule.type)(step, schedule, total_steps)


def lr_by_name(detector: nn.Module, lr_mult: Mapping[str, float]) -> dict[str, float]:
    """Each parameter's factor: that of the longest submodule name in `lr_mult` that holds it, or 1.

    Raises: UserError: a name is not a submodule.
    """
    factors = dict.fromkeys(dict(detector.named_parameters()), 1.0)
    for key in sorted(lr_mult, key=len):
        factors |= dict.fromkeys(tensors_of(detector, key, key="optimizer.lr_mult") & factors.keys(), lr_mult[key])
    return factors


def decay_by_name(detector: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Weight decay by parameter: `norm_weight_decay` for those of norms, biases and vectors, else `weight_decay`."""
    decays: dict[str, float] = {}
    for prefix, module in detector.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm_like = is_norm(module) or name == "bias" or parameter.ndim < 2
            decays[f"{prefix}.{name}"] = config.norm_weight_decay if norm_like else config.weight_decay
    return decays


def build_optimizer(detector: nn.Module, config: OptimizerConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters alone; groups carry `names`, `lr_mult` and `weight_decay`."""
    decays, factors = decay_by_name(detector, config), lr_by_name(detector, config.lr_mult)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            key = (factors[name], decays[name])
            group = groups.setdefault(key, {"params": [], "names": [], "lr_mult": key[0], "weight_decay": key[1]})
            group["params"].append(parameter)
            group["names"].append(name)
    return find_optimizer(config.type)(list(groups.values()), config, fused=fused)


def state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Each parameter's optimizer state (momentum, moments, step count) by parameter name."""
    return {
        name: dict(optimizer.state[parameter])
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def load_state_by_name(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Give parameters the state saved under their name; the others start without one."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in state:
                optimizer.state[parameter] = {k: _placed(v, parameter) for k, v in state[name].items()}


def check_state(detector: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if a saved state does not fit its parameter."""
    for name, parameter in detector.named_parameters():
        for value in state.get(name, {}).values():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
                raise UserError(f"checkpoint: the optimizer state of {name} has shape {shapes}")


def _placed(value: Any, parameter: Tensor) -> Any:
    """Moments follow their parameter's device and layout; step counts of fused optimizers its device."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(parameter.device, copy=True)
