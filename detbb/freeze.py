"""The freeze rule, in one place.

A frozen part keeps every bit: its parameters need no gradient and hold none, it stays in eval mode through every
`.train()` (so norm statistics and dropout rest), and it is in no optimizer, no average and no DDP bucket. Nothing is
replaced: keys, ids and modules stay, so freezing is reversible. Everything else about freezing is derived from
`frozen_names` below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detbb.core.errors import UserError, nearest
from detbb.modeling.backbones.resnet import STEM
from detbb.modeling.norm import FrozenBatchNorm2d, has_running_stats, is_norm, norm_modules

if TYPE_CHECKING:
    from detbb.detector import Detector


@dataclass(frozen=True)
class NormRule:
    """The two norm switches of one part (MMDetection paper, Table 6), independent of freezing."""

    part: str  # submodule name
    fixed_statistics: bool  # norm_eval
    fixed_affine: bool  # not norm_affine


class FrozenTensorChanged(RuntimeError):
    """A tensor that this run promised not to touch is not what it was."""

    same_on_all_ranks = True  # as in errors.UserError


def resolve(detector: Detector, name: str, *, key: str = "freeze") -> list[tuple[str, nn.Module]]:
    """The submodules that a name in config key `key` stands for; `backbone.stem` is conv1 + bn1.

    Raises: UserError: no such submodule; lists the valid ones.
    """
    if name == "backbone.stem":
        return [(f"backbone.{n}", detector.backbone.get_submodule(n)) for n in STEM]
    modules = dict(detector.named_modules())
    if name and name in modules:
        return [(name, modules[name])]
    hint = nearest(name, [*modules, "backbone.stem"])
    raise UserError(
        f"{key}: {name!r} is not a submodule; valid are {', '.join(parts(detector))} and anything below them{hint}"
    )


def parts(detector: Detector) -> list[str]:
    """The submodules that reports and error messages speak of."""
    stages = [f"backbone.{stage}" for stage in detector.backbone.stages]
    neck = ["neck"] if any(True for _ in detector.neck.parameters()) else []
    return ["backbone", *stages, *neck, *(f"heads.{name}" for name in detector.heads)]


def apply(detector: Detector) -> None:
    """Set `requires_grad` by `detector.frozen` and the norm rules, and drop gradients of what is not trained."""
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_(name not in detector.always_fixed)
    for module in _frozen_modules(detector):
        module.requires_grad_(False)
    for rule, norm in _ruled_norms(detector):
        if rule.fixed_affine:
            norm.requires_grad_(False)
    for parameter in detector.parameters():
        if not parameter.requires_grad:
            parameter.grad = None  # a stale gradient would still be applied by the next optimizer step


def set_frozen_eval(detector: Detector) -> None:
    """Put what is frozen back into eval mode; called at the end of every `.train()`."""
    for module in _frozen_modules(detector):
        module.eval()
    for rule, norm in _ruled_norms(detector):
        if rule.fixed_statistics:
            norm.eval()


def frozen_names(detector: Detector) -> list[str]:
    """Every state-dict tensor that must not change while `detector.frozen` holds, in state-dict order.

    Parameters that are not trained, and buffers of frozen parts, of norms with fixed statistics, and of frozen norms.
    """
    inside = {id(m) for module in _frozen_modules(detector) for m in module.modules()}
    inside |= {id(norm) for rule, norm in _ruled_norms(detector) if rule.fixed_statistics}
    names = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    for prefix, module in detector.named_modules():
        if id(module) in inside or isinstance(module, FrozenBatchNorm2d):
            names |= {f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)}
    return [name for name in detector.state_dict() if name in names]


def averaged_names(detector: Detector) -> list[str]:
    """What an EMA averages: trained parameters, and statistics of norms that move.

    Other buffers are constants, such as masks of -inf, or a module's own business.
    """
    names = {f"{prefix}.{n}" for prefix, norm in norm_modules(detector) for n, _ in norm.named_buffers(recurse=False)}
    names |= dict(detector.named_parameters()).keys()
    names -= set(frozen_names(detector))
    return [n for n, t in detector.state_dict().items() if n in names and t.is_floating_point()]


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes (hex)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + b"\0" + flat.numpy().data).hexdigest()


def digests(state: dict[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    return {name: digest(state[name]) for name in names}


def changed(detector: Detector, expected: dict[str, str]) -> list[str]:
    """The tensors whose digest is not the expected one, in order."""
    state = detector.state_dict()
    return [name for name, value in expected.items() if name not in state or digest(state[name]) != value]


def frozen_in_train_mode(detector: Detector) -> list[str]:
    """Norms whose statistics are frozen and that are in train mode nevertheless."""
    frozen = set(frozen_names(detector))
    found = []
    for name, module in detector.named_modules():
        owns = {f"{name}.{n}" for n, _ in module.named_buffers(recurse=False)} & frozen
        if module.training and owns and has_running_stats(module):
            found.append(name)
    return found


def explain(detector: Detector, names: Sequence[str]) -> str:
    """One line for a FrozenTensorChanged: which tensors, and what such a change can come from."""
    modules = dict(detector.named_modules())
    in_train_mode = sorted(
        {n.rpartition(".")[0] for n in names if getattr(modules.get(n.rpartition(".")[0]), "training", False)}
    )
    statistics = [n for n in names if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    causes = []
    if in_train_mode:
        causes.append(f"{', '.join(in_train_mode[:3])} is in train mode: something called .train() on it")
    elif statistics:
        causes.append("running statistics moved: the norm was in train mode for a while")
    if len(statistics) < len(names):
        causes.append("a weight was written: an optimizer built elsewhere, an in-place edit, or a load_state_dict")
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"frozen but changed: {shown}; it can come from: {'; '.join(causes)}"


def _frozen_modules(detector: Detector) -> list[nn.Module]:
    return [module for name in detector.frozen for _, module in resolve(detector, name)]


def _ruled_norms(detector: Detector) -> Iterator[tuple[NormRule, nn.Module]]:
    for rule in detector.norm_rules:
        if rule.fixed_statistics or rule.fixed_affine:
            for module in detector.get_submodule(rule.part).modules():
                if is_norm(module):
                    yield rule, module
