"""The freeze rule, in one place, for any module: the trainer's own code, and a library for other loops.

A frozen part keeps every bit: its parameters need no gradient and hold none, it stays in eval mode through every
`.train()` (so norm statistics and dropout rest), and it is in no optimizer, no average and no DDP bucket. Nothing is
replaced: keys, ids and modules stay, so freezing is reversible. Everything else about freezing is derived from
`frozen_names` below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from detbb.core.errors import UserError, nearest, some
from detbb.modeling.norm import has_running_stats, is_norm, norm_modules

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class NormRule:
    """The two norm switches of one part (MMDetection paper, Table 6), independent of freezing."""

    part: str  # submodule name
    fixed_statistics: bool  # norm_eval
    fixed_affine: bool  # not norm_affine


@dataclass(frozen=True)
class Freezing:
    """What was asked for, and which parameters `freeze` switched off itself: others that are off are the user's own."""

    names: tuple[str, ...] = ()
    norm_rules: tuple[NormRule, ...] = ()
    switched_off: frozenset[str] = frozenset()


class Freezable(nn.Module):
    """A module whose frozen parts stay in eval mode; `freeze` makes one of any module."""

    _freezing = Freezing()

    def train(self, mode: bool = True) -> Self:
        """As in torch, but frozen parts and norms with fixed statistics stay in eval mode."""
        super().train(mode)
        set_frozen_eval(self)
        return self


class FrozenTensorChanged(RuntimeError):
    """A frozen tensor changed."""

    same_on_all_ranks = True  # as in errors.UserError


