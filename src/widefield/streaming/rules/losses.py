"""Losses over all positions: the loss at each position, which is a map, then its sum or its mean.

Reductions are numbered as PyTorch numbers them: 0 for none, 1 for the mean, 2 for the sum.
"""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from widefield.streaming.captured import Node, Ref
from widefield.streaming.rules import flat
from widefield.streaming.rules.base import Axes, Flattened, Maps, Placed, argument, called, rewrite, rule, sources
from widefield.streaming.rules.pointwise import pointwise
from widefield.streaming.rules.reductions import sum_over
from widefield.streaming.rules.rewriting import Rewriting
from widefield.streaming.rules.whole import divide, in_shape

aten = torch.ops.aten

# Losses of two tensors, element by element, and the position of their argument `reduction`.
_ELEMENTWISE: dict[Any, int] = {
    aten.mse_loss.default: 2,
    aten.l1_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.huber_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.hinge_embedding_loss.default: 3,
    aten.kl_div.default: 2,
    aten.binary_cross_entropy.default: 3,
    aten.binary_cross_entropy_with_logits.default: 4,
}


def _on_flat(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """A loss that is reduced has neither height nor width any more."""
    nodes, width = flat.elementwise(node, maps, names)
    reduced = argument(node, _ELEMENTWISE[node.target], "reduction", 1) != 0
    return ([*nodes[:-1], replace(nodes[-1], shape=node.shape)], None) if reduced else (nodes, width)


rule(*_ELEMENTWISE, keeps_batch=True, flat=_on_flat)(pointwise)


@rewrite(*_ELEMENTWISE)
def elementwise_loss(node: Node, maps: Maps) -> list[Node] | None:
    """The sum or the mean of a loss of two tensors, element by element."""
    at = _ELEMENTWISE[node.target]
    reduction = argument(node, at, "reduction", 1)
    if reduction == 0:
        return None
    names = sources(node, maps)
    shape = torch.broadcast_shapes(*(maps.shapes[name] for name in node.refs))
    axes = Axes(*(d + len(shape) - len(maps.shapes[names[0]]) for d in maps.axes[names[0]]))
    target: Any = node.target
    defaults = (each.default_value for each in target._schema.arguments[len(node.args) : at])
    args = *node.args[:at], *defaults, 0, *node.args[at + 1 :]
    kwargs = {key: value for key, value in node.kwargs.items() if key != "reduction"}
    each = replace(node, name=f"{node.name}@each", args=args, kwargs=kwargs, shape=tuple(shape))
    new = Rewriting(node)
    new.nodes.append(each)
    return _reduced(new, each.name, axes, tuple(shape), maps.extent(names[0]), mean=reduction == 1)


def _reduced(
    new: Rewriting, name: str, axes: Axes, shape: tuple[int, ...], extent: tuple[int, int], mean: bool
) -> list[Node]:
    """The mean or the sum of map `name` over everything."""
    node, one = new.node, (1,) * len(shape)
    over = sum_over(range(len(shape)), axes, extent, prod(shape) if mean else None)
    parts = new.reduce([name], over, *[one] * (1 + mean))
    return new.result(divide if mean else in_shape, *parts, node.shape, node.dtype)


_CLASSES = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default)


