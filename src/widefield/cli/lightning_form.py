"""A configuration as LightningCLI reads it."""

import collections.abc
import typing
from collections.abc import Mapping
from typing import Any

from widefield.cli.fit_sections import SECTIONS
from widefield.config import Config, Section
from widefield.config.check import MAPPINGS, mark_of
from widefield.registry import MODELS, ComponentOf, Registry, arguments_of, import_object


def lightning_form(config: Config) -> dict[str, Any]:
    """The data of a checked `config` with `{class_path: X, init_args: {...}}` where Lightning makes an instance.

    Where a constructor takes a dictionary, the description stays as it is: components make their own parts.
    """
    return {
        key: _sections(value, SECTIONS[key]) if isinstance(SECTIONS[key], Section) else value
        for key, value in config.data.items()
        if value is not None
    }


def _sections(value: Any, section: Section) -> Any:
    return [_section(one, section) for one in value] if isinstance(value, list) else _section(value, section)


def _section(value: dict[str, Any], section: Section) -> dict[str, Any]:
    function = section.resolve(value)
    if "type" not in value:
        return _arguments(value, function)
    return _instance(value, function, MODELS if section.component is None else section.component.registry)


def _instance(value: Mapping[str, Any], function: Any, registry: Registry = MODELS) -> dict[str, Any]:
    arguments = {name: item for name, item in value.items() if name != "type"}
    return {"class_path": _import_path(value["type"], registry), "init_args": _arguments(arguments, function)}


def _arguments(arguments: Mapping[str, Any], function: Any) -> dict[str, Any]:
    known = {} if function is None else arguments_of(function).named
    return {name: _value(item, known[name].annotation if name in known else Any) for name, item in arguments.items()}


def _value(value: Any, annotation: Any) -> Any:
    if _takes_dictionaries(annotation):
        return value
    if isinstance(value, list):
        return [_value(item, annotation) for item in value]
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        path = _import_path(value["type"])
        return _instance(value, import_object(path) if "." in path else None)
    return value


def _takes_dictionaries(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if (
        typing.is_typeddict(annotation)
        or annotation is Any
        or mark_of(annotation, ComponentOf) is not None
        or annotation in MAPPINGS
        or origin in MAPPINGS
    ):
        return True
    inside = () if origin in (None, collections.abc.Callable) else typing.get_args(annotation)
    return any(_takes_dictionaries(one) for one in inside)


def _import_path(name: str, registry: Registry = MODELS) -> str:
    if name not in registry:
        return name
    component = registry.get(name)
    return f"{component.__module__}.{component.__qualname__}"