def freeze(module: AnyModule, names: Sequence[str], *, norm_rules: Sequence[NormRule] | None = None) -> AnyModule:
    """`module`, with exactly these submodules frozen; everything else is trained.

        detbb.freeze(model, ["backbone.stem", "neck"])

    It holds through `.train()`, `copy.deepcopy` and pickling. A parameter that the user switched off stays off until
    the user switches it on. Build the optimizer and wrap in DDP after this call: DDP reduces only what was trained when
    it was built. What a call on a module inside `module` froze stays frozen. norm_rules: None keeps those given before.

    Raises: UserError: a name is not a submodule (lists the valid ones), or the module is a DDP, scripted or itself
    parametrized; then nothing is changed.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise UserError("freeze: DDP reduces what was trained when it was made; freeze its .module, and wrap that anew")
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError("freeze: a scripted module cannot be given another class; freeze it before torch.jit.script")
    if is_parametrized(module) and not isinstance(module, Freezable):
        raise UserError("freeze: the module itself is parametrized; freeze it first, or freeze a module that holds it")
    before, after = _freezing(module), _freezing(module, names)
    if norm_rules is not None:
        after = replace(after, norm_rules=tuple(norm_rules))
    fixed = _fixed_parameters(module, after)
    rested = _held(module, replace(before, names=()), "fixed_statistics")
    for name in before.names:
        with suppress(UserError):  # a part that was frozen may have been replaced since
            rested += [part for _, part in resolve(module, name)]
    switched_off = set()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or name in before.switched_off:
            parameter.requires_grad_(id(parameter) not in fixed)
            if id(parameter) in fixed:
                switched_off.add(name)
        if not parameter.requires_grad:
            parameter.grad = None  # a stale gradient would still be applied by the next optimizer step
    _make_freezable(module)._freezing = replace(after, switched_off=frozenset(switched_off))
    for part in rested:
        part.train(module.training)
    set_frozen_eval(module)
    return module


def set_frozen_eval(module: nn.Module) -> None:
    """Put what is frozen back into eval mode; called at the end of every `.train()`."""
    for part in _held(module, _freezing(module), "fixed_statistics"):
        part.eval()


def rest_all(module: AnyModule) -> AnyModule:
    """`module` in eval mode with every gradient switched off, until the next `freeze`."""
    trained = trained_names(module)
    told = _freezing(module)
    _make_freezable(module)._freezing = replace(told, switched_off=told.switched_off.union(trained))
    return module.requires_grad_(False).eval()


def resolve(module: nn.Module, name: str, *, key: str = "freeze") -> list[tuple[str, nn.Module]]:
    """The submodules that a name in config key `key` stands for: one, or the members of an alias.

    Raises: UserError: no such submodule; lists the valid ones.
    """
    aliases = _aliases(module)
    with suppress(AttributeError):
        if name:
            return [(path, module.get_submodule(path)) for path in aliases.get(name, [name])]
    hint = nearest(name, [*dict(module.named_modules()), *aliases])
    valid = f"valid are {', '.join(parts(module))} and anything below them"
    raise UserError(f"{key}: {name!r} is not a submodule; {valid}{hint}")


def parts(module: nn.Module) -> list[str]:
    """The submodules that reports and error messages speak of.

    Its children, each member of a ModuleDict, and the stages of a child that has `aliases`.
    """
    found: list[str] = []
    for name, child in module.named_children():
        aliases = getattr(child, "aliases", None)
        if isinstance(child, nn.ModuleDict):
            found += [f"{name}.{member}" for member in child]
        elif _has_tensors(child):
            found.append(name)
            if isinstance(aliases, Mapping):
                inside = set(chain(*aliases.values()))
                stages = [n for n, stage in child.named_children() if n not in inside and _has_tensors(stage)]
                found += [f"{name}.{stage}" for stage in (*aliases, *stages)]
    return found


def part_of(name: str, aliases: Mapping[str, Sequence[str]] = {}) -> str:
    """The part of a detector that a tensor belongs to: `backbone.<stage>`, `neck` or `heads.<name>`.

    aliases: of its backbone.
    """
    first, second, *_ = name.split(".")
    if first == "backbone":
        second = next((alias for alias, members in aliases.items() if second in members), second)
    return f"{first}.{second}" if first in ("backbone", "heads") else first


def tensors_of(module: nn.Module, name: str, *, key: str = "freeze") -> set[str]:
    """The state-dict names below a name as `resolve` takes it. Raises: UserError: no such submodule."""
    return {f"{prefix}.{n}" for prefix, m in resolve(module, name, key=key) for n in m.state_dict()}


def trained_names(module: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """The parameters that are trained now, or that would be with `names` frozen, in the order of `parameters()`."""
    if names is None:
        return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    told = _freezing(module, names)
    fixed = _fixed_parameters(module, told)
    named = module.named_parameters()
    return [n for n, p in named if id(p) not in fixed and (p.requires_grad or n in told.switched_off)]


def frozen_names(module: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Every state-dict tensor that must not change now, or that must not with `names` frozen, in state-dict order.

        detbb.frozen_names(model)

    Parameters that are not trained or that are of a frozen part, even if something switched their gradient on again;
    and buffers of frozen parts, of norms with fixed statistics, and of frozen norms.
    """
    parameters, told = dict(module.named_parameters()), _freezing(module, names)
    trained = {id(parameters[name]) for name in trained_names(module, names)} - _fixed_parameters(module, told)
    found = {n for n, p in module.named_parameters(remove_duplicate=False) if id(p) not in trained}
    eval_only = {id(m) for part in _held(module, told, "fixed_statistics") for m in part.modules()}
    for prefix, m in module.named_modules(remove_duplicate=False):
        if id(m) in eval_only or isinstance(m, FrozenBatchNorm2d):
            found |= {name for name, _ in m.named_buffers(prefix, recurse=False)}
    return [name for name in module.state_dict() if name in found]


def averaged_names(module: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """What an EMA averages now, or with `names` frozen: trained parameters, and statistics of norms that move.

    Other buffers are constants, such as masks of -inf, or a module's own business.
    """
    found = {name for prefix, norm in norm_modules(module) for name, _ in norm.named_buffers(prefix, recurse=False)}
    found |= dict(module.named_parameters()).keys()
    found -= set(frozen_names(module, names))
    return [n for n, t in module.state_dict().items() if n in found and t.is_floating_point()]


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes (hex)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + b"\0" + flat.numpy().data).hexdigest()


