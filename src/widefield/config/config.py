"""A configuration: plain data, where each value was written, and what it describes, built."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from widefield.errors import WidefieldError
from widefield.registry import MODELS, Registry, UnknownNameError

Path = tuple[str, ...]
"""Keys from the top down; an index of a list is a key too."""


class ConfigError(WidefieldError, ValueError):
    """A configuration that cannot be used. Each line of the message names a path, what was given, and what was expected."""


@dataclass(frozen=True)
class Origin:
    """The file and line in which a value was written."""

    place: str
    """A file, or the override itself."""
    line: int | None = None

    def __str__(self) -> str:
        return self.place if self.line is None else f"{self.place}, line {self.line}"


@dataclass(frozen=True)
class Config:
    """Dictionaries, lists, texts, numbers, booleans and None, merged from files and overrides.

    Attributes:
        data: The values.
        origins: Where they were written, by path; those of a branch may stand at the branch alone.

    Examples:
        >>> Config({"model": {"type": "LinearClsHead"}}).data["model"]["type"]
        'LinearClsHead'
    """

    data: dict[str, Any]
    origins: Mapping[Path, Origin] = field(default_factory=dict)

    def origin(self, path: Path) -> Origin | None:
        """Return the place where the value at `path` was written, or the nearest branch that holds it."""
        return next((self.origins[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.origins), None)

    def error(self, *problems: tuple[Path, object]) -> ConfigError:
        """Return the error for problems, each a path and what is wrong there."""
        lines = []
        for path, message in problems:
            origin = self.origin(path)
            lines.append(f"{dotted(path)}: {message}" + (f" ({origin})" if origin else ""))
        return ConfigError("\n".join(lines))


def dotted(path: Path) -> str:
    """Return `path` as users write it."""
    return ".".join(path) or "the configuration"


def build(config: Config, path: Path, registry: Registry = MODELS) -> Any:
    """Build the description at `path`.

    Raises:
        ConfigError: A constructor refuses its arguments; the message names the path of the innermost one that does.

    Examples:
        >>> build(Config({"neck": {"type": "GlobalAveragePooling"}}), ("neck",))
        GlobalAveragePooling()
    """
    description: Any = config.data
    for key in path:
        description = description[int(key)] if isinstance(description, list) else description[key]
    try:
        return registry.build(description)
    except Exception as error:
        where, reason = _innermost(description, path, registry) or (path, error)
        raise config.error((where, str(reason) or type(reason).__name__)) from error


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
