"""Ranges, which are known of a value before it is computed: how large it can be, and how it grows from one position to the next.

Of `0.1 * x.tanh() + grid` it is known that it is no further than 0.1 from the grid, and of a grid that forward makes of numbers
(`torch.linspace`, `torch.arange`, `F.affine_grid`), where it points at each position. This is interval arithmetic, of numbers that
are linear in the position, with room for rounding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.rules.base import argument, declare, dims, groups, op_of

aten = torch.ops.aten
_MOST = 1024  # elements that are told apart in a dimension, and of a constant


@dataclass(frozen=True)
class Range:
    """The element at index i of a value lies between `low` and `high`, both plus the sum of `slopes[d] * i[d]`.

    All tensors have the value's number of dimensions, with one element along those in which they do not vary; float64.
    """

    low: Tensor
    high: Tensor
    slopes: Mapping[int, Tensor]

    def level(self, shape: Sequence[int], along: Sequence[int] | None = None) -> "Range":
        """Return the range of a value of `shape` without slopes, or without those `along` some dimensions."""
        low, high, left = self.low, self.high, dict(self.slopes)
        for d in list(left) if along is None else left.keys() & set(along):
            travel = left.pop(d) * max(shape[d] - 1, 0)
            low, high = low + travel.clamp(max=0), high + travel.clamp(min=0)
        return Range(low, high, left)

    def ends(self, shape: Sequence[int]) -> tuple[float, float]:
        """Return the least and the largest number that a value of `shape` may hold."""
        level = self.level(shape)
        return level.low.min().item(), level.high.max().item()

    def of_each(self, function: Callable[[Tensor], Tensor], order: Mapping[int, int]) -> "Range":
        """Return the range with `function` applied to all tensors; `order` gives the new dimension of each that has a slope."""
        slopes = {order[d]: function(slope) for d, slope in self.slopes.items()}
        return Range(function(self.low), function(self.high), slopes)


Known = Mapping[str, Range]
Shapes = Mapping[str, Sequence[int]]
RangeOf = Callable[[Node, Known, Shapes], Range | None]


def between(low: float, high: float, ndim: int = 0) -> Range:
    """Return the range of a value of which all elements are between two numbers."""
    ends = [torch.full((1,) * ndim, end, dtype=torch.float64, device="cpu") for end in (low, high)]
    return Range(ends[0], ends[1], {})


def constant(value: Tensor) -> Range | None:
    """Return the range of a tensor that is known, None if it is large."""
    if value.numel() == 0 or value.numel() > _MOST or value.is_complex() or value.device.type == "meta":
        return None
    known = value.detach().to("cpu", torch.float64)
    return Range(known, known, {}) if known.isfinite().all() else None


def range_of(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Return what is known of `node`'s result, from what is known of what it reads; None for nothing."""
    op = op_of(node.target)
    if op is None or op.range_of is None or 0 in node.shape or node.dtype.is_complex:
        return None
    found = op.range_of(node, known, shapes)
    if found is None or not (found.low.isfinite().all() and found.high.isfinite().all()):
        return None
    if op.exact or not node.dtype.is_floating_point:
        return found
    room = 4 * torch.finfo(node.dtype).eps * max(map(abs, found.ends(node.shape)))
    return Range(found.low - room, found.high + room, found.slopes)


def _operand(value: Any, known: Known, ndim: int) -> Range | None:
    """Return the range of an argument, with `ndim` dimensions."""
    if isinstance(value, Ref):
        found = known.get(value.name)
        if found is None:
            return None
        added = ndim - found.low.ndim
        return found.of_each(lambda x: x[(None,) * added], {d: d + added for d in found.slopes})
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return between(value, value, ndim) if number else None


def limited(low: float, high: float) -> RangeOf:
    """Every element lies between two numbers, whatever is read."""
    return lambda node, known, shapes: between(low, high, len(node.shape))


