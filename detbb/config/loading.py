"""YAML and overrides → `Config`; `Config` → YAML and plain containers.

    file, its one base, overrides → one plain dict → ${…} resolved → keys and types → dataclasses → combinations

OmegaConf merges strictly onto the dataclasses and ends here: what comes out are plain dataclasses. Every mistake is a
UserError of one line: where it was written, the key, the value, what is valid.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detbb.config.checks import check_combinations
from detbb.config.schema import Config, HeadConfig
from detbb.config.types import check_section, show
from detbb.core.errors import UserError, nearest
from detbb.core.files import write_atomically

T = TypeVar("T")
Layer = tuple[str, Any]  # where it was written, and what
Find = Callable[[str], Any]  # the head class of a `type`, or the `Format` of a `format`; raises UserError

_SECRET = re.compile(r"KEYS?(?:_|$)|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_RESOLVED = re.compile(r"\$\{\s*(?P<key>[\w.\[\]]+)\s*\}|\$\{\s*oc\.env\s*:\s*(?P<variable>\w+)\s*(?:,[^${}]*)?\}")
_MISSING_VARIABLE = re.compile(r"Environment variable '(.*?)' not found")


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    find_head: Find,
    find_format: Find,
    world_size: int | None = None,
) -> Config:
    """The checked configuration of a YAML file and `key=value` overrides; `heads` holds each head's own dataclass.

    The file may name one parent, `base: other.yaml` (relative to it), which has none itself. `${oc.env:NAME,default}`
    and `${other.key}` are resolved; a variable that looks like a secret is refused, since the result is stored.
    The batch size must divide among the processes: `world_size`, or torchrun's `WORLD_SIZE`.

    Raises: UserError: one line for the first mistake.
    """
    sources = _Sources(str(path), [*_file_layers(Path(path)), *(_override_layer(text) for text in overrides)])
    values = config_to_dict(Config())  # so that ${…} reaches defaults too
    for name, layer in sources.layers:
        values = _merge(values, layer, name)
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1  # as distributed.processes
    return _build(_resolve(values, sources), sources, world_size, find_head, find_format)


def config_from_dict(
    values: dict[str, Any], origin: str, *, find_head: Find, find_format: Find, overrides: Sequence[str] = ()
) -> Config:
    """The checked configuration of plain containers (a checkpoint's); `origin` says in errors where they come from.

    Nothing is resolved: a stored configuration reads no environment, and imports no head. Raises: UserError.
    """
    sources = _Sources(origin, [_override_layer(text) for text in overrides])
    values = copy.deepcopy(values)
    for name, layer in sources.layers:
        values = _merge(values, layer, name)
    return _build(values, sources, 1, find_head, find_format)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars, that `config_from_dict` reads back to an equal configuration."""
    return _plain(dataclasses.asdict(config))


def save_config(config: Config, path: str | Path) -> None:
    """Write YAML that trains the same run again; the file is whole or as it was."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=120)
    write_atomically(Path(path), lambda file: file.write(text.encode("utf-8", "surrogateescape")))


@dataclasses.dataclass(frozen=True)
class _Sources:
    """What the configuration was put together from, so that an error names where a key was written."""

    main: str
    layers: list[Layer]  # the later ones win

    def fail(self, at: str, message: str) -> NoReturn:
        """One line: the override or file that wrote the key, the key, the message."""
        parts = [part for part in re.split(r"[.\[\]]+", at) if part]
        written = [name for name, values in self.layers if parts and _holds(values, parts)]
        raise UserError(_one_line(f"{written[-1] if written else self.main}: {at} {message}"))


class _Loader(yaml.SafeLoader):
    """YAML as data: plain scalars as in YAML 1.2 (`off` is a word, `1e-3` a number), no tags, no aliases."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own class attribute)
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self._depth > 30:
            raise yaml.composer.ComposerError(None, None, "nested deeper than 30 levels", event.start_mark)
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
        raise UserError(_one_line(f"{where}{line}: {error.problem or error.context}")) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(_one_line(f"{where}: is not readable as YAML: {str(error)[:200]}")) from None


def _file_layers(path: Path) -> list[Layer]:
    name, values = layer = _read(path)
    if "base" not in values:
        return [layer]
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{name}: base is {show(base)}, must be the path of one YAML file")
    parent_name, parent = _read(path.parent / base)
    if "base" in parent:
        raise UserError(
            f"{name}: base is {show(base)}, which has a base itself ({show(parent['base'])}); one level is allowed"
        )
    return [(parent_name, parent), layer]


def _read(path: Path) -> Layer:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{nearest(path.name, _yaml_files(path.parent))}") from None
    except (OSError, ValueError) as error:
        raise UserError(_one_line(f"{path}: cannot be read as a config file: {error}")) from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {show(values)}, must hold sections such as `data:` and `heads:`")
    return str(path), values


def _yaml_files(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.yaml")] if folder.is_dir() else []


def _override_layer(text: str) -> Layer:
    key, equals, value = text.partition("=")
    origin = f"override {show(text)}"
    if not equals or not key.strip():
        raise UserError(f"{origin}: must be key=value, such as train.steps=100")
    if not value.strip():
        raise UserError(f"{origin}: {key} has no value; write {key}=null to unset it")
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    if parts[:2] == ["optimizer", "lr_mult"] and len(parts) > 2:
        parts = [*parts[:2], ".".join(parts[2:])]  # its keys are submodule names, with dots
    layer = _parse(value, origin)
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


def _resolve(values: dict[str, Any], sources: _Sources) -> dict[str, Any]:
    """The same with every ${…} replaced."""
    for at, text in _strings(values, ""):
        for match in _RESOLVED.finditer(text):
            if match["variable"] and _SECRET.search(match["variable"]):
                variable = match["variable"]
                sources.fail(
                    at, f"reads the environment variable {variable}, which looks like a secret: configs are stored"
                )
        if "${" in _RESOLVED.sub("", text):
            sources.fail(
                at, f"is {show(text)}; of ${{…}}, valid are ${{other.key}} and ${{oc.env:NAME,default}}, not nested"
            )
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        text = str(error).split("\n")[0]
        if missing := _MISSING_VARIABLE.search(text):
            text = f"environment variable {missing[1]} is not set; set it or write ${{oc.env:{missing[1]},default}}"
        sources.fail(getattr(error, "full_key", None) or "", f"cannot be resolved: {text}")
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _strings(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{at}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{at}[{index}]")


def _build(values: dict[str, Any], sources: _Sources, world_size: int, find_head: Find, find_format: Find) -> Config:
    """Keys and types first, then the dataclasses, then what must fit together."""
    fail = sources.fail
    check_section(Config, values, "", fail)
    heads: dict[str, HeadConfig] = {}
    classes = {}
    for name, arguments in values.pop("heads", {}).items():
        at = f"heads.{name}"
        if not isinstance(arguments, dict) or not isinstance(arguments.get("type"), str):
            fail(at, f"is {show(arguments)}, must be a section with `type` and `data`")
        try:
            classes[name] = find_head(arguments["type"])
        except UserError as error:
            fail(f"{at}.type", str(error))
        check_section(classes[name].Config, arguments, at, fail)
        heads[name] = _structured(classes[name].Config, arguments, at, sources)
    config = _structured(Config, values, "", sources)
    config.heads = heads
    config.eval.weights = config.eval.weights or ("ema" if config.ema else "model")
    if config.checkpoint.every is None:
        config.checkpoint.every = config.eval.every
    formats = {}
    for name, source in config.data.items():
        try:
            formats[name] = find_format(source.format)
        except UserError as error:
            fail(f"data.{name}.format", str(error))
    check_combinations(config, classes, formats, world_size, fail)
    return config


def _structured(section: type[T], values: dict[str, Any], at: str, sources: _Sources) -> T:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), values))  # type: ignore[return-value]
    except UserError as error:  # from a head's own __post_init__
        sources.fail(at, str(error))
    except OmegaConfBaseException as error:
        sources.fail(".".join(filter(None, (at, error.full_key))), str(error).split("\n")[0])


def _holds(values: Any, parts: list[str]) -> bool:
    for part in parts:
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, dict) and part in values:
            values = values[part]
        else:
            return False
    return True


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
