"""A registry: components by name, imported when they are asked for.

They are written as plain data, `{type: NAME, argument: value, ...}`; marks of annotations say where such data, or what numbers, are
taken.
"""

import fnmatch
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from widefield.errors import WidefieldError
from widefield.registry.arguments import wrong_names
from widefield.registry.imports import import_object, suggestion
from widefield.registry.index import Entry, as_names, entries_of

_log = logging.getLogger(__name__)
C = TypeVar("C", bound=Callable[..., Any])


class UnknownNameError(WidefieldError, KeyError, ValueError):
    """A registry has no component called `name`."""

    __str__ = Exception.__str__  # that of KeyError shows the message in quotes

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class DuplicateNameError(WidefieldError, KeyError, ValueError):
    """A name is taken."""

    __str__ = Exception.__str__


def split_description(description: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the type (a name, or a class or function) and the arguments; Lightning's class_path and init_args are taken too.

    Raises:
        TypeError: There is no type, or one that cannot be a type.
    """
    if "class_path" in description:
        arguments = {**(description.get("init_args") or {}), **(description.get("dict_kwargs") or {})}
        kind = description["class_path"]
        others = set(description) - {"class_path", "init_args", "dict_kwargs"}
        if others:
            raise TypeError(f"{', '.join(sorted(others))} beside class_path; arguments stand under init_args")
    else:
        arguments = {name: value for name, value in description.items() if name != "type"}
        kind = description.get("type")
    if not (isinstance(kind, str) or callable(kind)):
        given = (
            f"type is {kind!r}"
            if kind is not None
            else f"no type among {', '.join(map(str, description)) or 'nothing'}"
        )
        raise TypeError(f"{given}; name the component, as in {{type: ResNet, depth: 18}}")
    return kind, arguments


@dataclass(frozen=True)
class _Registered:
    component: Callable[..., Any]
    entry: Entry
    place: str
    """File and line of the registration."""


class Registry:
    """Components (classes, or functions that make something) by name.

    A name is looked up among what was registered, then in the index, then among the entry points of installed packages; one
    with a dot is imported: `torch.nn.Linear`. Only what is asked for is imported.

    Args:
        name: What it holds, in the singular, for messages.
        index: Gives the components that are imported on first use; called when a name is first looked for.
        group: The group of entry points in which installed packages name components of theirs.
        sequence: What makes one component of several, as an import path; a list of descriptions is built with it.

    Examples:
        >>> SHAPES = Registry("shape")
        >>> @SHAPES.register_module()
        ... class Circle:
        ...     def __init__(self, radius: float) -> None:
        ...         self.radius = radius
        >>> SHAPES.build({"type": "Circle", "radius": 2.0}).radius
        2.0
    """

    def __init__(
        self,
        name: str,
        index: Callable[[], Iterable[Entry]] = tuple,
        group: str | None = None,
        sequence: str | None = None,
    ) -> None:
        self.name = name
        self._read_index = index
        self._group = group
        self._sequence = sequence
        self._registered: dict[str, _Registered] = {}

    def __repr__(self) -> str:
        return f"Registry({self.name!r}, {len(self.names())} names)"

    def __contains__(self, name: object) -> bool:
        return name in self._registered or name in self.index or name in self._plugins

    def register_module(
        self,
        name: str | Iterable[str] | None = None,
        force: bool = False,
        module: C | None = None,
        *,
        aliases: str | Iterable[str] = (),
        kind: str | None = None,
        replaceable: bool = False,
    ) -> Any:
        """Register a class or function: as a decorator, `@MODELS.register_module()`, or by a call with `module=`.

        Args:
            name: By default that of the class; of several the first is the name and the others are aliases.
            force: Replace whatever has the name.
            module: What to register; None returns a decorator.
            aliases: More names for it.
            kind: What kind of component it is; by default its class attribute `component_kind`, if it has one.
            replaceable: Another component may be registered under the name without `force`.

        Raises:
            DuplicateNameError: The name is taken by something else, and `force` is False.
            TypeError: The name is no text, or what is registered cannot be called.
        """
        frame = sys._getframe(1)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if callable(name):
            raise TypeError("the decorator needs its parentheses: write @MODELS.register_module()")
        names = [*as_names(name, "name"), *as_names(aliases, "aliases")]

        def register(component: C) -> C:
            if not callable(component):
                raise TypeError(f"{component!r} is no class or function, so nothing can be built with it")
            if name is None and not hasattr(component, "__name__"):
                raise TypeError(f"{component!r} has no name of its own; give one with name=")
            all_names = names if name is not None else [component.__name__, *names]
            attribute = getattr(component, "__qualname__", type(component).__name__)  # a partial has none
            own_kind = getattr(component, "component_kind", "") if kind is None else kind
            target = f"{component.__module__}:{attribute}"
            entries = entries_of(all_names, target, own_kind, component.__doc__, replaceable)
            if not force:
                entries = [entry for entry in entries if not self._is_replaced(entry)]
                for entry in entries:
                    self._refuse_duplicate(entry, place, component)
            self._registered |= {entry.name: _Registered(component, entry, place) for entry in entries}
            return component

        return register if module is None else register(module)

    def get(self, name: str, kind: str | None = None, find: Callable[[str], Any] = import_object) -> Callable[..., Any]:
        """Return the component called `name`.

        Args:
            name: As it was registered, or an import path.
            kind: The kind of component that is looked for: a message about a name that does not exist suggests these.
            find: Called with the `package.module:Name` of the component; `outline` imports nothing.

        Raises:
            UnknownNameError: There is none; the message has the near names.
        """
        if name in self._registered:
            held = self._registered[name]
            return held.component if find is import_object else find(held.entry.target)
        target = self.index[name].target if name in self.index else self._plugin_target(name)
        if target is None and ("." in name or ":" in name):
            target = name
        if target is None:
            choices = self.names(kind) or self.names()
            raise UnknownNameError(f"no {kind or self.name} named {name!r}; {suggestion(name, choices)}", name)
        try:
            component = find(target)
        except ValueError as error:
            raise UnknownNameError(f"no {self.name} named {name!r}: {error}", name) from error
        if not callable(component):
            raise UnknownNameError(f"{name} is a {type(component).__name__}, not a class or function", name)
        return component

    def build(self, description: Any, default_args: Mapping[str, Any] | None = None, **defaults: Any) -> Any:
        """Make the component that `description` describes; what is no description is taken as made already.

        Args:
            description: `{type: NAME, argument: value, ...}`, or a list of them, which make a sequence.
            default_args: Arguments where the description has none.
            defaults: The same, by name.

        Raises:
            UnknownNameError: There is no component of that name.
            TypeError: The description has no type, an argument that the component does not take, or lacks one that it needs.
        """
        defaults = {**(default_args or {}), **defaults}
        if isinstance(description, (list, tuple)) and self._sequence:
            return import_object(self._sequence)(*(self.build(one, **defaults) for one in description))
        if description is None or isinstance(description, (str, int, float, list, tuple)):
            raise TypeError(
                f"a {self.name} is described by a dictionary such as {{type: NAME, ...}}, not by {description!r}"
            )
        if not isinstance(description, Mapping):
            return description
        name, arguments = split_description({**defaults, **description})
        component = self.get(name) if isinstance(name, str) else name
        for _, message in wrong_names(component, arguments):
            raise TypeError(message)
        return component(**arguments)

    def names(self, kind: str | None = None) -> list[str]:
        """Return all names, sorted; of one kind, those of no known kind left out."""
        return [entry.name for entry in self.entries(kind=kind)]

    def entries(self, pattern: str = "*", kind: str | None = None) -> list[Entry]:
        """Return what is known of the components whose name matches `pattern`, by name; nothing is imported.

        Args:
            pattern: With `*`, `?` and `[...]`, or a part of the name; case counts for nothing.
            kind: Only those of this kind.
        """
        if not any(wildcard in pattern for wildcard in "*?["):
            pattern = f"*{pattern}*"
        plugins = {name: found[0] for name, found in self._plugins.items()}
        all_entries = plugins | self.index | {name: held.entry for name, held in self._registered.items()}
        return [
            entry
            for name, entry in sorted(all_entries.items(), key=lambda item: item[0].lower())
            if fnmatch.fnmatchcase(name.lower(), pattern.lower()) and kind in (None, entry.kind)
        ]

    def kind(self, name: str) -> str:
        """Return the kind of the component called `name`, an empty text where it is not known."""
        if name in self._registered or name in self.index:
            return (self._registered[name].entry if name in self._registered else self.index[name]).kind
        return str(getattr(self.get(name), "component_kind", ""))

    def _refuse_duplicate(self, entry: Entry, place: str, component: Callable[..., Any]) -> None:
        name = entry.name
        if name in self._registered:
            held = self._registered[name]
            if held.component is component or (held.entry.target == entry.target and held.place == place):
                return  # the same definition, run again
            holder, where = held.entry, held.place
        else:
            known = self.index.get(name) or next(iter(self._plugins.get(name, [])), None)
            if known is None or known.target == entry.target:
                return
            holder, where = known, "part of Widefield" if name in self.index else known.summary
        if holder.replaceable:
            _log.warning("the %s %r of %s takes the place of %s", self.name, name, place, holder.target)
            return
        raise DuplicateNameError(
            f"the {self.name} {name!r} exists already: {holder.target} ({where}); choose another name, "
            f"or replace it with register_module(force=True)"
        )

    def _is_replaced(self, entry: Entry) -> bool:
        """Return True if a component of the index is imported only now that something else was put in its place."""
        indexed, held = self.index.get(entry.name), self._registered.get(entry.name)
        if indexed is None or held is None:
            return False
        return indexed.target == entry.target != held.entry.target

    @cached_property
    def index(self) -> dict[str, Entry]:
        """The components that Widefield brings, by name."""
        return {entry.name: entry for entry in self._read_index()}

    @cached_property
    def _plugins(self) -> dict[str, list[Entry]]:
        """Components of installed packages by name; more than one where packages are at odds."""
        plugins: dict[str, list[Entry]] = {}
        for point in importlib.metadata.entry_points(group=self._group) if self._group else ():
            package = point.dist.name if point.dist else "an installed package"
            plugins.setdefault(point.name, []).append(Entry(point.name, point.value, "", f"from {package}"))
        return plugins

    def _plugin_target(self, name: str) -> str | None:
        found = self._plugins.get(name, [])
        if len({entry.target for entry in found}) > 1:
            holders = ", ".join(f"{entry.target} ({entry.summary})" for entry in found)
            raise DuplicateNameError(f"several packages have a {self.name} {name!r}: {holders}; give the import path")
        return found[0].target if found else None


@dataclass(frozen=True)
class ComponentOf:
    """Marks an annotation: dictionaries given for the argument (or in a list given for it) describe a component.

    `Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "loss")]` takes a module, or the description of a loss.

    Args:
        registry: Where names are looked up.
        kind: The kind of component that is expected; None takes all. A component of no known kind is never refused.
        given: Arguments that whoever builds the component adds.
        also: Names, with their types, that whoever builds the component takes out.
        typed: False where whoever builds the component knows what a dictionary without a type means.
    """

    registry: Registry
    kind: str | None = None
    given: tuple[str, ...] = ()
    also: Mapping[str, Any] = field(default_factory=dict, hash=False)
    typed: bool = True


@dataclass(frozen=True)
class Range:
    """Marks an annotation: numbers given for the argument are finite, and from `least` to `most`.

    `Annotated[int, Range(1)]` takes 1 and more. Arguments and configurations are checked against it before anything is built.

    Examples:
        >>> 0 in Range(1), 3 in Range(1), str(Range(0, 1))
        (False, True, 'from 0 to 1')
    """

    least: float
    most: float = float("inf")

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value != float("inf")

    def __str__(self) -> str:
        return f"at least {self.least}" if self.most == float("inf") else f"from {self.least} to {self.most}"