def clamped(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Numbers are moved towards any line within the limits, so that they are no further from it than before."""
    fixed = {"aten.relu": (0.0, None), "aten.relu6": (0.0, 6.0)}
    low, high = fixed.get(node.op, (argument(node, 1, "min"), argument(node, 2, "max")))
    if node.op == "aten.hardtanh":
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    elif node.op == "aten.clamp_max":
        low, high = None, argument(node, 1, "max")
    if isinstance(low, Ref) or isinstance(high, Ref):
        return None
    most = math.inf if high is None else high
    least = -math.inf if low is None else min(low, most)  # all are `most` where there is nothing between
    found = _operand(node.args[0], known, len(node.shape))
    if found is None:
        return between(least, most, len(node.shape))
    if not found.slopes:
        return Range(found.low.clamp(least, most), found.high.clamp(least, most), {})
    line = Range(torch.zeros_like(found.low), torch.zeros_like(found.high), found.slopes).level(node.shape)
    first, last = least - line.low, most - line.high
    middle = ((found.low + found.high) / 2).clamp(min=first).clamp(max=last)
    if (first > last).any():
        room = (first - last).clamp(min=0)  # the line is outside by so much at most
        return Range(torch.minimum(found.low, middle) - room, torch.maximum(found.high, middle) + room, found.slopes)
    return Range(torch.minimum(found.low, middle), torch.maximum(found.high, middle), found.slopes)


def added(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Sums and differences."""
    ndim = len(node.shape)
    operands = [_operand(arg, known, ndim) for arg in node.args[:2]]
    factors = [1.0, node.kwargs.get("alpha", 1)]
    if node.op in ("aten.sub", "aten.rsub"):
        factors[1] = -factors[1]
    if node.op == "aten.rsub":
        operands.reverse()
    if None in operands or len(node.args) > 2 or not all(isinstance(factor, (int, float)) for factor in factors):
        return None
    one, other = (_times(x, factor) for x, factor in zip(operands, factors, strict=True))  # type: ignore[arg-type]
    return Range(one.low + other.low, one.high + other.high, _summed(one.slopes, other.slopes))


def _summed(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> dict[int, Tensor]:
    sums = dict(one)
    for d, slope in other.items():
        sums[d] = sums[d] + slope if d in sums else slope
    return sums


def _times(x: Range, factor: Tensor | float) -> Range:
    ends = x.low * factor, x.high * factor
    slopes = {d: slope * factor for d, slope in x.slopes.items()}
    return Range(torch.minimum(*ends), torch.maximum(*ends), slopes)


def multiplied(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Products and quotients."""
    ndim = len(node.shape)
    one, other = (_operand(arg, known, ndim) for arg in node.args[:2])
    if one is None or other is None or len(node.args) > 2 or node.kwargs:
        return None
    if node.op == "aten.div" and (other := _inverse(other)) is None:
        return None
    for x, factor in ((one, other), (other, one)):
        if not factor.slopes and torch.equal(factor.low, factor.high):
            return _times(x, factor.low)
    for x, factor in ((one, other), (other, one)):
        if x.slopes and not factor.slopes:
            made, level = _times(x, (factor.low + factor.high) / 2), x.level(node.shape)
            room = (factor.high - factor.low) / 2 * torch.maximum(level.low.abs(), level.high.abs())
            return Range(made.low - room, made.high + room, made.slopes)
    one, other = (x.level(node.shape) for x in (one, other))
    products = [a * b for a in (one.low, one.high) for b in (other.low, other.high)]
    stacked = torch.stack(torch.broadcast_tensors(*products))
    return Range(stacked.amin(0), stacked.amax(0), {})


def _inverse(x: Range | None) -> Range | None:
    """The range of one over something, None if that may be 0."""
    if x is None or x.slopes or ((x.low <= 0) & (x.high >= 0)).any():
        return None
    return Range(1 / x.high, 1 / x.low, {})


def reciprocal(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """One over something."""
    return _inverse(_operand(node.args[0], known, len(node.shape)))


def negated(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Return the range of what is read, times -1."""
    found = _operand(node.args[0], known, len(node.shape))
    return found and _times(found, -1.0)


def same(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """The values of the first argument, converted; what is cut off of whole numbers is less than 1."""
    found = _operand(node.args[0], known, len(node.shape))
    if found is None or node.dtype.is_floating_point:
        return found
    if node.dtype not in (torch.int32, torch.int64):
        return None
    whole = all(torch.equal(x, x.round()) for x in (found.low, found.high, *found.slopes.values()))
    return found if whole else Range(found.low - 1, found.high + 1, found.slopes)


def filled(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """One number everywhere."""
    name = node.op.split(".")[1].removeprefix("new_").removesuffix("_like")
    value = {"zeros": 0, "ones": 1}.get(name)
    if value is None:
        value = argument(node, {"aten.new_full": 2, "aten.scalar_tensor": 0}.get(node.op, 1), "fill_value")
    return _operand(value, known, len(node.shape)) if not isinstance(value, Ref) else None


def counted(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """`arange` and `linspace`."""
    numbers = [*node.args, *(node.kwargs[key] for key in ("start", "end", "step", "steps") if key in node.kwargs)]
    if not all(isinstance(number, (int, float)) for number in numbers):
        return None
    start, step = 0 if len(numbers) == 1 else numbers[0], numbers[2] if len(numbers) == 3 else 1
    if node.op == "aten.linspace":
        step = (numbers[1] - start) / (numbers[2] - 1) if numbers[2] > 1 else 0
    begin = between(start, start, 1)
    return Range(begin.low, begin.high, {0: torch.full((1,), step, dtype=torch.float64, device="cpu")})


def diagonal(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Ones on the diagonal, and zeros."""
    rows, cols = node.shape
    return constant(torch.eye(rows, cols, dtype=torch.float64, device="cpu")) if rows * cols <= _MOST else None


def affine_grid(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """`F.affine_grid` of (N, 2, 3) to (N, H, W, 2)."""
    theta, corners = node.args[0], node.args[2]
    found = known.get(theta.name)
    if found is None or len(node.shape) != 4:
        return None
    found = found.level(shapes[theta.name])
    low, high = (x.expand(-1, 2, 3) for x in (found.low, found.high))
    middle, away = (low + high) / 2, (high - low) / 2
    at, slopes = middle[..., 2], {}
    for k, d in ((0, 2), (1, 1)):  # x grows along the width
        n = node.shape[d]
        first, step = (-1.0, 2 / max(n - 1, 1)) if corners else (1 / n - 1, 2 / n)
        first = 0.0 if corners and n == 1 else first
        at = at + middle[..., k] * first
        slopes[d] = (middle[..., k] * step)[:, None, None]
    at, away = at[:, None, None], away.sum(-1)[:, None, None]
    return Range(at - away, at + away, slopes)


def permuted(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Dimensions in another order."""
    found, ndim = known.get(node.args[0].name), len(node.shape)
    if found is None:
        return None
    # What the operator does to the dimensions shows on a tensor whose sizes are their numbers.
    order = list(node.target(torch.empty(tuple(range(ndim)), device="meta"), *node.args[1:], **node.kwargs).shape)
    return found.of_each(lambda x: x.permute(order), {d: order.index(d) for d in found.slopes})


def reshaped(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Another shape: a dimension that stays as it is keeps its slope."""
    name = node.args[0].name
    found, shape = known.get(name), shapes[name]
    if found is None or node.target is aten.view.dtype:
        return None
    sizes, places = [1] * len(node.shape), dict[int, int]()
    for before, after in groups(shape, node.shape):
        wide_in, wide_out = [d for d in before if shape[d] > 1], [d for d in after if node.shape[d] > 1]
        if len(wide_in) == len(wide_out) == 1:
            places[wide_in[0]], sizes[wide_out[0]] = wide_out[0], found.low.shape[wide_in[0]]
        elif wide_in:
            found = _without(found, shape, wide_in)
    found = _without(found, shape, [d for d in found.slopes if d not in places])
    full = [max(x.shape[d] for x in (found.low, found.high, *found.slopes.values())) for d in range(len(shape))]
    for d, place in places.items():
        sizes[place] = full[d]
    return found.of_each(lambda x: x.expand(full).reshape(sizes), places)


def _without(found: Range, shape: Sequence[int], along: Sequence[int]) -> Range:
    """The range with one element along some dimensions."""
    if not along:
        return found
    found = found.level(shape, along)
    slopes = {d: slope for d, slope in found.slopes.items() if all(slope.shape[a] == 1 for a in along)}
    found = Range(found.low, found.high, found.slopes).level(shape, [d for d in found.slopes if d not in slopes])
    return Range(found.low.amin(tuple(along), True), found.high.amax(tuple(along), True), found.slopes)


def expanded(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """`expand` and `repeat`: what was one element along a dimension has no slope there."""
    name = node.args[0].name
    found, shape = known.get(name), shapes[name]
    if found is None:
        return None
    added = len(node.shape) - len(shape)
    changed = [d for d, n in enumerate(shape) if node.shape[d + added] != n]
    found = _without(found, shape, changed)
    return found.of_each(lambda x: x[(None,) * added], {d: d + added for d in found.slopes})


def meshed(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """`meshgrid`: vector k of the list along dimension k, of the first two the other one with indexing "xy"."""
    vectors, k = node.args[0], node.pick or 0
    found, ndim = known.get(vectors[k].name), len(node.shape)
    swapped = argument(node, 1, "indexing", "ij") == "xy" and k < 2 and len(vectors) > 1
    d = 1 - k if swapped else k
    if found is None or found.low.ndim != 1:
        return None
    shape = [1] * ndim

    def along(x: Tensor) -> Tensor:
        return x.reshape([*shape[:d], -1, *shape[d + 1 :]])

    return found.of_each(along, {0: d})


def joined(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """`cat` and `stack`."""
    ndim, sizes, parts = len(node.shape), list[int](), list[Range]()
    (dim,) = dims(node, argument(node, 1, "dim", 0), ndim)
    for item in node.args[0]:
        found = known.get(item.name)
        if found is None:
            return None
        if node.op == "aten.stack":
            found = found.of_each(lambda x: x.unsqueeze(dim), {d: d + (d >= dim) for d in found.slopes})
            sizes.append(1)
        else:
            sizes.append(shapes[item.name][dim])
            found = found.level([*node.shape[:dim], sizes[-1], *node.shape[dim + 1 :]], [dim])
        parts.append(found)
    if sum(sizes) > _MOST:
        low, high = zip(*(found.ends(node.shape) for found in parts), strict=True)
        return between(min(low), max(high), ndim)
    slopes = {d for found in parts for d in found.slopes}
    zero = torch.zeros((1,) * ndim, dtype=torch.float64, device="cpu")
    tensors = [[found.low, found.high, *(found.slopes.get(d, zero) for d in slopes)] for found in parts]
    joined = []
    for several in zip(*tensors, strict=True):
        shape = list(torch.broadcast_shapes(*(x.select(dim, 0).shape for x in several)))
        joined.append(
            torch.cat([x.expand([*shape[:dim], n, *shape[dim:]]) for x, n in zip(several, sizes, strict=True)], dim)
        )
    return Range(joined[0], joined[1], dict(zip(slopes, joined[2:], strict=True)))


def cut(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """`slice`, and the pieces of `split` and `chunk`."""
    name, pick = node.args[0].name, node.pick or 0
    found, shape = known.get(name), shapes[name]
    position = 1 if node.op == "aten.slice" else 2
    (dim,) = dims(node, argument(node, position, "dim", 0), len(shape))
    step = 1
    if node.op == "aten.slice":
        start, _, step = slice(
            argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
        ).indices(shape[dim])
    elif node.op == "aten.split_with_sizes" or isinstance(node.args[1], (list, tuple)):
        start = sum(node.args[1][:pick])
    else:
        start = pick * (-(-shape[dim] // node.args[1]) if node.op == "aten.chunk" else node.args[1])
    if found is None:
        return None
    stop = start + (node.shape[dim] - 1) * step + 1
    index = (slice(None),) * dim + (slice(start, stop, step),)
    return _moved(found, dim, start, step).of_each(
        lambda x: x if x.shape[dim] == 1 else x[index], {d: d for d in found.slopes}
    )


def selected(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """`select` and `unbind`."""
    name = node.args[0].name
    found, shape = known.get(name), shapes[name]
    (dim,) = dims(node, argument(node, 1, "dim", 0), len(shape))
    at = (argument(node, 2, "index") if node.op == "aten.select" else node.pick or 0) % shape[dim]
    if found is None:
        return None
    found = _moved(found, dim, at, 0)
    return found.of_each(
        lambda x: x.select(dim, at if x.shape[dim] > 1 else 0), {d: d - (d > dim) for d in found.slopes}
    )


def _moved(found: Range, dim: int, start: int, step: int) -> Range:
    """The range of every `step`-th element from `start` on along a dimension, of which the elements are still to be taken."""
    slopes = dict(found.slopes)
    if (slope := slopes.pop(dim, None)) is None:
        return found
    slopes |= {dim: slope * step} if step else {}
    return Range(found.low + slope * start, found.high + slope * start, slopes)


def flipped(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Dimensions the other way round."""
    name = node.args[0].name
    found, shape = known.get(name), shapes[name]
    if found is None:
        return None
    over = dims(node, argument(node, 1, "dims"), len(shape))
    for d in over:
        found = _moved(found, d, shape[d] - 1, -1)
    return found.of_each(lambda x: x.flip(over), {d: d for d in found.slopes})


def anywhere(node: Node, known: Known, shapes: Shapes) -> Range | None:
    """Elements that are moved somewhere, picked, or averaged."""
    name = node.args[0].name
    found = known.get(name)
    return found and between(*found.ends(shapes[name]), len(node.shape))


# Of what is a map, the files of the rules say so.
declare(aten.zeros, aten.ones, range_of=filled, exact=True)
declare(aten.full, aten.new_zeros, aten.new_ones, aten.new_full, aten.scalar_tensor, range_of=filled)
declare(aten.arange, aten.linspace, range_of=counted)
declare(aten.eye, range_of=diagonal, exact=True)
declare(aten.meshgrid, range_of=meshed, exact=True)
declare(aten.affine_grid_generator, range_of=affine_grid)
declare(aten.lift_fresh_copy, range_of=same)
