"""Annotations in words."""

import collections.abc
import types
import typing
from enum import Enum
from typing import Annotated, Any, Literal, Union

from widefield.registry import ComponentOf, Range

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


def written(value: Any) -> str:
    """A value as one writes it in a configuration."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    return repr(value)


def component_of(annotation: Any) -> ComponentOf | None:
    """The mark of an annotation whose dictionaries describe components."""
    if typing.get_origin(annotation) is not Annotated:
        return None
    return next((mark for mark in annotation.__metadata__ if isinstance(mark, ComponentOf)), None)


def range_of(annotation: Any) -> Range | None:
    """The mark of an annotation whose numbers lie between bounds."""
    if typing.get_origin(annotation) is not Annotated:
        return None
    return next((mark for mark in annotation.__metadata__ if isinstance(mark, Range)), None)


def describe(annotation: Any) -> str:
    """`annotation` in words, such as "int or one of 'linear', 'cubic'"."""
    component = component_of(annotation)
    if component is not None:
        words = f"{{type: {with_article(component.kind or component.registry.name)}, ...}}"
        return f"{words} or null" if NoneType in typing.get_args(annotation.__origin__) else words
    if annotation is None:
        annotation = NoneType
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = range_of(annotation)
        return describe(annotation.__origin__) + (f", {bounds}" if bounds else "")
    if origin is None and annotation in _NAMES:
        return _NAMES[annotation]
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(describe(one) for one in arguments))
    if origin is tuple:
        return _describe_tuple(arguments)
    if origin in SEQUENCES or annotation in SEQUENCES:
        return f"a list of {describe(arguments[0])}" if arguments else "a list"
    if origin in MAPPINGS or annotation in MAPPINGS or typing.is_typeddict(annotation):
        return "a dictionary"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(member.name for member in annotation)
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return "a function by its import path"
    if isinstance(annotation, type):
        return with_article(annotation.__name__)
    return str(annotation)


def _describe_tuple(arguments: tuple[Any, ...]) -> str:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list of {describe(arguments[0])}"
    return f"a list of {len(arguments)} ({', '.join(map(describe, arguments))})" if arguments else "a list"


def with_article(name: str) -> str:
    """`name` behind a or an."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
