"""Settings as frozen dataclasses: made of dictionaries, every key and type checked, all errors of a call collected."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from widefield.registry import suggestion

T = TypeVar("T")


class Errors(list[str]):
    """What is wrong with the arguments of a call, a line each."""

    def raise_if_any(self, call: str) -> None:
        """Raises ValueError with all of them."""
        if self:
            count = "1 error" if len(self) == 1 else f"{len(self)} errors"
            raise ValueError("\n".join([f"{count} in the arguments of {call}:", *(f"  {line}" for line in self)]))


def arguments(kind: type[T], given: Mapping[str, Any], call: str) -> T:
    """A `kind`, a dataclass with a field for every argument of `call`, of the arguments `given` by name.

    Raises:
        ValueError: An argument is of the wrong type; a line for each.
    """
    errors = Errors()
    kinds = typing.get_type_hints(kind)
    values = {name: fitted(given[name], hint, None, name, errors) for name, hint in kinds.items()}
    errors.raise_if_any(call)
    return kind(**values)


def updated(default: T, changes: Any, where: str, errors: Errors) -> T:
    """`default`, a frozen dataclass, with `changes` by name; None changes nothing.

    A nested dictionary changes only what it names; None in it turns the entry off where the type has None.
    """
    if changes is None:
        return default
    if not isinstance(changes, Mapping):
        errors.append(f"{where} must be a dictionary, got {_shown(changes)}")
        return default
    kinds = typing.get_type_hints(type(default))
    values = {}
    for name, value in changes.items():
        path = f"{where}.{name}"
        if name not in kinds:
            errors.append(f"{where} has no key {name!r}; {suggestion(str(name), kinds)}")
            continue
        before = len(errors)
        result = fitted(value, kinds[name], getattr(default, name), path, errors)
        if len(errors) == before:
            values[name] = result
    try:
        return replace(default, **values)  # type: ignore[type-var]
    except ValueError as error:
        errors.append(f"{where}: {error}")
        return default


def made(kind: type[T], given: Any, where: str, errors: Errors) -> T | None:
    """A `kind`, a dataclass, of the dictionary `given`; None if it cannot be made, which `errors` says."""
    if not isinstance(given, Mapping):
        errors.append(f"{where} must be a dictionary, got {_shown(given)}")
        return None
    kinds = typing.get_type_hints(kind)
    values, before = {}, len(errors)
    for name, value in given.items():
        if name not in kinds:
            errors.append(f"{where} has no key {name!r}; {suggestion(str(name), kinds)}")
        else:
            values[name] = fitted(value, kinds[name], None, f"{where}.{name}", errors)
    if len(errors) > before:
        return None
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        errors.append(f"{where}: {str(error).replace(f'{kind.__name__}.__init__() ', '')}")
        return None


def fitted(value: Any, kind: Any, default: Any, where: str, errors: Errors) -> Any:
    """`value` as a `kind`, a type annotation: lists become tuples, integers floats, dictionaries dataclasses."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            if isinstance(default, option):  # type: ignore[arg-type]
                return updated(default, value, where, errors)
            return made(option, value, where, errors)  # type: ignore[arg-type]
    for option in options:
        found, result = _as(value, option)
        if found:
            return result
    if get_origin(kind) is Literal and isinstance(value, str):
        choices = [str(choice) for choice in get_args(kind)]
        near = difflib.get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(map(repr, choices))}"
        errors.append(f"{where}={value!r}; {hint}")
        return default
    errors.append(f"{where} must be {described(kind)}, got {_shown(value)}")
    return default


def described(kind: Any) -> str:
    """A type annotation in words."""
    if get_origin(kind) is Annotated:
        return f"{described(kind.__origin__)}, {' '.join(map(str, kind.__metadata__))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(described(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if inner[-1] is Ellipsis:
            return f"a list of {described(inner[0]).removeprefix('an ').removeprefix('a ')}s"
        return f"({', '.join(described(part) for part in inner)})"
    if is_dataclass(kind):
        names = ", ".join(field.name for field in fields(kind))
        return f"a dictionary with keys among {names}"
    words = {
        int: "an integer",
        float: "a number",
        bool: "True or False",
        str: "a text",
        dict: "a dictionary",
        type(None): "None",
        Path: "a path",
    }
    return words.get(get_origin(kind) or kind, str(getattr(kind, "__name__", kind)))


def _as(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` is a `kind`, and as one."""
    origin = get_origin(kind)
    if kind is Any:
        return True, value
    if origin is Annotated:
        found, result = _as(value, kind.__origin__)
        return found and all(result in bounds for bounds in kind.__metadata__), result
    if origin is Literal:
        return value in get_args(kind), value
    if origin is tuple:
        return _as_tuple(value, get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool), value if value is None else _float(
            value
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind is Path:
        return isinstance(value, (str, Path)), value if not isinstance(value, str) else Path(value)
    target = origin or kind
    if target in (dict, Mapping):
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else value
    return isinstance(target, type) and isinstance(value, target), value


def _float(value: Any) -> Any:
    return float(value) if isinstance(value, (int, float)) else value


def _as_tuple(value: Any, inner: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False, value
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        return False, value
    parts = [_as(part, kind) for part, kind in zip(value, kinds, strict=True)]
    return all(found for found, _ in parts), tuple(part for _, part in parts)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
