"""Annotations in words, and what is said of a value that does not fit one."""

import collections.abc
import dataclasses
import types
import typing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal, Union

from widefield.registry import ComponentOf, Range, near_names

NoneType = type(None)
UNIONS = (Union, types.UnionType)
SEQUENCES = (
    list,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_NAMES = {int: "int", float: "a number", bool: "true or false", str: "a text", NoneType: "null", Any: "anything"}
_PYTHON_NAMES = {**_NAMES, bool: "True or False", NoneType: "None"}
_SHOWN = 60


@dataclass(frozen=True)
class Mismatch:
    """A value, and the annotation that it does not fit; `str()` says so as one writes a configuration."""

    value: Any
    annotation: Any

    def __str__(self) -> str:
        return self.words(written(self.value))

    def in_python(self) -> str:
        """Return what is wrong as one writes it in Python."""
        return self.words(repr(self.value), python=True)

    def words(self, shown: str, python: bool = False) -> str:
        """Return the message with `shown` for the value."""
        shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
        choices = typing.get_args(self.annotation) if typing.get_origin(self.annotation) is Literal else ()
        texts = [choice for choice in choices if isinstance(choice, str)]
        near = near_names(self.value, texts) if isinstance(self.value, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"got {shown}, expected {describe(self.annotation, python)}{hint}"


def written(value: Any) -> str:
    """Return a value as one writes it in a configuration."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    return repr(value)


def component_of(annotation: Any) -> ComponentOf | None:
    """Return the mark of an annotation whose dictionaries describe components."""
    if typing.get_origin(annotation) is not Annotated:
        return None
    return next((mark for mark in annotation.__metadata__ if isinstance(mark, ComponentOf)), None)


def range_of(annotation: Any) -> Range | None:
    """Return the mark of an annotation whose numbers lie between bounds."""
    if typing.get_origin(annotation) is not Annotated:
        return None
    return next((mark for mark in annotation.__metadata__ if isinstance(mark, Range)), None)


def describe(annotation: Any, python: bool = False) -> str:
    """Return `annotation` in words, such as "int or one of 'linear', 'cubic'"; as one writes Python, or a configuration."""
    names = _PYTHON_NAMES if python else _NAMES
    words = partial(describe, python=python)
    component = component_of(annotation)
    if component is not None:
        dictionary = f"{{type: {with_article(component.kind or component.registry.name)}, ...}}"
        optional = NoneType in typing.get_args(annotation.__origin__)
        return f"{dictionary} or {names[NoneType]}" if optional else dictionary
    if annotation is None:
        annotation = NoneType
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = range_of(annotation)
        return words(annotation.__origin__) + (f", {bounds}" if bounds else "")
    if origin is None and annotation in names:
        return names[annotation]
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(map(words, arguments)))
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} ({', '.join(map(words, arguments))})"
    if (origin or annotation) is tuple or origin in SEQUENCES or annotation in SEQUENCES:
        return f"a list of {words(arguments[0])}" if arguments else "a list"
    if origin in MAPPINGS or annotation in MAPPINGS or typing.is_typeddict(annotation):
        return "a dictionary"
    if dataclasses.is_dataclass(annotation):
        return f"a dictionary with keys among {', '.join(field.name for field in dataclasses.fields(annotation))}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(member.name for member in annotation)
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return "a function by its import path"
    if isinstance(annotation, type):
        return with_article(annotation.__name__)
    return str(annotation)


def with_article(name: str) -> str:
    """Return `name` behind a or an."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
