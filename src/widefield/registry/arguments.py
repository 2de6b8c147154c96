"""The arguments of a component: its own, and those that its `**kwargs` hand on to the classes above."""

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from widefield.registry.imports import suggestion

REQUIRED: Any = inspect.Parameter.empty
"""The default of an argument that has none."""


@dataclass(frozen=True)
class Argument:
    """An argument that can be given by name."""

    name: str
    annotation: Any
    """The resolved type, `Any` where none is written or it cannot be resolved."""
    default: Any
    owner: Callable[..., Any]
    """The class (or function) whose docstring describes it."""

    @property
    def required(self) -> bool:
        """True if it has no default."""
        return self.default is REQUIRED


@dataclass(frozen=True)
class Arguments:
    """All arguments of a component in the order in which they are written, subclasses first."""

    named: dict[str, Argument]
    open: bool
    """True if names beside these are taken too, because `**kwargs` go somewhere that cannot be followed."""


@cache
def arguments_of(component: Callable[..., Any]) -> Arguments:
    """Return the arguments of a class or function with those that reach a base class through `**kwargs`; of a TypedDict its keys.

    `super().__init__(depth, style="x", **kwargs)` hands on what the base class takes, less what is given there already.
    """
    if typing.is_typeddict(component):
        hints = typing.get_type_hints(component, include_extras=True)
        required: frozenset[str] = component.__required_keys__  # type: ignore[attr-defined]
        defaults = {name: REQUIRED if name in required else None for name in hints}
        return Arguments({name: Argument(name, hints[name], defaults[name], component) for name in hints}, False)
    if not inspect.isclass(component) or _is_made_by_new(component):
        own, variadic = _own(component, component)
        return Arguments(own, variadic is not None)
    named: dict[str, Argument] = {}
    given: set[str] = set()
    for owner in component.__mro__:
        constructor = vars(owner).get("__init__")
        if constructor is None:
            continue
        if owner is object:
            return Arguments(named, False)
        own, variadic = _own(constructor, owner, skip=1)
        named |= {name: own[name] for name in own if name not in given | set(named)}
        if variadic is None:
            break
        call = _super_call(constructor, variadic)
        if call is None:
            return Arguments(_in_order(named), True)
        given |= _given_to_base(call, owner, component.__mro__)
    return Arguments(_in_order(named), False)


def wrong_names(
    component: Callable[..., Any],
    names: Collection[str],
    given: Collection[str] = (),
    also: Iterable[str] = (),
) -> list[tuple[tuple[str, ...], str]]:
    """Return what is wrong with a call of `component` that has arguments of these names.

    Args:
        component: A class or function.
        names: The names.
        given: Arguments that the caller adds; they cannot be among the names.
        also: More names, which the caller takes out.

    Returns:
        A path and a message each: (name,) where the component has no such argument, () where it needs others.
    """
    known = arguments_of(component)
    title = getattr(component, "__name__", str(component))
    accepted = [*(name for name in known.named if name not in given), *also]
    unknown = [name for name in names if name not in accepted and (not known.open or name in given)]
    wrong: list[tuple[tuple[str, ...], str]] = [
        ((str(name),), f"{title} has no argument {name!r}; {suggestion(str(name), accepted)}") for name in unknown
    ]
    missing = [one.name for one in known.named.values() if one.required and one.name not in {*names, *given}]
    return [*wrong, ((), f"{title} needs {', '.join(missing)}")] if missing else wrong


def _is_made_by_new(component: type) -> bool:
    constructors = (name for owner in component.__mro__ for name in ("__init__", "__new__") if name in vars(owner))
    return next(constructors) == "__new__"


def _in_order(named: dict[str, Argument]) -> dict[str, Argument]:
    return dict(sorted(named.items(), key=lambda item: not item[1].required))  # required first, else as they came


def _own(
    function: Callable[..., Any], owner: Callable[..., Any], skip: int = 0
) -> tuple[dict[str, Argument], str | None]:
    """Return the arguments that `function` declares, and the name of its `**kwargs`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):  # some builtins have no signature
        return {}, "kwargs"
    hints = _hints(function)
    named = {
        parameter.name: Argument(parameter.name, hints.get(parameter.name, Any), parameter.default, owner)
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    variadic = next((parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD), None)
    return named, variadic


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # names under TYPE_CHECKING, or what an annotation may raise: keep those that are no text
        written = getattr(function, "__annotations__", {})
        return {name: hint for name, hint in written.items() if not isinstance(hint, str)}


def _super_call(constructor: Callable[..., Any], variadic: str) -> ast.Call | None:
    """Return the call `super().__init__(..., **kwargs)` in the source of a constructor, if that is where its `**kwargs` go."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):
        return ast.parse("super().__init__()").body[0].value  # type: ignore[attr-defined]  # no source: the usual thing
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and any(
            keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == variadic
            for keyword in call.keywords
        ):
            method = ast.unparse(call.func)
            return call if method.startswith("super(") and method.endswith(".__init__") else None
    return None


def _given_to_base(call: ast.Call, owner: type, mro: tuple[type, ...]) -> set[str]:
    """Names that a call of the base class's constructor fills in."""
    given = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    base = next((base for base in mro[mro.index(owner) + 1 :] if "__init__" in vars(base)), object)
    positional = [] if base is object else list(_own(vars(base)["__init__"], base, skip=1)[0])
    return given | set(positional[: len(call.args)])
