"""Read configuration files, with the files they are based on; those that come with Widefield are read by name.

YAML is that of the core schema of version 1.2, in which `no` is a text and `1e-3` a number, with the line of every value.
"""

import ast
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from types import FunctionType, ModuleType
from typing import Any

import yaml

from widefield.config.check import with_article, written
from widefield.config.config import Config, ConfigError, Origin, Path, dotted
from widefield.config.merge import IMPORTS, clashes, merge, settles, with_types
from widefield.registry import absolute_place, suggestion

BASE = "_base_"
FOLDER = FilePath(__file__).parent.parent / "configs"
"""The folder of the configurations that come with Widefield."""


def load(*files: FilePath | str) -> Config:
    """Return the configuration in a YAML or Python file, over those that its `_base_` names; of several files, each over the last.

    Raises:
        FileNotFoundError: A file is not there.
        ConfigError: A file cannot be read, the files are based on each other in a circle, or bases say different things.
    """
    config = Config({})
    for file in files:
        config = merge(config, _load(_found(FilePath(file)), ()))
    return config


def ready_configs() -> list[str]:
    """Return the sorted names of the configurations that come with Widefield; `load` takes a name in the place of a file."""
    return sorted(file.stem for file in FOLDER.glob("[!_]*.yaml"))


def summary(name: str) -> str:
    """Return what a ready configuration is for, its first line."""
    with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def _found(file: FilePath) -> FilePath:
    """`file`, or the ready configuration of that name."""
    return FOLDER / f"{file.name}.yaml" if not file.suffix and file.name in ready_configs() else file


def _load(file: FilePath, below: tuple[FilePath, ...]) -> Config:
    file = file.resolve()
    if file in below:
        circle = " -> ".join(_short(one) for one in (*below[below.index(file) :], file))
        raise ConfigError(f"{BASE}: the files are based on each other in a circle: {circle}")
    child = with_types(_read(file, below))
    names = child.data.pop(BASE, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise child.error(((BASE,), f"got {written(names)}, expected a file or a list of files"))
    child.data.update(_absolute_imports(child, file))
    bases = [_load(_found(file.parent / name), (*below, file)) for name in names]
    base = Config({})
    problems: dict[Path, str] = {}
    for name, other in zip(names, bases, strict=True):
        for path in clashes(base.data, other.data):
            if not settles(child.data, path):
                problems[path] = f"the bases disagree: {base.origin(path)} and {name}; write the value into {file.name}"
        base = merge(base, other)
    if problems:
        raise child.error(*problems.items())
    return merge(base, child)


def _read(file: FilePath, below: tuple[FilePath, ...]) -> Config:
    if not file.is_file():
        files = [other.name for other in file.parent.glob("*") if other.suffix in _READERS]
        near = suggestion(file.name, files if file.suffix else [*files, *ready_configs()])
        named = f", which {_short(below[-1])} names as {BASE}," if below else ""
        raise FileNotFoundError(f"the configuration {file}{named} does not exist; {near}")
    if file.suffix not in _READERS:
        raise ConfigError(f"{file} is no configuration; its name must end in {', '.join(_READERS)}")
    return _READERS[file.suffix](file.read_text(encoding="utf-8"), _short(file))


def _short(file: FilePath) -> str:
    """Return the path from the working directory, if the file is below it."""
    return str(file.relative_to(FilePath.cwd())) if file.is_relative_to(FilePath.cwd()) else str(file)


def _absolute_imports(config: Config, file: FilePath) -> dict[str, Any]:
    imports = config.data.get(IMPORTS)
    if imports is None:
        return {}
    imports = [imports] if isinstance(imports, str) else imports
    if not isinstance(imports, list) or not all(isinstance(name, str) for name in imports):
        raise config.error(((IMPORTS,), f"got {written(imports)}, expected Python files or modules"))
    return {IMPORTS: [absolute_place(name, file.parent) for name in imports]}


def read_python(text: str, place: str) -> Config:
    """Run `text` in a namespace of its own; its top-level names are the keys.

    Names that begin with an underscore, modules, functions and classes are helpers and are left out.

    Raises:
        ConfigError: Running it fails, or a value is not plain data.
    """
    namespace: dict[str, Any] = {"__name__": "widefield_config", "__file__": place}
    hint = "; `widefield config convert` reads files of MMEngine" if _MMENGINE.search(text) else ""
    try:
        exec(compile(text, place, "exec"), namespace)
    except SyntaxError as error:
        raise ConfigError(f"{place}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
        where = f"{place}, line {lines[-1]}" if lines else place
        raise ConfigError(f"{where}: {type(error).__name__}: {error}{hint}") from error
    kept = {
        name: _plain(value, (name,), place)
        for name, value in namespace.items()
        if (not name.startswith("_") or name == BASE) and not isinstance(value, (ModuleType, FunctionType, type))
    }
    written_in = _lines(ast.parse(text))
    origins = {path: Origin(place, line) for path, line in _nearest(kept, written_in)}
    return Config(kept, {(): Origin(place), **origins})


_MMENGINE = re.compile(r"\bread_base\b|\b_base_\.|\{\{\s*_base_")


def _lines(module: ast.Module) -> dict[Path, int]:
    """Return the lines of names that are assigned once, and of what is written in their values."""
    names = [
        (node.targets[0].id, node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    stored = [node.id for node in ast.walk(module) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    changed = {
        node.value.id
        for node in ast.walk(module)
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.value, ast.Name)
    }
    return {
        path: line
        for name, value in names
        if stored.count(name) == 1 and name not in changed
        for path, line in _written_at(value, (name,))
    }


def _written_at(node: ast.expr, path: Path) -> Iterator[tuple[Path, int]]:
    yield path, node.lineno
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
        parts = [(one.arg, one.value) for one in node.keywords if one.arg is not None]
    elif isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        parts = [(str(key.value), value) for key, value in pairs if isinstance(key, ast.Constant)]
    elif isinstance(node, (ast.List, ast.Tuple)):
        parts = [(str(k), value) for k, value in enumerate(node.elts)]
    else:
        return
    for key, value in parts:
        yield from _written_at(value, (*path, key))


def _nearest(value: Any, lines: Mapping[Path, int], path: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """Yield each path in `value` with its line, or that of the nearest branch that has one."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in parts:
        here = (*path, str(key))
        yield here, next((lines[here[:end]] for end in range(len(here), 0, -1) if here[:end] in lines), None)
        yield from _nearest(item, lines, here)


def _plain(value: Any, path: Path, place: str) -> Any:
    """Return `value` with lists for tuples and texts for paths."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, FilePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, str(k)), place) for k, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise ConfigError(f"{dotted(path)}: {key!r} is no key; write a text ({place})")
        return {key: _plain(item, (*path, str(key)), place) for key, item in value.items()}
    advice = (
        "name it by its import path, as a text" if isinstance(value, type) else "name it with an underscore in front"
    )
    raise ConfigError(
        f"{dotted(path)}: a configuration holds dictionaries, lists, texts, numbers, booleans and None, "
        f"not {with_article(type(value).__name__)}; {advice} ({place})"
    )


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
        raise ConfigError(f"{place}{line}: {error.problem}; correct the YAML there, or in the line before") from error
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


_READERS = {".yaml": read_yaml, ".yml": read_yaml, ".json": read_yaml, ".py": read_python}
