"""A YAML file, its bases and overrides → one plain dict, with every ${…} resolved; a `Config` → YAML.

PyYAML reads, OmegaConf resolves. detbb/heads/loading.py makes a `Config` of the dict.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detbb.config.messages import MAX_DEPTH, Problem, join, show
from detbb.config.schema import Config
from detbb.core.errors import UserError, nearest, one_line
from detbb.core.files import write_atomically

Keys = tuple[str | int, ...]
Layer = tuple[str, dict[str, Any]]  # where it was written, and what

MAX_BYTES = 1_000_000
MAX_BASES = 8
MAX_MISTAKES = 10  # that one message names
_UNSET = {  # a key that a later layer sets -> what it unsets in the earlier ones
    "train.steps": {"train": {"epochs": None}},
    "train.epochs": {"train": {"steps": None}},
    "freeze": {"phases": []},
    "phases": {"freeze": []},
}
_RENAMED = {"carried": "inherited_heads"}  # an older version's key -> today's, so that its runs go on
_SECRET = re.compile(r"KEYS?(?:_|$)|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_RESOLVED = re.compile(r"\$\{\s*(?P<key>[\w.\[\]]+)\s*\}|\$\{\s*oc\.env\s*:\s*(?P<variable>\w+)\s*(?:,[^${}]*)?\}")
_MISSING_VARIABLE = re.compile(r"Environment variable '(.*?)' not found")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars, that `config_from_dict` reads back to an equal configuration."""
    return config.model_dump(warnings=False)


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the keys that older versions of detbb wrote under another name."""
    return {_RENAMED.get(key, key): value for key, value in values.items()}


def save_config(config: Config, path: str | Path) -> None:
    """Write YAML that trains the same run again; the file is whole or as it was."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=120)
    write_atomically(Path(path), lambda file: file.write(text.encode("utf-8", "surrogateescape")))


@dataclass(frozen=True)
class Sources:
    """What a configuration is put together from, so that an error names where a key was written."""

    files: list[Layer]  # the later ones win; overrides win over all
    overrides: list[Layer]

    @classmethod
    def read(cls, source: str | Path | dict[str, Any] | Config, overrides: Sequence[str]) -> Sources:
        """A file, a dict or a Config, the bases that it names, and `key=value` overrides. Raises: UserError."""
        if isinstance(source, str | Path):
            files = _with_bases(_read(Path(source)), Path(source))
        else:
            values = config_to_dict(source) if isinstance(source, Config) else dict(source)
            files = _with_bases(("the given configuration", values), None)
        return cls([(name, with_new_names(v)) for name, v in files], [override_layer(text) for text in overrides])

    def merged_onto(self, values: dict[str, Any]) -> dict[str, Any]:
        for layers in (*([file] for file in self.files), self.overrides):
            for key, unset in _UNSET.items():
                if any(_find(layer, key) for _, layer in layers):
                    values = _merge(values, unset, "")
            for name, layer in layers:
                values = _merge(values, layer, name)
        return values

    def error(self, problems: Iterable[Problem]) -> UserError:
        """One line with the first mistakes: where each was written, the key, what is wrong."""
        layers, said = [*self.files, *self.overrides], dict[int, list[str]]()
        for at, message in problems:
            written = [i for i, (_, layer) in enumerate(layers) if at and _find(layer, at, ...) is not ...]
            said.setdefault(written[-1] if written else len(self.files) - 1, []).append(f"{at} {message}".strip())
        lines = [f"{'' if k else f'{layers[i][0]}: '}{line}" for i in sorted(said) for k, line in enumerate(said[i])]
        more = f"; and {len(lines) - MAX_MISTAKES} more" if len(lines) > MAX_MISTAKES else ""
        return UserError(one_line("; ".join(lines[:MAX_MISTAKES]) + more, None))


