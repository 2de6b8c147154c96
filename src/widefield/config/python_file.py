"""Configurations written in Python."""

import traceback
from collections.abc import Mapping
from pathlib import Path as FilePath
from types import FunctionType, ModuleType
from typing import Any

from widefield.config.config import Config, ConfigError, Origin, Path, dotted
from widefield.config.expected import with_article

KEPT_PRIVATE = ("_base_",)


def read_python(text: str, place: str) -> Config:
    """Run `text` in a namespace of its own; its top-level names are the keys.

    Names that begin with an underscore, modules, functions and classes are helpers and are left out.

    Raises:
        ConfigError: Running it fails, or a value is not plain data.
    """
    namespace: dict[str, Any] = {"__name__": "widefield_config", "__file__": place}
    try:
        exec(compile(text, place, "exec"), namespace)
    except SyntaxError as error:
        raise ConfigError(f"{place}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
        where = f"{place}, line {lines[-1]}" if lines else place
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    kept = {
        name: _plain(value, (name,), place)
        for name, value in namespace.items()
        if (not name.startswith("_") or name in KEPT_PRIVATE)
        and not isinstance(value, (ModuleType, FunctionType, type))
    }
    return Config(kept, {(): Origin(place)})


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
