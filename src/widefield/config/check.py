"""Compare a configuration with the types in the constructors that it will be given to, before anything is built."""

import collections.abc
import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, NewType, TypeVar

from widefield.config.config import Path
from widefield.config.expected import MAPPINGS, SEQUENCES, UNIONS, Mismatch, NoneType, component_of, range_of
from widefield.registry import (
    MODELS,
    Argument,
    ComponentOf,
    arguments_of,
    import_object,
    split_description,
    suggestion,
    wrong_names,
)

Problem = tuple[Path, str | Mismatch]
"""A path, and what is wrong there."""


def check_value(value: Any, annotation: Any, path: Path = ()) -> list[Problem]:
    """Return what is wrong with `value` for an argument annotated so; nothing where the annotation says nothing.

    YAML has no tuples and no enumerations: a list does for any sequence, the name of a member for the member. Where a class is
    expected, `{type: NAME, ...}` describes an instance.
    """
    if isinstance(annotation, NewType):
        annotation = annotation.__supertype__
    if typing.is_typeddict(annotation):
        is_dictionary = isinstance(value, Mapping)
        return check_arguments(annotation, value, path) if is_dictionary else _mismatch(value, annotation, path)
    component = component_of(annotation)
    if component is not None:
        return _check_marked(value, annotation.__origin__, component, path)
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        bounds, problems = range_of(annotation), check_value(value, annotation.__origin__, path)
        return _mismatch(value, annotation, path) if bounds and (problems or value not in bounds) else problems
    if origin in UNIONS:
        return _check_union(value, annotation, path)
    if annotation is None or annotation is NoneType:
        return [] if value is None else _mismatch(value, annotation, path)
    if annotation is Any or isinstance(annotation, (str, TypeVar)):
        return _check_untyped(value, path)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in typing.get_args(annotation))
        return [] if fits else _mismatch(value, annotation, path)
    if annotation in (bool, int, float, str):
        return [] if _is_plain(value, annotation) else _mismatch(value, annotation, path)
    if (origin or annotation) is tuple or origin in SEQUENCES or annotation in SEQUENCES:
        return _check_items(value, annotation, path)
    if origin in MAPPINGS or annotation in MAPPINGS:
        return _check_mapping(value, annotation, path)
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return _check_callable(value, annotation, path)
    if isinstance(annotation, type) and not getattr(annotation, "_is_protocol", False):
        return _check_instance(value, annotation, path)
    return []  # type[...], protocols and other rarities: their constructors decide


def check_description(description: Any, component: ComponentOf, path: Path = ()) -> list[Problem]:
    """Return what is wrong with the description of a component: its name, its kind, its arguments."""
    try:
        name, arguments = split_description(description)
        found = component.registry.get(name, component.kind) if isinstance(name, str) else name
    except (ValueError, TypeError) as error:
        return [(path, str(error))]
    except ImportError as error:
        return [(path, f"{description['type']} cannot be imported: {error}")]
    kind = component.registry.kind(name) if isinstance(name, str) else ""
    if component.kind and kind and kind != component.kind:
        choices = ", ".join(component.registry.names(component.kind))
        return [(path, f"{name} is a {kind}, expected a {component.kind}: {choices or 'there are none yet'}")]
    return check_arguments(found, arguments, path, component.given, component.also)


