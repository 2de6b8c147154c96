"""Read configuration files, with the files they are based on; those that come with Widefield are read by name."""

from pathlib import Path as FilePath
from typing import Any

from widefield.config.config import Config, ConfigError, Path
from widefield.config.expected import written
from widefield.config.merge import IMPORTS, clashes, merge, settles, with_types
from widefield.config.python_file import read_python
from widefield.config.yaml_text import read_yaml
from widefield.registry import absolute_place, suggestion

BASE = "_base_"
FOLDER = FilePath(__file__).parent.parent / "configs"
"""The folder of the configurations that come with Widefield."""
_READERS = {".yaml": read_yaml, ".yml": read_yaml, ".json": read_yaml, ".py": read_python}


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
        raise child.error([((BASE,), f"got {written(names)}, expected a file or a list of files")])
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
        raise child.error(problems.items())
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
        raise config.error([((IMPORTS,), f"got {written(imports)}, expected Python files or modules")])
    return {IMPORTS: [absolute_place(name, file.parent) for name in imports]}
