"""Compare a configuration with the types in the constructors that it will be given to, before anything is built.

An error says in words what was expected: `describe` has the words of an annotation, `Mismatch` the sentence.
"""

import collections.abc
import dataclasses
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal, NewType, ParamSpec, TypeVar, Union

from widefield.config.config import Path, dotted
from widefield.errors import WrongArgumentError
from widefield.registry import (
    MODELS,
    Argument,
    ComponentOf,
    Range,
    arguments_of,
    import_object,
    near_names,
    split_description,
    suggestion,
    wrong_names,
)

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
_NUMBERS = {int: numbers.Integral, float: numbers.Real}
"""Types of numbers with NumPy's, by the annotations that take them."""
_SHOWN = 60
M = TypeVar("M")
P = ParamSpec("P")
T = TypeVar("T")


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


Problem = tuple[Path, str | Mismatch]
"""A path, and what is wrong there."""


def told_in_python(problems: Iterable[Problem]) -> list[str]:
    """Return a line for each problem as one writes it in Python."""
    return [f"{dotted(path)}: {what.in_python() if isinstance(what, Mismatch) else what}" for path, what in problems]


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
    component = mark_of(annotation, ComponentOf)
    if component is not None:
        return _check_marked(value, annotation.__origin__, component, path)
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        bounds, problems = mark_of(annotation, Range), check_value(value, annotation.__origin__, path)
        return _mismatch(value, annotation, path) if bounds and (problems or value not in bounds) else problems
    if origin in UNIONS:
        return _check_union(value, annotation, path)
    if annotation is None or annotation is NoneType:
        return [] if value is None else _mismatch(value, annotation, path)
    if annotation is Any or isinstance(annotation, (str, TypeVar)):
        return _check_untyped(value, path)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in typing.get_args(annotation))
        return [] if fits else _mismatch(value, annotation, path)
    if annotation in (bool, int, float, str):
        return [] if _is_plain(value, annotation) else _mismatch(value, annotation, path)
    kind = origin or annotation
    if kind is tuple or kind in SEQUENCES:
        return _check_items(value, annotation, path)
    if kind in MAPPINGS:
        return _check_mapping(value, annotation, path)
    if kind is collections.abc.Callable:
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


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Return `function`, which refuses arguments that its annotations do not take before it does anything.

    The error is a WrongArgumentError, a ValueError, that names the function, or the class of a constructor, and the arguments.
    """
    signature, of = inspect.signature(function), function.__qualname__.removesuffix(".__init__")
    plain = [one.name for one in signature.parameters.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs).arguments
        annotations = typing.get_type_hints(function, include_extras=True)
        known = [name for name in plain if name in given and name in annotations]
        problems = [one for name in known for one in check_value(given[name], annotations[name], (name,))]
        if problems:
            raise WrongArgumentError(f"{of} cannot be called so: {'; '.join(told_in_python(problems))}")
        return function(*args, **kwargs)

    return checking


def find_class(name: str, base: type) -> type:
    """Return the class called `name`: by its import path, or by its name alone if it is a loaded subclass of `base`.

    Of several with one name it is ours, Lightning's or torch's, whatever else has been imported (bitsandbytes has an SGD, too).

    Raises:
        ValueError: There is none, or there are several of other libraries.
    """
    if "." in name or ":" in name:
        found = import_object(name)
        if not isinstance(found, type):
            raise ValueError(f"{name} is no class")
        return found
    loaded = {known.__name__: known for known in _subclasses(base)}
    if name not in loaded:
        usable = [known for known in loaded.values() if known is not base and not _is_internal(known)]
        raise ValueError(f"no {base.__name__} named {name!r}; {suggestion(name, (one.__name__ for one in usable))}")
    several = {(one.__module__, one.__qualname__): one for one in _subclasses(base) if one.__name__ == name}
    of_package = {module.partition(".")[0]: one for (module, _), one in several.items()}
    at_home = [of_package[package] for package in ("widefield", "lightning", "torch") if package in of_package]
    if not at_home and len(several) > 1:
        paths = " or ".join(f"{module}.{name}" for module, _ in several)
        raise ValueError(f"there are several classes named {name!r}: give the import path, {paths}")
    return at_home[0] if at_home else loaded[name]


def _is_internal(known: type) -> bool:
    """Return True for classes that are no choice for a user: private ones, and those that stand in for others in tests."""
    return known.__name__.startswith(("_", "Mock")) or bool({"testing", "mock"} & {*known.__module__.split(".")})


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
    return isinstance(value, _NUMBERS.get(annotation, annotation))


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
        if attempt != _mismatch(value, one, path)
        or (mark_of(one, Range) is not None and not check_value(value, one.__origin__))
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
        return _mismatch(value, annotation, path) if member(annotation, value) is None else []
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


def member(enumeration: type[Enum], value: Any) -> Enum | None:
    """The member that a configuration names by its name or its value; None if there is none."""
    return next((one for one in enumeration if value in (one, one.name, one.value)), None)


def _is_loaded(name: str, base: type) -> bool:
    return any(known.__name__ == name for known in _subclasses(base))


def written(value: Any) -> str:
    """Return a value as one writes it in a configuration."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    return repr(value)


def mark_of(annotation: Any, kind: type[M]) -> M | None:
    """Return the mark of an annotation: a `ComponentOf` if dictionaries describe components, a `Range` if numbers are bounded."""
    marks = annotation.__metadata__ if typing.get_origin(annotation) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def describe(annotation: Any, python: bool = False) -> str:
    """Return `annotation` in words, such as "int or one of 'linear', 'cubic'"; as one writes Python, or a configuration."""
    names = _PYTHON_NAMES if python else _NAMES
    words = partial(describe, python=python)
    component = mark_of(annotation, ComponentOf)
    if component is not None:
        dictionary = f"{{type: {with_article(component.kind or component.registry.name)}, ...}}"
        optional = NoneType in typing.get_args(annotation.__origin__)
        return f"{dictionary} or {names[NoneType]}" if optional else dictionary
    if annotation is None:
        annotation = NoneType
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = mark_of(annotation, Range)
        return words(annotation.__origin__) + (f", {bounds}" if bounds else "")
    if origin is None and annotation in names:
        return names[annotation]
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(map(words, arguments)))
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} ({', '.join(map(words, arguments))})"
    kind = origin or annotation
    if kind is tuple or kind in SEQUENCES:
        return f"a list of {words(arguments[0])}" if arguments else "a list"
    if kind in MAPPINGS or typing.is_typeddict(annotation):
        return "a dictionary"
    if dataclasses.is_dataclass(annotation):
        return f"a dictionary with keys among {', '.join(field.name for field in dataclasses.fields(annotation))}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(one.value if isinstance(one.value, str) else one.name for one in annotation)
    if kind is collections.abc.Callable:
        return "a function by its import path"
    if isinstance(annotation, type):
        return with_article(annotation.__name__)
    return str(annotation)


def with_article(name: str) -> str:
    """Return `name` behind a or an."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
