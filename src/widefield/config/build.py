"""Build what a configuration describes; an error says which part of it could not be built."""

from collections.abc import Iterator
from typing import Any

from widefield.config.config import Config, Path
from widefield.registry import MODELS, Registry, UnknownNameError


def build(config: Config, path: Path, registry: Registry = MODELS) -> Any:
    """Build the description at `path`.

    Raises:
        ConfigError: A constructor refuses its arguments; the message names the path of the innermost one that does.
    """
    description: Any = config.data
    for key in path:
        description = description[int(key)] if isinstance(description, list) else description[key]
    try:
        return registry.build(description)
    except Exception as error:
        where, reason = _innermost(description, path, registry) or (path, error)
        raise config.error([(where, str(reason) or type(reason).__name__)]) from error


def _innermost(description: Any, path: Path, registry: Registry) -> tuple[Path, Exception] | None:
    """Return the first part of `description`, from the inside out, that cannot be built by itself, and why.

    Components build their own parts, so an error of a part comes without the path to it.
    """
    for where, part in _inside_out(description, path):
        if isinstance(part.get("type"), str) and part["type"] in registry:
            try:
                registry.build(part)
            except Exception as error:
                return (_unknown(part, where, error.name) if isinstance(error, UnknownNameError) else where), error
    return None


def _unknown(value: Any, path: Path, name: str) -> Path:
    """Return the path inside of `value` at which the type `name` stands."""
    return next((where for where, part in _inside_out(value, path) if part.get("type") == name), path)


def _inside_out(value: Any, path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _inside_out(part, (*path, str(key)))
    if isinstance(value, dict):
        yield path, value