class _Loader(yaml.SafeLoader):
    """YAML as data: plain scalars as in YAML 1.2 (`off` is a word, `1e-3` a number), no tags, no aliases."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own class attribute)
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, f"alias *{event.anchor}: write it out", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"tag {event.tag}: a config is data only", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(one_line(f"{where}{line}: {error.problem or error.context}", None)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(one_line(f"{where}: is not readable as YAML: {str(error)[:200]}", None)) from None


def _with_bases(layer: Layer, path: Path | None) -> list[Layer]:
    """The bases of a layer, the farthest first, and the layer. A path is relative to the file that holds it."""
    layers, seen = [layer], [path and path.resolve()]
    while "base" in layers[0][1]:
        name, values = layers[0]
        base = values.pop("base")
        asks = f"{name}: base is {show(base)}"
        if not isinstance(base, str):
            raise UserError(f"{asks}, must be the path of one YAML file")
        path = path.parent / base if path else Path(base)
        if path.resolve() in seen:
            raise UserError(f"{asks}, which has {name} among its own bases; a circle has no beginning")
        if len(seen) > MAX_BASES:
            raise UserError(f"{asks}, but at most {MAX_BASES} bases in a row are allowed")
        seen.append(path.resolve())
        layers.insert(0, _read(path, f"{asks}: "))
    return layers


def _read(path: Path, asks: str = "") -> Layer:
    """The sections of a YAML file. asks: what an error begins with, if another file names this one."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        near = nearest(path.name, (file.name for file in path.parent.glob("*.yaml")))
        raise UserError(f"{asks}{path}: no such config file{near}") from None
    except (OSError, ValueError) as error:
        raise UserError(one_line(f"{asks}{path}: cannot be read as a config file: {error}", None)) from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{asks}{path}: is larger than {MAX_BYTES // 10**6} MB, which no config file is")
    if foreign := _foreign(set(re.findall(r"^(\w+) *:", text, re.MULTILINE))):
        raise UserError(f"{asks}{path}: is {foreign}; docs/config.md has detbb's keys, configs/ files to begin with")
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{asks}{path}: holds {show(values)}, must hold sections such as `data:` and `heads:`")
    return str(path), values


def _foreign(keys: set[str]) -> str | None:
    """What a file with these keys is, if another tool reads it."""
    if {"names", "train"} <= keys and not {"data", "heads"} & keys:
        return (
            "a data set description of Ultralytics (keys path, train, val, names), here data: {mine: {format: yolo, "
            "train: {images: FOLDER, annotations: FOLDER}, classes: THIS FILE}}"
        )
    return (
        "a configuration of Detectron2 (keys _BASE_, MODEL, SOLVER)" if {"_BASE_", "MODEL", "SOLVER"} & keys else None
    )


def override_layer(text: str) -> Layer:
    key, equals, value = text.partition("=")
    origin = f"override {show(text)}"
    if not equals or not key.strip():
        raise UserError(f"{origin}: must be key=value, such as train.steps=100")
    if not value.strip():
        raise UserError(f"{origin}: {key} has no value; write {key}=null to unset it")
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    if parts[:2] == ["optimizer", "lr_mult"] and len(parts) > 2:
        parts = [*parts[:2], ".".join(parts[2:])]  # its keys are submodule names, with dots
    if value[0] in "[{" and value.endswith(","):  # the shell parted it at a space
        raise UserError(f"{origin}: ends inside a list; quote what has spaces, such as 'freeze=[backbone, neck]'")
    layer: Any = _parse(value, origin)
    for part in reversed(parts):
        layer = {part: layer}
    return origin, layer


def _merge(old: Any, new: Any, where: str, at: str = "") -> Any:
    """Mappings merge; an entry of a list is reached by its number; everything else replaces what was there."""
    if isinstance(old, dict) and isinstance(new, dict):
        merged = {key: _merge(old.get(key), value, where, f"{at}.{key}".lstrip(".")) for key, value in new.items()}
        return {**old, **merged}
    if isinstance(old, list) and isinstance(new, dict) and new and all(key.isdigit() for key in new):
        if beyond := [key for key in new if int(key) >= len(old)]:
            raise UserError(f"{where}: {at}[{beyond[0]}] is beyond the {len(old)} entries of {at}")
        return [_merge(v, new[str(i)], where, f"{at}[{i}]") if str(i) in new else v for i, v in enumerate(old)]
    return copy.deepcopy(new)


def resolve(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The same with every ${…} replaced, and what is wrong with those that cannot be, by key path."""
    problems: dict[str, str] = {}

    def checked(keys: Keys, text: str) -> str | None:
        if wrong := _refused_interpolation(text):
            problems[join("", *keys)] = wrong
        return None if wrong else text

    def resolved(keys: Keys, text: str) -> Any:
        at = join("", *keys)
        try:
            found = text if at in problems else reduce(getitem, keys, known)
            return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except (OmegaConfBaseException, RecursionError, LookupError, ValueError, TypeError) as error:
            said = str(error).split("\n")[0]
            if missing := _MISSING_VARIABLE.search(said):
                said = f"environment variable {missing[1]} is not set; set it or write ${{oc.env:{missing[1]},default}}"
            problems[at] = f"cannot be resolved: {said}"
            return text

    try:
        known = OmegaConf.create(_map_interpolations(values, checked), flags={"allow_objects": True})
    except OmegaConfBaseException as error:  # of its grammar
        return values, {getattr(error, "full_key", None) or "": f"cannot be resolved: {str(error).splitlines()[0]}"}
    return _map_interpolations(values, resolved), problems


def _map_interpolations(value: Any, change: Callable[[Keys, str], Any], keys: Keys = ()) -> Any:
    if isinstance(value, dict):
        return {key: _map_interpolations(item, change, (*keys, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_interpolations(item, change, (*keys, index)) for index, item in enumerate(value)]
    return change(keys, value) if isinstance(value, str) and "${" in value else value


def _refused_interpolation(text: str) -> str | None:
    for match in _RESOLVED.finditer(text):
        if (name := match["variable"]) and _SECRET.search(name):
            return f"reads the environment variable {name}, which looks like a secret: configs are stored"
    if "${" in _RESOLVED.sub("", text):
        return f"is {show(text)}; of ${{…}}, valid are ${{other.key}} and ${{oc.env:NAME,default}}, not nested"
    return None


def _find(values: Any, at: str, default: Any = None) -> Any:
    """What is at a key path of plain containers."""
    for part in filter(None, re.split(r"[.\[\]]+", at)):
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, dict) and part in values:
            values = values[part]
        else:
            return default
    return values
