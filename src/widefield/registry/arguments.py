"""The arguments of a component: its own, and those that its `**kwargs` hand on to the classes above."""

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
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
    set_here: dict[str, Any] = {}
    owners = list(component.__mro__)
    while owners:
        owner = owners.pop(0)
        constructor = vars(owner).get("__init__")
        if constructor is None:
            continue
        if owner is object:
            break
        own, variadic = _own(constructor, owner, skip=1)
        named |= {name: own[name] for name in own if name not in given | set(named)}
        if variadic is None:
            break
        use = _use_of(constructor, variadic, owner, [one for one in owners if "__init__" in vars(one)])
        named |= {name: argument for name, argument in use.popped.items() if name not in given | set(named)}
        set_here = use.defaults | set_here
        if use.base is None:
            return Arguments(_in_order(_with_defaults(named, set_here)), True)
        given |= use.given
        owners = owners[owners.index(use.base) :]
    return Arguments(_in_order(_with_defaults(named, set_here)), False)


def wrong_names(
    component: Callable[..., Any], names: Collection[str], given: Collection[str] = (), also: Iterable[str] = ()
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


def _with_defaults(named: dict[str, Argument], defaults: dict[str, Any]) -> dict[str, Argument]:
    return {
        name: replace(argument, default=defaults[name]) if argument.required and name in defaults else argument
        for name, argument in named.items()
    }


@dataclass(frozen=True)
class _Use:
    """The use that a constructor makes of its `**kwargs`.

    Attributes:
        popped: Arguments that it takes out: `kwargs.pop("name", default)`.
        defaults: Values that it sets where none is given, by name: `kwargs.setdefault("name", value)`, `kwargs["name"] = value`.
        base: The class whose constructor gets the rest; None where that cannot be told.
        given: Names that this constructor does not get from outside.
    """

    popped: dict[str, Argument]
    defaults: dict[str, Any]
    base: type | None
    given: set[str]


def _use_of(constructor: Callable[..., Any], variadic: str, owner: type, bases: list[type]) -> _Use:
    """Read from the source of a constructor where its `**kwargs` go; without source nothing is known.

    Args:
        constructor: Of `owner`.
        variadic: The name of its `**kwargs`.
        owner: The class.
        bases: Classes above it that have a constructor, nearest first.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):
        return _Use({}, {}, None, set())
    popped: dict[str, Argument] = {}
    defaults: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            defaults |= {
                str(_literal(target.slice)): _literal(node.value)
                for target in node.targets
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == variadic
            }
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{variadic}.update":
            defaults |= {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{variadic}.setdefault":
            defaults[str(_literal(node.args[0]))] = _literal(node.args[-1])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{variadic}.pop" and node.args:
            key, *default = map(_literal, node.args)
            popped[str(key)] = Argument(str(key), Any, default[0] if default else REQUIRED, owner)
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(
            keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == variadic
            for keyword in node.keywords
        )
    ]
    for call in calls:
        method = ast.unparse(call.func)
        if not method.endswith(".__init__"):
            continue
        name, arguments = method.removesuffix(".__init__"), call.args
        base = next(iter(bases), None)
        if not name.startswith("super("):  # Base.__init__(self, **kwargs)
            base = next((one for one in bases if one.__name__ == name.rpartition(".")[2]), None)
            arguments = arguments[1:]
        if base is not None:
            positional = [] if base is object else list(_own(vars(base)["__init__"], base, skip=1)[0])
            # `*args` of the constructor is empty where all is given by name
            count = sum(not isinstance(argument, ast.Starred) for argument in arguments)
            named = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
            return _Use(popped, defaults, base, {*popped, *named, *positional[:count]})
    return _Use(popped, defaults, None, set())


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
