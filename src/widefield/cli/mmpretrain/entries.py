"""The entries of a dictionary of theirs, taken one by one, so that none is lost in silence."""

from collections.abc import Iterable, Mapping
from typing import Any

from widefield.config import Problem
from widefield.config.check import written
from widefield.config.config import Path

Notes = list[Problem]
"""Paths in their configuration, and what became of the values there if it is not the same here."""


class Entries:
    """A dictionary whose values are taken; `finish` notes those that nobody took."""

    def __init__(self, value: Mapping[str, Any], path: Path, notes: Notes) -> None:
        self._left = dict(value)
        self.path = path
        self.notes = notes
        self.type = bare(self._left.pop("type", ""))

    def take(self, name: str, default: Any = None) -> Any:
        """Return the value called `name`, which is then accounted for."""
        return self._left.pop(name, default)

    def present(self, *same: str, **names: str) -> dict[str, Any]:
        """Return the values that are there, some under new names: `present("padding", crop_size="size")`."""
        new_names = {name: name for name in same} | names
        return {new: self._left.pop(old) for old, new in new_names.items() if old in self._left}

    def note(self, message: str, *names: str) -> None:
        """Note something about the dictionary, or about one of its values."""
        self.notes.append(((*self.path, *names), message))

    def missing(self, instead: str) -> None:
        """Note that what the type names is not here, and what becomes of it."""
        self.note(f"{self.type} is not here; {instead}", "type")

    def finish(self, *harmless: str) -> None:
        """Note each value that was not taken, but for those that mean nothing here."""
        for name, value in self._left.items():
            if name not in harmless and value is not None:
                self.note(f"{_short(value)} was left out: there is nothing of the kind here", str(name))


def bare(name: Any) -> str:
    """Return the name of a type without its scope: `mmpretrain.ResNet` is `ResNet`."""
    scope, dot, rest = str(name).partition(".")
    return rest if dot and scope in ("mmpretrain", "mmcls", "mmengine", "mmcv") else str(name)


def listed(value: Any) -> list[Any]:
    """Return a list of what may be one thing, several, or nothing."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def plain(values: Iterable[float]) -> list[float]:
    """Return numbers, whole ones as integers."""
    return [int(value) if float(value).is_integer() else value for value in values]


def _short(value: Any) -> str:
    text = written(value)
    return text if len(text) < 60 else f"{text[:57]}..."
