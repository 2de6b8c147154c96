"""Components written as plain data, `{type: NAME, argument: value, ...}`, and marks of annotations that say what is taken."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widefield.registry.registry import Registry


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

    registry: "Registry"
    kind: str | None = None
    given: tuple[str, ...] = ()
    also: Mapping[str, Any] = field(default_factory=dict, hash=False)
    typed: bool = True


@dataclass(frozen=True)
class Range:
    """Marks an annotation: numbers given for the argument are finite, and from `least` to `most`.

    `Annotated[int, Range(1)]` takes 1 and more. Arguments and configurations are checked against it before anything is built.
    """

    least: float
    most: float = float("inf")

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value != float("inf")

    def __str__(self) -> str:
        return f"at least {self.least}" if self.most == float("inf") else f"from {self.least} to {self.most}"


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
