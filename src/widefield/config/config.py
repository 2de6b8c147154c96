"""A configuration: plain data, and where each value was written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from widefield.errors import WidefieldError

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
    """

    data: dict[str, Any]
    origins: Mapping[Path, Origin] = field(default_factory=dict)

    def origin(self, path: Path) -> Origin | None:
        """Return the place where the value at `path` was written, or the nearest branch that holds it."""
        return next((self.origins[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.origins), None)

    def error(self, problems: Iterable[tuple[Path, object]]) -> ConfigError:
        """Return the error for problems, each a path and what is wrong there."""
        lines = []
        for path, message in problems:
            origin = self.origin(path)
            lines.append(f"{dotted(path)}: {message}" + (f" ({origin})" if origin else ""))
        return ConfigError("\n".join(lines))


def dotted(path: Path) -> str:
    """Return `path` as users write it."""
    return ".".join(path) or "the configuration"
