"""`docs/config.md`, made from the docstrings under the fields: `python -m detbb.config.docs` writes it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from detbb.config.schema import Config, HeadConfig
from detbb.heads import HEADS

PATH = Path(__file__).resolve().parents[2] / "docs" / "config.md"
_INTRODUCTION = """\
# Configuration

Made from the docstrings of the configuration classes by `make docs`; edit those, not this file.

A run is one YAML file. Overrides come after the flags on the command line: `train.steps=100`,
`'phases[0].freeze=[backbone, neck]'`, `ema=null`. A file may name one parent, `base: other.yaml` (relative to it),
which is merged before the rest: sections merge key by key, everything else replaces. `${oc.env:NAME,default}` is an
environment variable and `${train.steps}` another key; both are resolved in the `config.yaml` of the run folder.

An unknown key, a wrong type and a combination that cannot work end the command at once with exit code 2 and one line:
where it was written, the key, the value, what is valid.

Each entry: key, type, default, meaning. `<name>` stands for a name of your choice.
"""
_FREEZING = """\
## Names in `freeze`

A name is a submodule of the detector: `backbone`, `backbone.stem` (conv1 and bn1), `backbone.layer1` …
`backbone.layer4`, `neck`, `heads.<name>` and anything below them. A frozen part keeps every bit, running statistics
included. What others write is `freeze: [backbone.stem, backbone.layer1]` here: Detectron2's `FREEZE_AT = 2`,
MMDetection's `frozen_stages=1` and torchvision's `trainable_backbone_layers=3`.
"""


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    name: str
    type: str
    default: str | None  # None: the key must be given
    text: str


def field_docs(section: type) -> list[FieldDoc]:
    """The fields that a dataclass declares itself, in order. Raises: ValueError: a field without a docstring."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    hints = get_type_hints(section)
    docs = []
    for statement, below in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = ast.unparse(statement.target)
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
        if not isinstance(text, str):
            raise ValueError(f"{section.__name__}.{name} has no docstring below it")
        default = None if statement.value is None else _default(section, name)
        docs.append(FieldDoc(name, _type(hints[name]), default, " ".join(text.split())))
    return docs


def make_docs() -> str:
    """The whole page as Markdown."""
    parts = [_INTRODUCTION, *_sections("", Config), _FREEZING, *_sections("heads.<name>", HeadConfig)]
    for name, head in HEADS.items():
        documented = [c for c in reversed(head.Config.__mro__) if dataclasses.is_dataclass(c) and c is not HeadConfig]
        lines = {line.name: line for c in documented for line in field_docs(c)}
        first = " ".join((head.__doc__ or "").split("\n\n")[0].split())
        changed = [
            _entry(dataclasses.replace(line, default=_default(head.Config, line.name))) for line in lines.values()
        ]
        parts.append("\n".join([f"## `heads.<name>` of `type: {name}`\n", f"{first}\n", *changed, ""]))
    return "\n".join(parts)


def _sections(at: str, section: type) -> Iterator[str]:
    first = (section.__doc__ or "").split("\n\n")[0]
    yield "\n".join([f"## `{at}`\n" if at else "## The run\n", f"{first}\n", *map(_entry, field_docs(section)), ""])
    for name, hint in get_type_hints(section).items():
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                key = f"{name}.<name>" if hint != part and "dict" in str(hint) else name
                key = f"{name}[…]" if "list" in str(hint) else key
                yield from _sections(f"{at}.{key}" if at else key, part)


def _entry(line: FieldDoc) -> str:
    default = ", must be given" if line.default is None else f", default `{line.default}`" if line.default else ""
    return f"- **`{line.name}`** ({line.type}{default}): {line.text}"


def _type(hint: Any) -> str:
    """The annotation in the words of YAML."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type, inside))
    if origin in (list, tuple):
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return f"name: {_type(inside[1])}"
    if dataclasses.is_dataclass(hint):
        return "section"
    words = {
        bool: "true | false",
        int: "whole number",
        float: "number",
        str: "text",
        type(None): "null",
        Any: "see there",
    }
    return words[hint]


def _default(section: type, name: str) -> str:
    """The default as YAML would say it."""
    found = next(f for f in dataclasses.fields(section) if f.name == name)
    factory = found.default_factory
    value = found.default if factory is dataclasses.MISSING else factory()
    return "" if dataclasses.is_dataclass(value) else _yaml(value)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


if __name__ == "__main__":
    PATH.write_text(make_docs())
