"""YAML by the core schema of version 1.2, in which `no` is a text and `1e-3` a number, with the line of every value."""

import re
from typing import Any

import yaml

from widefield.config.config import Config, ConfigError, Origin, Path

_CORE = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "tag:yaml.org,2002:merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  # PyYAML's own, replaced by those of the core schema


class _Dumper(yaml.SafeDumper):
    """Quotes texts that any version of YAML would read as something else: others read our files too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.Node:  # type: ignore[override]
        # Only between double quotes are the rarer line breaks escaped, and not read as spaces.
        return self.represent_scalar(
            "tag:yaml.org,2002:str", data, '"' if set(data) & set("\x85\u2028\u2029") else None
        )


_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)


def read_yaml(text: str, place: str) -> Config:
    """Return the configuration in `text`.

    Args:
        text: A mapping, or nothing.
        place: The name of the file, for messages.

    Raises:
        ConfigError: It is no YAML, no mapping, or gives a key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        origins: dict[Path, Origin] = {(): Origin(place)}
        data = {} if node is None else _construct(loader, node, (), origins, place)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{place}{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} cannot be read as YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{place} holds an alias of something that contains it") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{place} holds a {type(data).__name__}, not keys with values")
    return Config(data, origins)


def parse_value(text: str) -> Any:
    """Return the value that `text` writes in YAML; raises yaml.YAMLError if it is none."""
    return yaml.load(text, _Loader)  # a safe loader


def write_yaml(data: dict[str, Any]) -> str:
    """Return `data` as text that `read_yaml` reads to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _construct(loader: _Loader, node: yaml.Node, path: Path, origins: dict[Path, Origin], place: str) -> Any:
    origins[path] = Origin(place, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise ConfigError(f"{place}, line {node.start_mark.line + 1}: there are no tags such as {node.tag!r} here")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, str(k)), origins, place) for k, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    _refuse_wrong_keys(loader, node, place)
    loader.flatten_mapping(node)
    data = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node)
        data[key] = _construct(loader, value_node, (*path, str(key)), origins, place)
        origins[(*path, str(key))] = Origin(place, key_node.start_mark.line + 1)
    return data


def _refuse_wrong_keys(loader: _Loader, node: yaml.MappingNode, place: str) -> None:
    written = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        where = f"{place}, line {key_node.start_mark.line + 1}"
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise ConfigError(f"{where}: {key!r} is no key; write a text")
        if key in written:
            raise ConfigError(f"{where}: the key {key!r} is given a second time")
        written.add(key)
