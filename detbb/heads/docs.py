"""`docs/config.md` and `docs/config.schema.json`, made from the fields: `python -m detbb.heads.docs` writes both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detbb.config.messages import describe_range, node_at, show
from detbb.config.schema import Config, HeadConfig
from detbb.heads import HEADS

FOLDER = Path(__file__).resolve().parents[2] / "docs"
_INTRODUCTION = """\
# Configuration

Made from the docstrings of the configuration classes by `make docs`; edit those, not this file. Editors that know
`yaml-language-server` check a file and complete its keys if its first line names
[config.schema.json](config.schema.json), as in `configs/`.

A run is one YAML file. Overrides come after the flags on the command line: `train.steps=100`,
`'phases[0].freeze=[backbone, neck]'`, `ema=null`. A file may name a parent, `base: other.yaml` (relative to it), which
is merged before the rest and may have a parent itself, up to eight in a row: sections merge key by key, everything else
replaces. Of two keys that exclude each other, the later layer's counts: `train.steps` in a file or override replaces
`train.epochs` of its base and the other way round, and so do `freeze` and `phases`. `${oc.env:NAME,default}` is an
environment variable and `${train.steps}` another key; both are resolved in the `config.yaml` of the run folder. In
Python, `load_config` takes a path, a dict or a `Config`.

Unknown keys, wrong types and values, and combinations that cannot work end the command at once with exit code 2 and one
line that names them all: where each was written, the key, the value, what is valid.

Each entry: key, type, default, meaning. `<name>` stands for a name of your choice.
"""
_FREEZING = """\
## Names in `freeze`

A name is a submodule of the detector: `backbone`, `backbone.stem` (conv1 and bn1), `backbone.layer1` …
`backbone.layer4`, `neck`, `heads.<name>` and anything below them. A frozen part keeps every bit, running statistics
included. What others write is `freeze: [backbone.stem, backbone.layer1]` here: Detectron2's `FREEZE_AT = 2`,
MMDetection's `frozen_stages=1` and torchvision's `trainable_backbone_layers=3`.
"""
_TYPES = {"boolean": "true | false", "integer": "whole number", "number": "number", "string": "text", "null": "null"}


def make_docs() -> str:
    """The page as Markdown."""
    heads = _sections("heads.<name>", HeadConfig.model_json_schema())
    parts = [_INTRODUCTION, *_sections("", Config.model_json_schema()), _FREEZING, *heads]
    for name, head in HEADS.items():
        shared = {f for f in HeadConfig.model_fields if f not in vars(head.Config).get("__annotations__", {})}
        entries = "\n".join(_entries(head.Config.model_json_schema(), leave_out=shared))
        parts.append(f"## `heads.<name>` of `type: {name}`\n\n{_first(head.__doc__)}\n\n{entries}\n")
    return "\n".join(parts)


def make_schema() -> str:
    """The JSON schema for editors. Nothing is required, since a base may hold it."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"] | {f"{n} head": head.Config.model_json_schema() for n, head in HEADS.items()}
    by_type = []
    for name in HEADS:
        is_it = {"properties": {"type": {"const": name}}, "required": ["type"]}
        by_type.append({"if": is_it, "then": {"$ref": f"#/$defs/{name} head"}})
    types = {"anyOf": [{"enum": list(HEADS)}, {"type": "string", "pattern": ":"}]}
    heads = {"type": "object", "properties": {"type": types}, "allOf": by_type}
    schema["properties"]["heads"]["additionalProperties"] = heads
    schema["properties"]["base"] = {"type": "string", "description": "A YAML file that is merged before this one."}
    for section in (schema, *definitions.values()):
        section.pop("required", None)
    return json.dumps({**schema, "$defs": definitions}, indent=1, ensure_ascii=False) + "\n"


def _sections(at: str, schema: dict[str, Any], keys: tuple[str | int, ...] = ()) -> Iterator[str]:
    """A section and those inside it, in the order of their fields."""
    node = node_at(schema, keys)
    title = f"## `{at}`\n" if at else "## The run\n"
    yield "\n".join([title, f"{_first(node['description'])}\n", *_entries(schema, keys), ""])
    for name in node["properties"]:
        for inside, shown in (((), name), ((0,), f"{name}[…]"), (("<name>",), f"{name}.<name>")):
            below = (*keys, name, *inside)
            if "properties" in node_at(schema, below):
                yield from _sections(f"{at}.{shown}" if at else shown, schema, below)


def _entries(schema: dict[str, Any], keys: tuple[str | int, ...] = (), leave_out: Iterable[str] = ()) -> Iterator[str]:
    section = node_at(schema, keys)
    for name, field in section["properties"].items():
        if name in leave_out:
            continue
        default = "" if isinstance(field.get("default"), dict) else f", default `{_yaml(field.get('default'))}`"
        if name in section.get("required", ()):
            default = ", must be given"
        meaning = field.get("description") or node_at(schema, (*keys, name))["description"]
        yield f"- **`{name}`** ({_type(field)}{default}): {_first(meaning)}"


def _first(text: str | None) -> str:
    """The first paragraph as one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def _type(node: Any) -> str:
    """What may be written, in the words of YAML."""
    if "anyOf" in node:
        return " | ".join(map(_type, node["anyOf"]))
    if "enum" in node:
        return " | ".join(node["enum"])
    if "$ref" in node:
        return "section"
    if node.get("type") == "array":
        return f"list of {_type(node['items'])}"
    if node.get("type") == "object":
        inside = node.get("additionalProperties")
        return "section" if inside is True else f"name: {_type(inside)}"
    return f"{_TYPES[node['type']]} {describe_range(node)}".strip()


def _yaml(value: Any) -> str:
    """The default as YAML would say it."""
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, list) else show(value).strip("'")


if __name__ == "__main__":
    (FOLDER / "config.md").write_text(make_docs())
    (FOLDER / "config.schema.json").write_text(make_schema())