def digests(source: nn.Module | Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 (hex) of tensors by state-dict name.

        before = detbb.digests(model)

    Of a module's frozen tensors, of a whole state dict, or of `names` in either. An entry that is no tensor
    (`_extra_state`) is skipped.
    """
    if isinstance(source, nn.Module):
        names = frozen_names(source) if names is None else names
        source = source.state_dict()
    chosen = source if names is None else names
    return {name: digest(value) for name in chosen if isinstance(value := source[name], Tensor)}


def changed(module: nn.Module, expected: Mapping[str, str]) -> list[str]:
    """The tensors whose digest is not the expected one, in order."""
    state = module.state_dict()
    return [name for name, value in expected.items() if name not in state or digest(state[name]) != value]


def frozen_in_train_mode(module: nn.Module) -> list[str]:
    """Norms whose statistics are frozen and that are in train mode nevertheless."""
    frozen = set(frozen_names(module))
    found = []
    for name, norm in norm_modules(module):
        owns = {n for n, _ in norm.named_buffers(name, recurse=False)} & frozen
        if norm.training and owns and has_running_stats(norm):
            found.append(name)
    return found


def explain(module: nn.Module, names: Sequence[str]) -> str:
    """One line for a FrozenTensorChanged: which tensors, and what such a change can come from."""
    modules, owners = dict(module.named_modules()), sorted({name.rpartition(".")[0] for name in names})
    in_train_mode = [owner for owner in owners if getattr(modules.get(owner), "training", False)]
    statistics = [n for n in names if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    causes = []
    if in_train_mode:
        causes.append(f"{', '.join(in_train_mode[:3])} is in train mode: something called .train() on it")
    elif statistics:
        causes.append("running statistics moved: the norm was in train mode for a while")
    if len(statistics) < len(names):
        causes.append("a weight was written: an optimizer built elsewhere, an in-place edit, or a load_state_dict")
    return f"frozen but changed: {some(names)}; it can come from: {'; '.join(causes)}"


def _freezing(module: nn.Module, names: Sequence[str] | None = None) -> Freezing:
    """What the module was told last, or would be with `names`."""
    told = module._freezing if isinstance(module, Freezable) else Freezing()
    return told if names is None else replace(told, names=tuple(names))


def _make_freezable(module: nn.Module) -> Freezable:
    """`module`, whose instance gets a class of its own where it needs one, as in torch.nn.utils.parametrize."""
    if not isinstance(module, Freezable):
        module.__class__ = _freezable(type(module))  # type: ignore[arg-type]
    return cast(Freezable, module)


@cache
def _freezable(plain: type[nn.Module]) -> type[nn.Module]:
    class Mixed(Freezable, plain):  # type: ignore[misc, valid-type]
        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            """For copy and pickle, which find a class by its name: make a plain one first."""
            make, arguments, *state = super().__reduce_ex__(protocol)
            return _remade, tuple(plain if x is Mixed else x for x in (make, *arguments)), *state

    Mixed.__module__, Mixed.__name__, Mixed.__qualname__ = plain.__module__, plain.__name__, plain.__qualname__
    Mixed.__doc__ = plain.__doc__
    return Mixed


def _remade(make: Any, *arguments: Any) -> Freezable:
    return _make_freezable(make(*arguments))


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Names for several submodules, as a submodule's `aliases` gives them: `backbone.stem` is conv1 and bn1."""
    found: dict[str, list[str]] = {}
    for prefix, m in module.named_modules():
        if isinstance(aliases := getattr(m, "aliases", None), Mapping):
            below = f"{prefix}." if prefix else ""
            found |= {below + alias: [below + member for member in members] for alias, members in aliases.items()}
    return found


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))


def _held(module: nn.Module, told: Freezing, switch: str) -> list[nn.Module]:
    """The frozen parts, and the norms whose `switch` is on: `fixed_statistics` or `fixed_affine`.

    Also those that modules inside were told themselves, such as the one in a DDP.
    """
    held: list[nn.Module] = []
    for holder in module.modules():
        freezing = told if holder is module else _freezing(holder)
        held += [part for name in freezing.names for _, part in resolve(holder, name)]
        ruled = [holder.get_submodule(rule.part) for rule in freezing.norm_rules if getattr(rule, switch)]
        held += [norm for part in ruled for norm in part.modules() if is_norm(norm)]
    return held


def _fixed_parameters(module: nn.Module, told: Freezing) -> set[int]:
    """ids of the parameters that names and norm rules switch off; ids, as a tensor may have two names."""
    return {id(parameter) for part in _held(module, told, "fixed_affine") for parameter in part.parameters()}