def _classes_on_flat(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """The class is dimension 1 of what the model sees."""
    none = argument(node, 3, "reduction", 1) == 0
    dim = flat.dim_apart(maps, names[0], 1)
    shape = tuple(n for d, n in enumerate(maps.shapes[names[0]]) if d != dim) if none else node.shape
    return [replace(node, shape=shape)], maps.flat[names[0]] if none else None


@rewrite(*_CLASSES, flat=_classes_on_flat)
def classification_loss(node: Node, maps: Maps) -> list[Node] | None:
    """Cross-entropy, or the negative log-likelihood of log-probabilities, with class weights and an index to ignore."""
    names = [leaf.name if isinstance(leaf, Ref) else None for leaf in node.args[:2]]
    if any(name not in maps for name in names):
        raise node.refuse(
            "compares a map with labels that depend on no image, or the other way round",
            "pass the labels as a map of their own: model(image, labels)",
        )
    name, target = str(names[0]), str(names[1])
    shape, weight = maps.shapes[name], argument(node, 2, "weight")
    if len(shape) < 3:
        raise node.refuse("takes for classes a dimension that holds positions", "keep the batch dimension")
    dim = flat.dim_apart(maps, name, 1) if name in maps.flat else 1
    by_index = len(maps.shapes[target]) < len(shape)
    reduction, ignored = argument(node, 3, "reduction", 1), argument(node, 4, "ignore_index", -100)
    smoothing = argument(node, 5, "label_smoothing", 0.0)
    loss = cross_entropy_at_each if node.op == "aten.cross_entropy_loss" else likelihood_at_each
    axes = Axes(*(d - (d > dim) for d in maps.axes[name]))
    small = tuple(n for d, n in enumerate(shape) if d != dim)
    new = Rewriting(node)
    args = Ref(name), Ref(target), weight, ignored, smoothing, dim
    if reduction == 0:
        return new.result(loss, *args)
    each = new.add("each", loss, args, small).name
    if reduction == 2 or not by_index:  # probabilities count all positions alike
        return _reduced(new, each, axes, small, maps.extent(name), mean=reduction == 1)
    weights = new.add("weights", weight_at_each, (Ref(target), weight, ignored, node.dtype), small).name
    total, count = (
        new.reduce([one], sum_over(range(len(small)), axes, maps.extent(name)), (1,) * len(small))[0]
        for one in (each, weights)
    )
    return new.result(quotient, total, count, node.shape, node.dtype)


def cross_entropy_at_each(
    x: Tensor, target: Tensor, weight: Tensor | None, ignored: int, smoothing: float, dim: int
) -> Tensor:
    """`F.cross_entropy` of logits `x`, with the classes in dimension `dim`, at each position."""
    x = x.movedim(dim, 1)
    target = target.movedim(dim, 1) if target.ndim == x.ndim else target.long()
    return F.cross_entropy(x, target, weight, ignore_index=ignored, reduction="none", label_smoothing=smoothing)


def likelihood_at_each(
    x: Tensor, target: Tensor, weight: Tensor | None, ignored: int, smoothing: float, dim: int
) -> Tensor:
    """`F.nll_loss` of log-probabilities `x` likewise."""
    return F.nll_loss(x.movedim(dim, 1), target.long(), weight, ignore_index=ignored, reduction="none")


def weight_at_each(target: Tensor, weight: Tensor | None, ignored: int, dtype: torch.dtype) -> Tensor:
    """Return what each position counts in the mean: the weight of its class, 0 where it is ignored."""
    counts = target != ignored
    return counts.to(dtype) if weight is None else torch.where(counts, weight[torch.where(counts, target, 0).long()], 0)


def quotient(total: Tensor, count: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`total / count` in another shape; NaN, as in PyTorch, where nothing counts."""
    return in_shape(total / count, shape, dtype)


@rule(weight_at_each, keeps_batch=True, saves=(), stops_gradients=True)
@rule(cross_entropy_at_each, likelihood_at_each, keeps_batch=True)
def at_each_position(node: Node, maps: Maps) -> Placed:
    """A loss of the classes at each position."""
    name = node.args[0].name
    dim = node.args[5] if len(node.args) > 5 else len(maps.shapes[name])
    axes = Axes(*(d - (d > dim) for d in maps.axes[name]))
    labels = node.args[1].name if isinstance(node.args[1], Ref) else name
    same = axes if len(maps.shapes[labels]) < len(maps.shapes[name]) else maps.axes[name]
    if maps.axes.get(labels, same) != same:
        raise node.refuse(
            "compares maps whose height and width are in different dimensions", "transpose one of them first"
        )
    return called(node, maps, axes)


def _one_hot_on_flat(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    return [replace(node, shape=(*maps.shapes[names[0]], node.shape[-1]))], maps.flat[names[0]]


@rule(aten.one_hot, saves=(), stops_gradients=True, keeps_batch=True, flat=_one_hot_on_flat)
def one_hot(node: Node, maps: Maps) -> Placed:
    """The class of each position as zeros and a one, in a new last dimension."""
    name, count = node.args[0].name, node.shape[-1]
    return Placed((maps.read(name),), maps.axes[name], lambda tiles, context: F.one_hot(tiles[0], count))
