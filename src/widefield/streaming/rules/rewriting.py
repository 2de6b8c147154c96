"""Rewritings: an operation over the whole image becomes reductions and local operations on their results.

A rewriting returns the nodes to put in the place of one, the last of which has its name; or None where the operation is local.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from widefield.streaming.captured import Node, Ref
from widefield.streaming.rules.base import Maps
from widefield.streaming.rules.reductions import Moments, Reduction, Sum


class Rewriting:
    """The nodes that take the place of `node`, as they are added."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.nodes: list[Node] = []

    def add(self, suffix: str, target: Callable[..., Any], args: Sequence[Any], shape: Sequence[int]) -> Ref:
        name = f"{self.node.name}@{suffix}"
        self.nodes.append(self.node.derived(target, *args, name=name, shape=shape))
        return Ref(name)

    def reduce(self, names: Sequence[str], reduction: Reduction, *shapes: Sequence[int]) -> list[Ref]:
        """The parts of a reduction of maps `names`, of these shapes. The same reduction of the same map is done once."""
        of = "+".join(names)
        name = f"{self.node.name}@sum of {of}" if isinstance(reduction, Sum) else f"{of}@{reduction}"
        args, kwargs = tuple(map(Ref, names)), {"shapes": tuple(map(tuple, shapes))}
        self.nodes.append(
            replace(self.node, name=name, target=cast("Any", reduction), args=args, kwargs=kwargs, pick=None)
        )
        return [Ref(part) for part in parts_of(self.nodes[-1])]

    def result(self, target: Callable[..., Any], *args: Any) -> list[Node]:
        self.nodes.append(self.node.derived(target, *args))
        return self.nodes


def parts_of(reduction: Node) -> tuple[str, ...]:
    """The names of the tensors that a reduction gives."""
    return tuple(f"{reduction.name}.{k}" for k in range(len(reduction.kwargs["shapes"])))


def kept(shape: Sequence[int], over: Sequence[int]) -> tuple[int, ...]:
    """`shape` with dimensions `over` of size 1."""
    return tuple(1 if d in over else size for d, size in enumerate(shape))


def moments(node: Node, maps: Maps, name: str, over: Sequence[int]) -> tuple[Rewriting, list[Ref]]:
    """A rewriting that begins with a map's mean, sum of squared deviations from it and count, over some dimensions."""
    new = Rewriting(node)
    return new, new.reduce([name], Moments(tuple(sorted(over))), *[kept(maps.shapes[name], over)] * 3)
