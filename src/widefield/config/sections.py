"""The top-level keys of a configuration, and what each of them describes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from widefield.config.check import Mismatch, Problem, check_arguments, check_description, check_value, find_class
from widefield.config.config import Config, Path
from widefield.registry import ComponentOf, Range, import_object, suggestion


@dataclass(frozen=True)
class Section:
    """A top-level key whose value is a description.

    Args:
        component: What a `type` names, if it is a name of the registry.
        base: Import path of the class of everything else that a `type` may name.
        default: Import path of the class whose arguments stand here where there is no `type`.
        given: Arguments that are added when the class is called.
        given_to: Import path of the class whose subclasses they are added for; None adds them for all.
        also: More names, with their types, that are taken out before the class is called.
        ranges: Of arguments whose classes do not say, or not at once, which numbers they take.
        several: Whether a list of descriptions may stand here too.
    """

    component: ComponentOf | None = None
    base: str | None = None
    default: str | None = None
    given: tuple[str, ...] = ()
    given_to: str | None = None
    also: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    several: bool = False

    def resolve(self, value: Mapping[str, Any]) -> Any:
        """Return the class that `value` describes, or None where it names no type and there is no default.

        Raises:
            ValueError: There is no such class.
        """
        name = value.get("type")
        if name is None:
            return None if self.default is None else import_object(self.default)
        if self._is_component(name):
            assert self.component is not None
            return self.component.registry.get(name, self.component.kind)
        assert self.base is not None
        return find_class(name, import_object(self.base))

    def check(self, value: Any, path: Path) -> list[Problem]:
        """Return what is wrong with `value`."""
        if self.several and isinstance(value, list):
            return [problem for k, one in enumerate(value) for problem in self.check(one, (*path, str(k)))]
        if not isinstance(value, dict):
            return [(path, Mismatch(value, dict))]
        if self._is_component(value.get("type")):
            assert self.component is not None
            return [*check_description(value, self.component, path), *self._outside(value, path)]
        try:
            function = self.resolve(value)
        except (ValueError, ImportError) as error:
            return [(path, str(error))]
        if function is None:
            return [(path, "names no type; write which component it is, as in type: ImageClassifier")]
        if self.base is not None and not issubclass(function, base := import_object(self.base)):
            return [(path, f"{value['type']} is no {base.__name__}, which is expected here")]
        arguments = {name: item for name, item in value.items() if name != "type"}
        is_given = self.given_to is None or issubclass(function, import_object(self.given_to))
        given = self.given if is_given else ()
        return [*check_arguments(function, arguments, path, given, self.also), *self._outside(arguments, path)]

    def _outside(self, arguments: Mapping[str, Any], path: Path) -> list[Problem]:
        """Return the numbers that are out of range."""
        given = {name: arguments.get(name) for name in self.ranges}
        return [
            ((*path, name), Mismatch(value, Annotated[float, self.ranges[name]]))
            for name, value in given.items()
            if isinstance(value, (int, float)) and value not in self.ranges[name]
        ]

    def _is_component(self, name: Any) -> bool:
        if self.component is None or name is None:
            return False
        return self.base is None or name in self.component.registry or "." not in str(name)


@dataclass(frozen=True)
class Foreign:
    """A top-level key of another system.

    Args:
        here: What is written in its place.
        is_harmless: Tells whether a value is accepted, without effect; None accepts none.
    """

    here: str
    is_harmless: Callable[[Any], bool] | None = None

    def check(self, value: Any, path: Path) -> list[Problem]:
        """Return what to write instead, unless the value is harmless."""
        if self.is_harmless is not None and self.is_harmless(value):
            return []
        return [(path, f"a key of MMPretrain; here: {self.here} (widefield config convert translates a whole file)")]


_FEW = 3
"""Keys of another system that are answered one by one; a file with more of them is one of that system."""
Sections = Mapping[str, Any]
"""By key: a section, a key of another system, or the annotation of a plain value."""


def check_config(config: Config, sections: Sections) -> None:
    """Compare all of `config` with the constructors that it will be given to; a section that is None counts as left out.

    Raises:
        ConfigError: One line for each problem: path, value, what was expected, where it was written.
    """
    problems: list[Problem] = []
    foreign: list[Problem] = []
    for key, value in config.data.items():
        section = sections.get(key)
        if section is None:
            problems.append(((key,), unknown_section(key, sections)))
        elif isinstance(section, Section):
            problems += [] if value is None else section.check(value, (key,))
        elif isinstance(section, Foreign):
            foreign += section.check(value, (key,))
        else:
            problems += check_value(value, section, (key,))
    if len(foreign) > _FEW:
        (first, _), *others = foreign
        message = f"a key of MMPretrain, and so are {', '.join(path[0] for path, _ in others)}: translate the whole file with "
        foreign = [(first, f"{message}`widefield config convert OLD.py --out NEW.yaml`")]
    if problems or foreign:
        raise config.error(*foreign, *problems)


def unknown_section(key: str, sections: Sections) -> str:
    """Return the message about a top-level key that does not exist."""
    own = [name for name, section in sections.items() if not isinstance(section, Foreign)]
    return f"no such key; {suggestion(key, own)} (begin the name of a helper variable with an underscore)"
