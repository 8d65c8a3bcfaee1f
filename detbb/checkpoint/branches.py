"""Branch surgery: a branch taken out of a checkpoint, put into another, dropped.

A branch file holds one head and the digests of what it reads of backbone and neck, so that it goes only where it
predicts what it did (docs/branches.md; format: docs/checkpoints.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from detbb.checkpoint.content import (
    FORMAT_VERSION,
    MISFIT,
    ClassesForm,
    ConfigForm,
    evaluated_state,
    inherit_head,
    is_version,
    open_checkpoint,
    restore_detector,
    stored_config,
    upgraded,
)
from detbb.checkpoint.untrusted import planned_state
from detbb.config.loading import config_to_dict
from detbb.config.schema import Config
from detbb.core.errors import UserError, some, unknown_name
from detbb.core.files import BadFile, check_output, load_tensors, save_tensors
from detbb.core.forms import Form
from detbb.freeze import digests


class _SharedForm(Form):
    digest: str
    tensors: dict[str, str]


class BranchForm(Form):
    """What is in a branch file; docs/checkpoints.md says what each key holds."""

    format_version: int
    kind: str
    head: str
    config: ConfigForm
    classes: ClassesForm
    tensors: dict[str, Tensor]
    shared: _SharedForm
    step: int
    versions: dict[str, str]


def read_branch(path: Path | str) -> dict[str, Any]:
    """A branch file as a dict of the form `BranchForm`, on the CPU.

    Raises: UserError: not a whole branch file; says why.
    """
    try:
        content = upgraded(load_tensors(Path(path)))
    except BadFile as error:
        raise UserError(f"branch {error}") from error
    if not isinstance(content, dict) or content.get("kind") != "branch":
        raise UserError(f"{path}: not a branch file; `tools/checkpoint.py extract CKPT --head NAME -o FILE` makes one")
    if not is_version(content.get("format_version"), FORMAT_VERSION):
        raise UserError(f"{path}: branch format {content.get('format_version')!r}, this version reads {FORMAT_VERSION}")
    wrong = BranchForm.find_error(content)
    if wrong is None and content["shared"]["digest"] != digest_of(content["shared"]["tensors"]):
        wrong = "its digests do not fit together"
    if wrong is not None:
        raise UserError(f"{path}: not a whole branch file: {wrong}")
    return content


def extract(checkpoint: Path | str, head: str, *, output: Path | str, overwrite: bool = False) -> list[str]:
    """Write a branch file of one head as it is evaluated (averages where there are), and say what is in it.

    Raises: UserError: the checkpoint or head cannot be used; `output` exists.
    """
    content = _open(checkpoint, output, overwrite)
    config, needed = _reduced(content, [head])
    state, prefix = evaluated_state(content), f"heads.{head}."
    tensors = {n.removeprefix(prefix): state[n].clone() for n in state if n in needed and n.startswith(prefix)}
    shared = digests(state, [n for n in state if n in needed and not n.startswith("heads.")])
    branch = {
        "format_version": FORMAT_VERSION,
        "kind": "branch",
        "head": head,
        "config": config_to_dict(config),
        "classes": content["classes"][head],
        "tensors": tensors,
        "shared": {"digest": digest_of(shared), "tensors": shared},
        "step": content["step"],
        "versions": content["versions"],
    }
    save_tensors(Path(output), branch)
    reads = f"reads {len(shared)} tensors of backbone and neck, digest {digest_of(shared)[:12]}"
    return [f"{output}: branch {head} as evaluated at step {content['step']}, {len(tensors)} tensors; {reads}"]


def attach(
    checkpoint: Path | str,
    files: Sequence[Path | str],
    *,
    output: Path | str,
    head: str | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write the checkpoint with these branches added, and say what was done.

    All that the checkpoint holds stays as it is; the branches come as inherited, frozen heads. head: another name for
    the branch of a single file. force: also onto tensors that are not, to the bit, those the branch was trained on.

    Raises: UserError: a file cannot be used; a name is taken; the backbone or neck differs; `output` exists.
    """
    if head is not None and len(files) != 1:
        raise UserError(f"--head {head}: renames the branch of one file, but {len(files)} are given")
    content = _open(checkpoint, output, overwrite)
    config = stored_config(content)
    state = evaluated_state(content)
    shared = digests(state, [n for n in state if not n.startswith("heads.")])
    lines = []
    for file in files:
        branch = read_branch(file)
        name = head or branch["head"]
        if name in config.heads:
            raise UserError(
                f"{file}: {checkpoint} has a branch {name!r} already; give one file and another name with --head"
            )
        if problem := _mismatch(branch, shared):
            if not force:
                raise UserError(f"{file}: {problem}; train it from this checkpoint with these frozen, or use --force")
            lines.append(f"WARNING: {file}: {problem}; measure it with tools/eval.py before you use it")
        stored = stored_config(branch, f"the config stored in {file}")
        own = stored.heads[branch["head"]]
        inherit_head(config, name, own, stored.data[own.data])
        tensors = {f"heads.{name}.{n}": tensor for n, tensor in branch["tensors"].items()}
        content["model"].update(tensors)
        content["classes"][name] = branch["classes"]
        content["frozen"]["names"].append(f"heads.{name}")
        content["frozen"]["digests"].update(digests(tensors))
        lines.append(f"attached {name} ({own.type}, data {own.data}): {len(tensors)} tensors")
    content["config"] = config_to_dict(config)
    return [*lines, _save(output, content)]


