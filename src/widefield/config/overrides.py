"""Values on the command line: `model.backbone.depth=34`."""

import copy
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from widefield.config.check import MAPPINGS, UNIONS, find_class, mark_of, written
from widefield.config.config import Config, ConfigError, Origin, Path
from widefield.config.load import parse_value
from widefield.config.merge import DELETE, merge, with_types
from widefield.config.sections import Foreign, Section, Sections, check_config, unknown_section
from widefield.registry import MODELS, REQUIRED, Argument, Arguments, ComponentOf, arguments_of, suggestion

_UNKNOWN = Arguments({}, False)


def override(config: Config, texts: Iterable[str], sections: Sections) -> Config:
    """Return `config` with values of the form `path=value`, where the value is YAML.

    A path leads over keys, indices of lists and arguments that the constructors have, whether the configuration has them or not.
    A value that changes a `type` counts first, wherever it stands, and drops the arguments of the old type.

    Raises:
        ConfigError: Paths that lead nowhere, a line for each, with the near names, and for whatever else is wrong with the rest.
    """
    wrong: list[str] = []
    parsed = []
    for text in texts:
        try:
            parsed.append((*_parse(text), text))
        except ConfigError as error:
            wrong.append(str(error))
    for path, value, text in sorted(parsed, key=lambda one: _types_first(one[0])):
        try:
            config = _overridden(config, path, value, text, sections)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        try:
            check_config(config, sections)
        except ConfigError as error:
            wrong.append(str(error))
        raise ConfigError("\n".join(wrong))
    return config


def _overridden(config: Config, path: Path, value: Any, text: str, sections: Sections) -> Config:
    child: Any = value
    for key in reversed(path):
        child = {key: child}
    origin = Origin(f"override {text}")
    changed = path[:-1] if path[-1] == "type" else path
    base = _with_defaults_along(path, Config(child, {(): origin}), config, sections)
    return merge(base, with_types(Config(child, {changed: origin})))


def _types_first(path: Path) -> tuple[bool, int]:
    """Sorts paths of types before all others, the outer before the inner; the order of the others stays."""
    return (False, len(path)) if path[-1] == "type" else (True, 0)


def _parse(text: str) -> tuple[Path, Any]:
    name, equals, value = text.removeprefix("--").partition("=")
    keys = (
        "type" if key == "class_path" else key for key in name.split(".") if key not in ("init_args", "dict_kwargs")
    )
    path = tuple(keys)
    if not equals or not all(path) or not path:
        raise ConfigError(f"got {text!r}, expected a value for a path, as in model.backbone.depth=34")
    return path, _value(value)


def _value(text: str) -> Any:
    if text == "None":
        return None
    if text.startswith("(") and text.endswith(")"):
        text = f"[{text[1:-1]}]"
    try:
        return parse_value(text)
    except yaml.YAMLError:
        return text


def _with_defaults_along(path: Path, whole: Config, config: Config, sections: Sections) -> Config:
    """Return `config` with the dictionaries and lists on the way to `path` that so far are only defaults of arguments."""
    key, *rest = path
    if key not in sections:
        raise whole.error(((key,), unknown_section(key, sections)))
    data = copy.deepcopy(config.data)
    section = sections[key]
    if isinstance(section, Foreign):
        if problems := section.check(whole.data[key], (key,)):
            raise whole.error(*problems)
        return config
    node, annotation = data, section
    if rest and isinstance(section, Section):
        data.setdefault(key, {})
    for end, step in enumerate(rest, start=1):
        node = node[path[end - 1]] if isinstance(node, dict) else node[int(path[end - 1])]
        here, last = path[: end + 1], end == len(rest)
        if isinstance(node, list):
            if not step.isdecimal() or int(step) >= len(node):
                raise whole.error((here, f"a list of {len(node)} has no item {step}; give an index from 0"))
        elif isinstance(node, dict):
            annotation = _enter(node, annotation, step, last, here, whole)
        else:
            raise whole.error((here, f"{'.'.join(path[:end])} is {written(node)}, which has no {step!r} in it"))
    return Config(data, config.origins)


def _enter(node: dict[Any, Any], annotation: Any, key: str, last: bool, here: Path, whole: Config) -> Any:
    """See that `node` has, or takes, the key; the annotation of its value. A default is filled in if the path goes on."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in UNIONS else (annotation,)
    mapping = next((option for option in options if typing.get_origin(option) in MAPPINGS), None)
    if mapping is not None:
        found = (typing.get_args(mapping) or (Any, Any))[1]
        if last or found is not Any:
            node.setdefault(key, {})
            return found
    arguments = _arguments(node, annotation)
    argument = arguments.named.get(key)
    if argument is None and key not in node and key not in ("type", DELETE) and not arguments.open:
        choices = {*map(str, node), *arguments.named} - {"type"}
        raise whole.error((here, f"there is no {key!r}; {suggestion(key, choices)}"))
    if key not in node and not last:
        default = REQUIRED if argument is None else argument.default
        node[key] = copy.deepcopy(default) if isinstance(default, (Mapping, list, tuple)) else {}
        if isinstance(node[key], tuple):
            node[key] = list(node[key])
    return Any if argument is None else argument.annotation


def _arguments(node: dict[Any, Any], annotation: Any) -> Arguments:
    """Return the arguments of what `node` describes; none if it describes nothing that is known."""
    try:
        if isinstance(annotation, Section):
            function = annotation.resolve(node)
            return (
                _UNKNOWN
                if function is None
                else _open_to_users(arguments_of(function), annotation.given, annotation.also)
            )
        name = node.get("type")
        if not isinstance(name, str):
            plain = _class_in(annotation)
            return arguments_of(plain) if dataclasses.is_dataclass(plain) or typing.is_typeddict(plain) else _UNKNOWN
        component = mark_of(annotation, ComponentOf)
        registry = MODELS if component is None else component.registry
        if component is not None or name in registry:
            found = arguments_of(registry.get(name))
            return found if component is None else _open_to_users(found, component.given, component.also)
        return arguments_of(find_class(name, _class_in(annotation)))
    except (ValueError, ImportError):
        return _UNKNOWN  # the check that follows says what is wrong with the type


def _open_to_users(arguments: Arguments, given: tuple[str, ...], also: Mapping[str, Any]) -> Arguments:
    """Return `arguments` without those that the caller of the class adds, and with those that it takes out."""
    named = {name: argument for name, argument in arguments.named.items() if name not in given}
    others = {name: Argument(name, annotation, None, object) for name, annotation in also.items()}
    return Arguments({**named, **others}, arguments.open)


def _class_in(annotation: Any) -> type:
    """Return the class that a dictionary given for `annotation`, or in a list given for it, describes an instance of."""
    if isinstance(annotation, type):
        return annotation
    classes = (_class_in(one) for one in typing.get_args(annotation))
    return next((found for found in classes if found.__module__ != "builtins"), object)