def check_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    path: Path = (),
    given: tuple[str, ...] = (),
    also: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Return what is wrong with `arguments` for a function or class: unknown names, values of another type, missing arguments.

    Args:
        function: What will be called.
        arguments: By name.
        path: Where they stand.
        given: Arguments that the caller adds; they cannot be in `arguments`.
        also: More names, with their types, that the caller takes out.
    """
    known = arguments_of(function).named
    annotations = {name: _with_default(argument) for name, argument in known.items()} | dict(also or {})
    wrong = wrong_names(function, arguments, given, also or {})
    unknown = {at[0] for at, _ in wrong if at}
    problems: list[Problem] = [((*path, *at), message) for at, message in wrong]
    for name, value in arguments.items():
        if str(name) not in unknown:
            problems += check_value(value, annotations.get(name, Any), (*path, str(name)))
    return problems


def find_class(name: str, base: type) -> type:
    """Return the class called `name`: by its import path, or by its name alone if it is a loaded subclass of `base`.

    Raises:
        ValueError: There is none.
    """
    if "." in name or ":" in name:
        found = import_object(name)
        if not isinstance(found, type):
            raise ValueError(f"{name} is no class")
        return found
    loaded = {known.__name__: known for known in _subclasses(base)}
    if name not in loaded:
        raise ValueError(f"no {base.__name__} named {name!r}; {suggestion(name, loaded)}")
    return loaded[name]


def _subclasses(base: type) -> list[type]:
    direct: list[type] = type.__subclasses__(base)
    return [base, *(known for one in direct for known in _subclasses(one))]


def _with_default(argument: Argument) -> Any:
    """Return the annotation of an argument; `x: int = None` takes None."""
    annotation = argument.annotation
    takes_none = argument.default is None and isinstance(annotation, type) and annotation is not Any
    return annotation | None if takes_none else annotation


def _mismatch(value: Any, annotation: Any, path: Path) -> list[Problem]:
    return [(path, Mismatch(value, annotation))]


def _is_plain(value: Any, annotation: type) -> bool:
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def _check_marked(value: Any, annotation: Any, component: ComponentOf, path: Path) -> list[Problem]:
    if isinstance(value, Mapping):
        known = component.typed or {"type", "class_path"} & value.keys()
        return check_description(value, component, path) if known else []
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
        if check_value([], annotation, path):
            return _mismatch(value, Annotated[annotation, component], path)
        return [
            problem for k, item in enumerate(value) for problem in check_description(item, component, (*path, str(k)))
        ]
    return _mismatch(value, Annotated[annotation, component], path) if check_value(value, annotation, path) else []


def _check_union(value: Any, annotation: Any, path: Path) -> list[Problem]:
    """Return nothing if an alternative fits; else the problems of the one that fits best: those further inside, or a range."""
    choices = typing.get_args(annotation)
    attempts = [check_value(value, one, path) for one in choices]
    if not all(attempts):
        return []
    inside = [
        attempt
        for attempt, one in zip(attempts, choices, strict=True)
        if attempt != _mismatch(value, one, path) or (range_of(one) and not check_value(value, one.__origin__))
    ]
    return min(inside, key=len) if inside else _mismatch(value, annotation, path)


def _check_untyped(value: Any, path: Path) -> list[Problem]:
    """Check descriptions inside of a value without annotation if their type is the name of a component."""
    if isinstance(value, (list, tuple)):
        return [problem for k, item in enumerate(value) for problem in _check_untyped(item, (*path, str(k)))]
    if not isinstance(value, Mapping):
        return []
    if isinstance(value.get("type"), str) and value["type"] in MODELS:
        return check_description(value, ComponentOf(MODELS), path)
    return [problem for key, item in value.items() for problem in _check_untyped(item, (*path, str(key)))]


def _check_items(value: Any, annotation: Any, path: Path) -> list[Problem]:
    if not isinstance(value, collections.abc.Sequence) or isinstance(value, str):
        return _mismatch(value, annotation, path)
    types = typing.get_args(annotation)
    if (typing.get_origin(annotation) or annotation) is tuple and types[1:] != (Ellipsis,) and types:
        if len(value) != len(types):
            return _mismatch(value, annotation, path)
    else:
        types = (types[0] if types else Any,) * len(value)
    return [
        problem
        for k, (item, one) in enumerate(zip(value, types, strict=True))
        for problem in check_value(item, one, (*path, str(k)))
    ]


def _check_mapping(value: Any, annotation: Any, path: Path) -> list[Problem]:
    if not isinstance(value, Mapping):
        return _mismatch(value, annotation, path)
    _, item_type = typing.get_args(annotation) or (Any, Any)
    if item_type is Any:
        return _check_untyped(value, path)
    return [problem for key, item in value.items() for problem in check_value(item, item_type, (*path, str(key)))]


def _check_callable(value: Any, annotation: Any, path: Path) -> list[Problem]:
    if isinstance(value, str):
        try:
            value = import_object(value)
        except (ValueError, ImportError) as error:
            return [(path, str(error))]
    return (
        []
        if callable(value) or (isinstance(value, Mapping) and "type" in value)
        else _mismatch(value, annotation, path)
    )


def _check_instance(value: Any, annotation: type, path: Path) -> list[Problem]:
    if isinstance(value, annotation):
        return []
    if issubclass(annotation, os.PathLike):
        return [] if isinstance(value, str) else _mismatch(value, annotation, path)
    if issubclass(annotation, Enum):
        return [] if value in annotation.__members__ else _mismatch(value, annotation, path)
    if not isinstance(value, Mapping):
        return _mismatch(value, annotation, path)
    if "type" not in value and "class_path" not in value:
        if dataclasses.is_dataclass(annotation):
            return check_arguments(annotation, value, path)
        return _mismatch(value, annotation, path)
    try:
        name, arguments = split_description(value)
        known = isinstance(name, str) and name in MODELS and not _is_loaded(name, annotation)
        found = MODELS.get(name) if known else find_class(name, annotation) if isinstance(name, str) else name
    except (ValueError, TypeError, ImportError) as error:
        return [(path, str(error))]
    if isinstance(found, type) and not issubclass(found, annotation):
        return [(path, f"{name} is no {annotation.__name__}, which is expected here")]
    return check_arguments(found, arguments, path)


def _is_loaded(name: str, base: type) -> bool:
    return any(known.__name__ == name for known in _subclasses(base))
