"""Settings as frozen dataclasses: made of dictionaries, every key and value checked, all errors of a call collected."""

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar, get_args, get_origin

from widefield.config import Problem, check_value
from widefield.config.check import MAPPINGS, UNIONS, told_in_python
from widefield.registry import Argument, Range, arguments_of, wrong_names

T = TypeVar("T")
Count = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


class Errors(list[str]):
    """Errors in the arguments of a call, a line each."""

    def add(self, problems: Iterable[Problem]) -> None:
        """Append a line for each problem."""
        self.extend(told_in_python(problems))

    def raise_if_any(self, call: str) -> None:
        """Raise ValueError with all of them."""
        if self:
            count = "1 error" if len(self) == 1 else f"{len(self)} errors"
            raise ValueError("\n".join([f"{count} in the arguments of {call}:", *(f"  {line}" for line in self)]))


class Checked:
    """The base class of a dataclass whose fields are compared with their annotations when it is made.

    Raises:
        ValueError: A field does not fit.
    """

    def __post_init__(self) -> None:
        errors = Errors()
        kind: Any = type(self)
        for name, argument in arguments_of(kind).named.items():
            errors.add(check_value(getattr(self, name), argument.annotation, (name,)))
        if errors:
            raise ValueError("; ".join(errors))


def arguments(
    function: Callable[..., Any], given: Mapping[str, Any], errors: Errors, unchecked: Collection[str] = ()
) -> SimpleNamespace:
    """Return the arguments of a call of `function`, which were `given` by name, as attributes of the types of its annotations.

    An attribute has the default, or None, where `errors` gets a line that what was given is of the wrong type or out of range.

    Args:
        function: What is called.
        given: All of its arguments.
        errors: Where a line for each wrong value is appended.
        unchecked: Arguments that stay as they were given: who takes them says better what is wrong with them.
    """

    def value(argument: Argument) -> Any:
        if argument.name in unchecked:
            return given[argument.name]
        default = None if argument.required else argument.default
        return _fitted(given[argument.name], argument.annotation, default, argument.name, errors)

    return SimpleNamespace(**{name: value(argument) for name, argument in arguments_of(function).named.items()})


def updated(default: T, changes: Any, where: str, errors: Errors) -> T:
    """Return `default`, a frozen dataclass, with `changes` by name; None changes nothing.

    A nested dictionary changes only what it names; None in it turns the entry off where the type has None.
    """
    return default if changes is None else _fitted(changes, type(default), default, where, errors)


def values_for(
    function: Any,
    changes: Mapping[str, Any],
    where: str,
    errors: Errors,
    default: Any = None,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Return the values of the arguments `changes` for `function`, each of the type that its annotation says.

    A class may have two tables of the names that users of LightlyTrain know. `also_called` says our name of theirs. `fixed` says of
    an argument that is none here which value of it is what happens, and what to do instead of giving another.

    Args:
        function: What will be called.
        changes: By name.
        where: What the user calls the dictionary.
        errors: Where a line for each wrong name and value is appended.
        default: An object whose attributes are the arguments that `changes` leaves out; None if there are none.
        given: Arguments that the caller adds.
    """
    changes = _in_our_names(function, changes, where, errors)
    known = arguments_of(function).named
    names = changes if default is None else {**known, **changes}
    errors.add(((where, *at), message) for at, message in wrong_names(function, names, given))
    return {
        name: _fitted(value, known[name].annotation, getattr(default, name, None), f"{where}.{name}", errors)
        for name, value in changes.items()
        if name in known
    }


def _in_our_names(function: Any, changes: Mapping[str, Any], where: str, errors: Errors) -> dict[str, Any]:
    """Return `changes` without those that `fixed` allows, under our names; see `values_for`."""
    also_called, fixed = getattr(function, "also_called", {}), getattr(function, "fixed", {})
    renamed: dict[str, Any] = {}
    for name, value in changes.items():
        ours = also_called.get(name, name)
        if name in fixed:
            allowed, advice = fixed[name]
            if value != allowed:
                errors.append(f"{where}.{name}={value!r}; {advice}")
        elif ours != name and ours in changes:
            errors.append(f"{where}.{name} is {ours} under another name; give one of them")
        else:
            renamed[ours] = value
    return renamed


def _fitted(value: Any, kind: Any, default: Any, where: str, errors: Errors) -> Any:
    """Return `value` as its annotation says, and `default` if it does not fit; the text of an enumeration stands for its member."""
    if isinstance(value, StrEnum):
        value = value.value
    if get_origin(kind) in UNIONS:  # in messages the texts say enough
        kinds = (one for one in get_args(kind) if not (isinstance(one, type) and issubclass(one, StrEnum)))
        kind = functools.reduce(operator.or_, kinds)
    if kind is Any:
        return value
    for option in get_args(kind) if get_origin(kind) in UNIONS else (kind,):
        if is_dataclass(option) and isinstance(value, Mapping):
            before, base = len(errors), default if isinstance(default, option) else None  # type: ignore[arg-type]
            values = values_for(option, value, where, errors, base)
            if len(errors) > before:
                return default
            try:
                return option(**values) if base is None else replace(base, **values)  # type: ignore[operator]
            except ValueError as error:
                errors.append(f"{where}: {error}")
                return default
    problems = check_value(value, kind, (where,))
    errors.add(problems)
    return default if problems else _converted(value, kind)


def _converted(value: Any, kind: Any) -> Any:
    """Return a value that fits its annotation with tuples for lists, floats for integers and paths for texts."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _converted(value, inner[0])
    if origin in UNIONS:
        return _converted(value, next(option for option in inner if not check_value(value, option)))
    if origin is tuple:
        return tuple(map(_converted, value, inner[:1] * len(value) if inner[-1] is Ellipsis else inner))
    if kind is float or kind is Path:
        return kind(value)
    return dict(value) if origin in MAPPINGS else value
