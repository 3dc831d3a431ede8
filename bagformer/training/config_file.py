"""Read a training configuration: YAML with line numbers, changes from the command line, checks."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from bagformer.data.yaml12 import Loader
from bagformer.training import original_config
from bagformer.training.config import ConfigError, TrainConfig, problems

Places = dict[tuple[str, ...], str]


def parse(text: str, name: str) -> tuple[dict[str, Any], Places]:
    """The mapping in a YAML text, and ``name:line`` of each of its keys.

    Raises ConfigError for what is not YAML, not a mapping, or has a key twice.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        places: Places = {}
        if node is None:
            return {}, places
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name}:1: expected keys and values")
        _walk(node, (), name, places)
        return loader.construct_document(node), places
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{name}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    finally:
        loader.dispose()


def _walk(node: Any, path: tuple[str, ...], name: str, places: Places) -> None:
    for key, value in node.value:
        own = (*path, str(key.value))
        place = f"{name}:{key.start_mark.line + 1}"
        if own in places:
            raise ConfigError(f"{place}: {'.'.join(own)} was already set at {places[own]}")
        places[own] = place
        if isinstance(value, yaml.MappingNode):
            _walk(value, own, name, places)


def override(tree: dict[str, Any], places: Places, changes: Sequence[str]) -> None:
    """Set ``a.b=c`` in the tree; ``c`` is read as YAML."""
    for change in changes:
        path, sign, text = change.partition("=")
        keys = path.strip().split(".")
        if not sign or not all(keys):
            raise ConfigError(f"--set {change}: expected a.b=value")
        try:
            value = yaml.load(text, Loader=Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {change}: not YAML: {error}") from error
        target = tree
        for key in keys[:-1]:
            if not isinstance(target.get(key), dict):
                target[key] = {}
            target = target[key]
        target[keys[-1]] = value
        places[tuple(keys)] = f"--set {change}"


def _where(places: Places, path: tuple[str, ...], name: str) -> str:
    while path and path not in places:
        path = path[:-1]
    return places.get(path, name)


def _sections_with(key: str, hints: dict[str, Any]) -> list[str]:
    """``optim.lr`` for ``lr``: keys of that name which stand one level deeper."""
    return [
        f"{section}.{key}"
        for section, kind in hints.items()
        if dataclasses.is_dataclass(kind) and key in typing.get_type_hints(kind)
    ]


class _Builder:
    """Fills dataclasses from plain values, strictly."""

    def __init__(self, places: Places, name: str) -> None:
        self.places, self.name = places, name

    def fail(self, path: tuple[str, ...], problem: str) -> typing.NoReturn:
        raise ConfigError(f"{_where(self.places, path, self.name)}: {'.'.join(path)}: {problem}")

    def build(self, kind: Any, tree: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(tree, dict):
            self.fail(path, f"expected keys and values, got {tree!r}")
        hints = typing.get_type_hints(kind)
        for key in tree:
            if key not in hints:
                near = _sections_with(str(key), hints)
                near += get_close_matches(str(key), hints, n=1, cutoff=0.0)
                self.fail((*path, str(key)), f"unknown key, the nearest known one is {near[0]!r}")
        values = {key: self.convert(hints[key], value, (*path, key)) for key, value in tree.items()}
        return kind(**values)

    def convert(self, hint: Any, value: Any, path: tuple[str, ...]) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.build(hint, {} if value is None else value, path)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            fits, converted = _fit(option, value)
            if fits:
                return converted
        wanted = " or ".join(_name(option) for option in options)
        self.fail(path, f"expected {wanted}, got {value!r}")


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    origin = typing.get_origin(hint)
    if origin is list:
        return f"a list of {_name(typing.get_args(hint)[0])}"
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return "keys and values" if origin is dict else plain.get(hint, str(hint))


def _fit(hint: Any, value: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(hint)
    if origin is list:
        item = typing.get_args(hint)[0]
        pairs = [_fit(item, one) for one in value] if isinstance(value, list) else [(False, None)]
        return all(fits for fits, _ in pairs), [converted for _, converted in pairs]
    if origin is dict:
        return isinstance(value, dict), value
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (True, float(value)) if number else (False, None)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, hint), value


def from_tree(tree: dict[str, Any], places: Places, name: str = "config") -> TrainConfig:
    """The configuration of a mapping. Raises ConfigError naming key and place."""
    builder = _Builder(places, name)
    config = builder.build(TrainConfig, tree, ())
    for key, problem in problems(config).items():
        builder.fail(tuple(key.split(".")), problem)
    return config


def load(
    path: str | os.PathLike[str], changes: Sequence[str] = ()
) -> tuple[TrainConfig, list[str]]:
    """The configuration of a YAML file with ``a.b=c`` changes, and remarks on it.

    A file with the original code's keys is translated first; the remarks say what of it has no
    meaning here. Raises FileNotFoundError, ConfigError.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error}") from error
    tree, places = parse(text, str(file))
    remarks: list[str] = []
    if original_config.is_original(tree):
        tree, places, remarks = original_config.translate(tree, places, str(file))
    override(tree, places, changes)
    return from_tree(tree, places, str(file)), remarks


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values, as they stand in YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: TrainConfig) -> str:
    """YAML that :func:`load` reads back to the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