def remove(checkpoint: Path | str, head: str, *, output: Path | str, overwrite: bool = False) -> list[str]:
    """Write the checkpoint without one head, and say what went with it.

    Raises: UserError: no such head, or it is the only one; `output` exists.
    """
    content = _open(checkpoint, output, overwrite)
    rest = [name for name in content["classes"] if name != head]
    if len(rest) == len(content["classes"]):
        raise unknown_name("--head", head, content["classes"])
    if not rest:
        raise UserError(f"--head {head}: it is the only branch of {checkpoint}; a checkpoint holds at least one")
    config, needed = _reduced(content, rest)
    gone = [name for name in content["model"] if name not in needed]
    frozen, averages = content["frozen"], content["ema"]["tensors"] if content["ema"] else {}
    for section in (content["model"], averages, content["optimizer"]["state"], frozen["digests"], content["classes"]):
        for name in [*gone, head]:
            section.pop(name, None)
    frozen["names"] = [n for n in frozen["names"] if _holds(n, needed)]
    content["config"] = config_to_dict(config)
    alone = [name for name in gone if not name.startswith(f"heads.{head}.")]
    lines = [f"removed {head}: {len(gone) - len(alone)} tensors"]
    if alone:
        lines.append(f"  and {len(alone)} of backbone and neck that no other branch reads: {some(alone)}")
    return [*lines, _save(output, content)]


def slim(checkpoint: Path | str, *, output: Path | str, overwrite: bool = False) -> list[str]:
    """Write the weights that the checkpoint is evaluated with, and no more: to use, or to start from, not to resume.

    Raises: UserError: the checkpoint cannot be used; `output` exists.
    """
    content = _open(checkpoint, output, overwrite)
    config = stored_config(content)
    config.ema, averaged = None, content["ema"] is not None
    if config.eval.weights is not None:
        config.eval.weights = "model"
    model = {name: tensor.clone() for name, tensor in evaluated_state(content).items()}
    content |= {"config": config_to_dict(config), "model": model, "ema": None, "scaler": {}}
    content["optimizer"] = {"type": "none", "state": {}}  # so --resume refuses it
    kind = "averages (EMA)" if averaged else "weights"
    return [f"{_save(output, content)}, with {kind} as evaluated and without optimizer state"]


def digest_of(shared: Mapping[str, str]) -> str:
    """SHA-256 over names and digests: one value for the backbone and neck that a branch reads."""
    return hashlib.sha256("".join(f"{n} {shared[n]}\n" for n in sorted(shared)).encode()).hexdigest()


def _open(checkpoint: Path | str, output: Path | str, overwrite: bool) -> dict[str, Any]:
    check_output(Path(output), overwrite=overwrite)
    return open_checkpoint(checkpoint)


def _save(output: Path | str, content: dict[str, Any]) -> str:
    restore_detector(content)  # what is written can be evaluated
    save_tensors(Path(output), content)
    return f"{output}: step {content['step']}, branches {', '.join(content['classes'])}"


def _reduced(content: Mapping[str, Any], heads: Sequence[str]) -> tuple[Config, set[str]]:
    """The checkpoint's config with these heads alone, and the names of the tensors that such a detector has."""
    config = stored_config(content)
    for name in heads:
        if name not in config.heads:
            raise unknown_name("--head", name, config.heads)
    config.heads = {n: head for n, head in config.heads.items() if n in heads}
    used = {head.data for head in config.heads.values()}
    config.data = {n: source for n, source in config.data.items() if n in used}
    config.inherited_heads = [n for n in config.inherited_heads if n in heads]
    if config.eval.best is not None and config.eval.best.partition("/")[0] not in heads:
        config.eval.best = None
    bare = config.model_copy(update={"freeze": [], "phases": []})  # these may name parts that no head needs any more
    tensors = set(planned_state(bare, content["classes"], MISFIT, most=len(content["model"])))
    config.freeze = [n for n in config.freeze if _holds(n, tensors)]
    for phase in config.phases:
        phase.freeze = [n for n in phase.freeze if _holds(n, tensors)]
    config.optimizer.lr_mult = {n: v for n, v in config.optimizer.lr_mult.items() if _holds(n, tensors)}
    return config, tensors


def _holds(module: str, tensors: Iterable[str]) -> bool:
    return module == "backbone.stem" or any(name.startswith(f"{module}.") for name in tensors)


def _mismatch(branch: Mapping[str, Any], digests: Mapping[str, str]) -> str | None:
    """What is wrong with putting the branch on a backbone and neck of these digests; None: nothing.

    Raises: UserError: tensors that the branch reads are not there at all.
    """
    reads: dict[str, str] = branch["shared"]["tensors"]
    if missing := [name for name in reads if name not in digests]:
        raise UserError(
            f"branch {branch['head']} reads {some(missing)}, which this checkpoint lacks: it has another backbone or "
            "neck, or the branch's run added levels (then attach the others to that run's checkpoint)"
        )
    differ = [name for name, value in reads.items() if digests[name] != value]
    if not differ:
        return None
    return (
        f"branch {branch['head']} was trained on another backbone or neck: {len(differ)} of the {len(reads)} tensors "
        f"it reads differ ({some(differ)}), so it would see features it never learned from, and "
        "neither its predictions nor its metrics would be those of its own run"
    )
