"""What a checkpoint or branch file holds, and which tensors of two checkpoints differ, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from detbb.checkpoint.branches import read_branch
from detbb.checkpoint.content import evaluated_state, open_checkpoint
from detbb.core.errors import UserError, printable, some
from detbb.freeze import digests, part_of
from detbb.modeling.backbones import known_aliases

COLUMNS = ("raw equal", "raw differ", "evaluated equal", "evaluated differ", "only in A", "only in B")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def show(path: Path | str) -> list[RenderableType]:
    """Tables of what a checkpoint or a branch file holds. Raises: UserError: it is neither."""
    try:
        content = open_checkpoint(path)
    except UserError as error:
        try:
            content = read_branch(path)
        except UserError:
            raise error from None
        return _show_branch(path, content)
    ema = content["ema"]
    rows = {
        "step": f"{content['step']:,}, in phase {content['phase']}",
        "ema": "none" if ema is None else f"{ema['updates']:,} updates, {len(ema['tensors'])} tensors",
        "frozen": ", ".join(content["frozen"]["names"]) or "nothing",
    }
    return [_about(path, content, rows), _parts(content, content["model"], content["classes"])]


def diff(a: Path | str, b: Path | str, *, names: bool = False) -> tuple[list[RenderableType], bool]:
    """Which tensors differ in any bit, by module, and whether one does that is frozen in `b`.

    Compared raw, and as evaluated (averages where there are). A frozen tensor of `b` may equal `a`'s raw one or `a`'s
    average: a run with `init_from` starts from the averages. names: list every differing tensor, not only the first few
    of those that differ as evaluated.

    Raises: UserError: a file is no checkpoint.
    """
    first, second = _Digests(open_checkpoint(a)), _Digests(open_checkpoint(b))
    aliases = {**first.aliases, **second.aliases}
    counts: dict[str, Counter[str]] = {}
    differing: dict[str, list[str]] = {}
    for name in {**first.raw, **second.raw}:
        module = part_of(name, aliases)
        kinds = counts.setdefault(module, Counter())
        if name not in second.raw or name not in first.raw:
            kinds["only in A" if name in first.raw else "only in B"] += 1
            continue
        raw, evaluated = first.raw[name] == second.raw[name], first.evaluated[name] == second.evaluated[name]
        kinds["raw equal" if raw else "raw differ"] += 1
        kinds["evaluated equal" if evaluated else "evaluated differ"] += 1
        if not evaluated or (names and not raw):
            differing.setdefault(module, []).append(name + " (only raw)" * evaluated)
    table = _table("module", *COLUMNS, title=f"A {a}\nB {b}")
    for module, kinds in counts.items():
        _add(table, module, *(f"{kinds[column]:,}" if kinds[column] else "-" for column in COLUMNS))
    lines = [f"{m} differs in {some(found, len(found) if names else 5)}" for m, found in differing.items()]
    verdict, wrong = _judge(first, second)
    return [table, *lines, *verdict], wrong


class _Digests:
    """A checkpoint's digests by tensor name: raw, as evaluated, and as its run recorded what is frozen."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        averages = {} if content["ema"] is None else content["ema"]["tensors"]
        state = evaluated_state(content)
        self.raw = digests(content["model"])
        self.evaluated = self.raw | digests(state, [name for name in averages if name in state])
        self.frozen: dict[str, str] = content["frozen"]["digests"]
        self.aliases = known_aliases(content["config"]["backbone"]["arch"])


def _judge(a: _Digests, b: _Digests) -> tuple[list[str], bool]:
    """Lines about what is frozen in `b`, and whether any of it is not what it was."""
    frozen = [name for name in b.frozen if name in a.raw and name in b.raw]
    averages = sum(a.raw[name] != b.raw[name] == a.evaluated[name] for name in frozen)
    changed = [name for name in frozen if b.raw[name] not in (a.raw[name], a.evaluated[name])]
    forged = [name for name, value in b.frozen.items() if b.raw.get(name) != value]
    lines = [f"NOT WHAT B'S OWN RUN RECORDED AS FROZEN: {some(forged, 20)}"] if forged else []
    if changed:
        learned = "" if set(changed) & set(a.frozen) else " (none of them was frozen in A yet)"
        lines.append(f"FROZEN IN B, BUT NOT AS IN A{learned}: {some(changed, 20)}")
    elif frozen and not forged:
        how = f" ({averages} are A's averages (EMA), not its raw weights: unchanged as evaluated)" if averages else ""
        lines.append(f"all {len(frozen)} tensors that are frozen in B are as in A, to the bit{how}")
    return lines, bool(changed or forged)


def _show_branch(path: Path | str, branch: Mapping[str, Any]) -> list[RenderableType]:
    name, shared = branch["head"], branch["shared"]
    rows = {
        "branch": f"{name}, as evaluated at step {branch['step']:,}",
        "reads": f"{len(shared['tensors'])} tensors of backbone and neck, digest {shared['digest']}",
    }
    tensors = {f"heads.{name}.{n}": tensor for n, tensor in branch["tensors"].items()}
    return [_about(path, branch, rows), _parts(branch, tensors, {name: branch["classes"]})]


def _about(path: Path | str, content: Mapping[str, Any], rows: Mapping[str, str]) -> Table:
    table = _table(title=str(path))
    for key, value in rows.items():
        _add(table, key, value)
    _add(table, "versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items()))
    return table


def _parts(content: Mapping[str, Any], tensors: Mapping[str, Any], classes: Mapping[str, Any]) -> Table:
    """A row for each module, with type, data and classes of heads; running statistics are no parameters."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    aliases = known_aliases(content["config"]["backbone"]["arch"])
    for name, tensor in tensors.items():
        part = part_of(name, aliases)
        counts[part] += 1
        sizes[part] += tensor.numel() * (not name.endswith(STATISTICS))
    table = _table("module", "tensors", "parameters", "type", "data", "classes", title="")
    for part, size in sizes.items():
        head = content["config"]["heads"].get(part.removeprefix("heads.")) if part.startswith("heads.") else None
        about = []
        if head is not None:
            name = part.removeprefix("heads.")
            inherited = " (inherited)" if name in content["config"]["inherited_heads"] else ""
            about = [head["type"] + inherited, head["data"], some(classes[name]["names"])]
        _add(table, part, f"{counts[part]:,}", f"{size:,}", *about)
    _add(table, "all", f"{counts.total():,}", f"{sizes.total():,}")
    return table


def _table(*headers: str, title: str) -> Table:
    return Table(*headers, title=Text(title) if title else None, title_justify="left", show_header=bool(headers))


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells))  # not markup: class names may hold brackets
