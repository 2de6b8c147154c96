"""Operators that differ only in how they are written, brought to one form, which the rules know."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from widefield.streaming.captured import Node
from widefield.streaming.rules.channels import explicit

aten = torch.ops.aten

# Factories that take only dtype and device from their first argument.
_FACTORIES: dict[Any, Callable[..., torch.Tensor]] = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}
# Operators that are others under the name of a reduction.
_NAMESAKES: dict[Any, Any] = {aten.max.other: aten.maximum.default, aten.min.other: aten.minimum.default}
# Operators that take only the shape from their second argument.
_SHAPED_LIKE: dict[Any, Any] = {
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}


def normal_form(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> Node:
    """Return `node`, or another that does the same; `shapes` are those of what it reads."""
    if node.target in _FACTORIES:
        given = {key: value for key, value in node.kwargs.items() if value is not None}
        kwargs = {"dtype": node.dtype, "device": torch.device("cpu"), **given}
        return replace(node, target=_FACTORIES[node.target], args=node.args[1:], kwargs=kwargs)
    if node.target is aten.einsum.default:
        equation = explicit(node.args[0], [len(shapes[operand.name]) for operand in node.args[1]])
        return replace(node, args=(equation, *node.args[1:]))
    if node.target in _NAMESAKES:
        return replace(node, target=_NAMESAKES[node.target])
    if node.target in _SHAPED_LIKE:
        return replace(node, target=_SHAPED_LIKE[node.target], args=(node.args[0], list(node.shape)), kwargs={})
    if node.target is aten.broadcast_tensors.default and node.pick is not None:
        one = node.args[0][node.pick]
        same = shapes[one.name] == node.shape
        target, args = (aten.alias.default, (one,)) if same else (aten.expand.default, (one, list(node.shape)))
        return replace(node, target=target, args=args, kwargs={}, pick=None)
    if node.target is aten.slice.Tensor and shapes[node.args[0].name] == node.shape and node.args[4:] in ((), (1,)):
        return replace(node, target=aten.alias.default, args=node.args[:1], kwargs={})  # `x[:]`
    if node.target is aten.slice_scatter.default and shapes[node.args[1].name] == node.shape:  # all of it
        return replace(node, target=aten.to.dtype, args=(node.args[1], node.dtype), kwargs={})
    return node
