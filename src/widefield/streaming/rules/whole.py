"""Operations over the whole image, rewritten: reductions, what is computed from their results, and pointwise operations.

See `rewriting` for what they return, `norms` for normalisations.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.extents import AdaptiveWindow, Span, cell
from widefield.streaming.rules import flat
from widefield.streaming.rules.base import (
    Maps,
    Placed,
    Read,
    TileContext,
    argument,
    declare,
    dims,
    only_map,
    rewrite,
    rule,
    sources,
)
from widefield.streaming.rules.channels import WITHOUT_DIM, as_einsum
from widefield.streaming.rules.pointwise import pointwise
from widefield.streaming.rules.reductions import (
    ExpSum,
    FirstMaximum,
    Maximum,
    foreground,
    precise,
    sum_of_cells,
    sum_of_product,
    sum_over,
)
from widefield.streaming.rules.rewriting import Rewriting, kept, moments

aten = torch.ops.aten


def reduced(node: Node, maps: Maps, position: int = 1) -> tuple[str, tuple[int, ...]] | None:
    """The map that is reduced, and the dimensions; None where neither height nor width is among them."""
    name = only_map(node, maps)
    value = argument(node, position, "dim")
    if getattr(node.target, "_overloadname", "") == "default" and node.op.split(".")[1] in WITHOUT_DIM:
        value = None
    over = dims(node, value, len(maps.shapes[name]))
    return (name, over) if set(over) & set(maps.axes[name]) else None


def in_shape(value: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`value` in another shape of as many elements."""
    return value.reshape(tuple(shape)).to(dtype)


def divide(total: Tensor, count: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`total / count` in another shape of as many elements; 0 where nothing was counted."""
    return in_shape(total / count.clamp_min(1), shape, dtype)


@rewrite(aten.mean, aten.sum)
def average(node: Node, maps: Maps) -> list[Node] | None:
    """Sum or mean."""
    if (found := reduced(node, maps)) is None:
        return None
    name, over = found
    new, shape, axes, extent = Rewriting(node), maps.shapes[name], maps.axes[name], maps.extent(name)
    if node.kwargs.get("dtype") is not None:
        name = new.add("cast", aten.to.dtype, (Ref(name), node.dtype), shape).name
    small = kept(shape, over)
    if node.op == "aten.sum":
        return new.result(in_shape, *new.reduce([name], sum_over(over, axes, extent), small), node.shape, node.dtype)
    total, count = new.reduce([name], sum_over(over, axes, extent, prod(shape[d] for d in over)), small, small)
    return new.result(divide, total, count, node.shape, node.dtype)


@rewrite(aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin)
def extremum(node: Node, maps: Maps) -> list[Node] | None:
    """Maximum or minimum over height and width. Values and indices (`max(dim)`) along the flattened image only."""
    if (
        len(sources(node, maps)) != 1
        or (found := reduced(node, maps)) is None
        or not set(maps.axes[found[0]]) <= set(found[1])
    ):
        return None
    name, over = found
    new, shape, sign = Rewriting(node), maps.shapes[name], -1 if "min" in node.op else 1
    index = node.op in ("aten.argmax", "aten.argmin")
    if not index and node.pick is None:
        value = new.reduce([name], Maximum(over, sign), *[kept(shape, over)] * 2)[0]
        return new.result(in_shape, value, node.shape, node.dtype)
    if set(over) != set(maps.axes[name]):
        return None
    return _first_maximum(node, maps, name, 1 if index else node.pick, (1, 1), sign)


def _first_maximum(
    node: Node, maps: Maps, name: str, pick: int | None, cells: tuple[int, int], sign: int = 1
) -> list[Node]:
    new = Rewriting(node)
    shape = (*(size for d, size in enumerate(maps.shapes[name]) if d not in maps.axes[name]), *cells)
    parts = new.reduce([name], FirstMaximum(maps.axes[name], maps.extent(name), cells, sign), shape, shape)
    return new.result(in_shape, parts[pick or 0], node.shape, node.dtype)


declare(aten.adaptive_avg_pool1d, flat=flat.pooled)


@rewrite(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d)
def adaptive_pool(node: Node, maps: Maps) -> list[Node] | None:
    """Pooling to a grid of cells, which may overlap. Where their number follows from the image's size, the result is a map."""
    name = only_map(node, maps)
    shape, axes, extent = maps.shapes[name], maps.axes[name], maps.extent(name)
    if axes != (len(shape) - 2, len(shape) - 1):
        return None
    cells = (node.shape[-2], node.shape[-1])
    # torch.export makes a number of how many cells max pooling has
    grows = min(cells) > _FEW if node.grows is None or "max" in node.op else all(node.grows[-2:])
    if grows and node.pick in (None, 0):
        pool = mean_of_cells if "avg" in node.op else max_of_cells
        return [node.derived(pool, Ref(name), cells)]
    if "max" in node.op:
        return _first_maximum(node, maps, name, node.pick, cells)
    new, grid = Rewriting(node), (*shape[:-2], *cells)
    total, count = new.reduce([name], sum_of_cells(axes, extent, cells), grid, grid)
    return new.result(divide, total, count, node.shape, node.dtype)


_FEW = 16  # where a trace does not tell, so many cells along an axis are a number of the module, and more follow from the image


def mean_of_cells(x: Tensor, inside: Tensor) -> Tensor:
    """The means of cells of a map, over what is `inside` of them; 0 where that is nothing."""
    total = torch.where(inside, x, 0).sum((-2, -1), dtype=precise(x.dtype))  # float16 overflows
    return (total / inside.sum((-2, -1)).clamp_min(1)).to(x.dtype)


def max_of_cells(x: Tensor, inside: Tensor) -> Tensor:
    """The maxima likewise, the first in raster order where several are equal."""
    best = torch.where(inside, x, -torch.inf).flatten(-2).max(-1).values
    return torch.where(inside.flatten(-2).any(-1), best, 0)


@rule(mean_of_cells, masked=True, keeps_batch=True)
@rule(max_of_cells, saves=("inputs", "indices"), masked=True, keeps_batch=True)
def pool_cells(node: Node, maps: Maps) -> Placed:
    """Cells as windows that differ in size."""
    name, cells = only_map(node, maps), node.args[1]
    rows, cols = (AdaptiveWindow(n, k) for n, k in zip(maps.extent(name), cells, strict=True))

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        y, in_rows = _positions(rows, context.rows[0], tiles[0].device)
        x, in_cols = _positions(cols, context.cols[0], tiles[0].device)
        at = (..., y[:, None, :, None], x[None, :, None, :])
        inside = in_rows[:, None, :, None] & in_cols[None, :, None, :]
        if context.masks is not None:
            inside = inside & context.masks[0][at]
        return node.target(tiles[0][at], inside)  # type: ignore[no-any-return]

    return Placed((Read(name, rows, cols),), maps.axes[name], run, exclusive=True)


def _positions(axis: AdaptiveWindow, span: Span, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each cell of `span` where its positions stand in the tile, as many for each, and which of them are its own."""
    bounds = [cell(o, axis.n_in, axis.n_out) for o in range(span.start, span.stop)]
    most = max(high - low for low, high in bounds)
    positions = [[min(low + i, high - 1) - span.first for i in range(most)] for low, high in bounds]
    inside = [[low + i < high for i in range(most)] for low, high in bounds]
    return torch.tensor(positions, device=device), torch.tensor(inside, device=device)


@rewrite(aten.avg_pool2d, aten.max_pool2d, aten.max_pool2d_with_indices)
def pool_of_everything(node: Node, maps: Maps) -> list[Node] | None:
    """A pooling window as large as the map."""
    name = only_map(node, maps)
    kernel = argument(node, 1, "kernel_size")
    padding = argument(node, 3, "padding", 0)
    override = argument(node, 6, "divisor_override") if "avg" in node.op else None
    whole = tuple(kernel) * (2 // len(kernel)) == maps.extent(name) and not any(padding or ()) and override is None
    return adaptive_pool(node, maps) if whole and node.shape[-2:] == (1, 1) else None


@rewrite(aten.linalg_vector_norm, aten.norm)
def vector_norm(node: Node, maps: Maps) -> list[Node] | None:
    """(sum |x|^p)^(1/p), for p = 0, p >= 1 and the maximum norms."""
    p = argument(node, 1, "ord" if node.op == "aten.linalg_vector_norm" else "p", 2)
    if isinstance(p, (int, float)) and p < 1 and p not in (0, -torch.inf):
        return None
    if (found := reduced(node, maps, position=2)) is None:
        return None
    name, over = found
    new, shape, axes, extent = Rewriting(node), maps.shapes[name], maps.axes[name], maps.extent(name)
    p = 2.0 if p is None else float(p)
    if abs(p) == torch.inf and not set(axes) <= set(over):
        return None
    if node.kwargs.get("dtype") is not None:
        name = new.add("cast", aten.to.dtype, (Ref(name), node.dtype), shape).name
    powers = new.add("power", power_of_norm, (Ref(name), p), shape).name
    if abs(p) == torch.inf:
        total = new.reduce([powers], Maximum(over, 1 if p > 0 else -1), *[kept(shape, over)] * 2)[0]
    else:
        (total,) = new.reduce([powers], sum_over(over, axes, extent), kept(shape, over))
    return new.result(root_of_norm, total, p, node.shape, node.dtype)


def power_of_norm(x: Tensor, p: float) -> Tensor:
    """Return the terms of a p-norm: |x|^p; |x| for the maximum norm; x != 0 for p = 0."""
    x = x.to(precise(x.dtype))  # squares of float16 overflow from 256 on
    if p == 2.0:
        return x * x
    if p == 0.0:
        return (x != 0).to(x.dtype)
    return x.abs() if abs(p) in (1.0, torch.inf) else x.abs() ** p


def root_of_norm(total: Tensor, p: float, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The p-th root; its gradient at zero is zero, as PyTorch has it."""
    if p not in (0.0, 1.0) and abs(p) != torch.inf:
        zero = total == 0
        total = torch.where(zero, 0, torch.where(zero, 1, total) ** (1.0 / p))
    return total.reshape(tuple(shape)).to(dtype)


@rewrite(aten.var, aten.std, aten.var_mean, aten.std_mean)
def variance(node: Node, maps: Maps) -> list[Node] | None:
    """Variance, standard deviation, with the mean."""
    if (found := reduced(node, maps)) is None or not set(maps.axes[found[0]]) <= set(found[1]):
        return None
    name, over = found
    overload = getattr(node.target, "_overloadname", "")
    flag: Any = argument(node, 1 if overload == "default" else 2, "unbiased", True)
    correction = float(node.kwargs.get("correction", 1) or 0) if "correction" in overload else float(bool(flag))
    new, (mean, squares, count) = moments(node, maps, name, over)
    if node.pick == 1:
        return new.result(in_shape, mean, node.shape, node.dtype)
    args = squares, count, correction, "std" in node.op
    return new.result(from_squared_deviations, *args, node.shape, node.dtype)


def from_squared_deviations(
    squares: Tensor, count: Tensor, correction: float, root: bool, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Variance or standard deviation from a sum of squared deviations."""
    value = squares / (count - correction).clamp_min(0)
    return root_of_norm(value, 2.0, shape, dtype) if root else value.reshape(tuple(shape)).to(dtype)


@rewrite(aten.logsumexp, aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax)
def softmax(node: Node, maps: Maps) -> list[Node] | None:
    """exp(x - L), x - L or L itself, where L = log(sum(exp(x)))."""
    if (found := reduced(node, maps)) is None or not set(maps.axes[found[0]]) <= set(found[1]):
        return None
    name, over = found
    new, small = Rewriting(node), kept(maps.shapes[name], over)
    if isinstance(argument(node, 2, "dtype"), torch.dtype):
        name = new.add("cast", aten.to.dtype, (Ref(name), node.dtype), maps.shapes[name]).name
    top, total = new.reduce([name], ExpSum(over), small, small)
    if node.op == "aten.logsumexp":
        return new.result(log_of_sum, top, total, node.shape, node.dtype)
    return new.result(log_softmax_of if "log" in node.op else softmax_of, Ref(name), top, total, node.dtype)


def log_of_sum(top: Tensor, total: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """log(sum(exp(x)))."""
    value = torch.where(top == torch.inf, top, top + total.log())  # inf - inf has made the total NaN
    return value.reshape(tuple(shape)).to(dtype)


def softmax_of(x: Tensor, top: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(x - top) / total, where total is the sum of exp(x - top)."""
    return ((x - top).exp() / total).to(dtype)


def log_softmax_of(x: Tensor, top: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithm of `softmax_of`."""
    return (x - top - total.log()).to(dtype)


rule(power_of_norm, log_softmax_of, keeps_batch=True)(pointwise)


@rule(softmax_of, masked=True, keeps_batch=True)
def softmax_over_foreground(node: Node, maps: Maps) -> Placed:
    """Position by position; the background has no share."""
    placed = pointwise(node, maps)
    return replace(placed, run=lambda tiles, context: placed.run(foreground(tiles, context, -torch.inf), context))


@rewrite(aten.einsum, aten.matmul, aten.bmm)
def contraction(node: Node, maps: Maps) -> list[Node] | None:
    """A product of maps, summed over height and width."""
    if node.op != "aten.einsum":
        node = as_einsum(node, [maps.shapes[ref.name] for ref in node.args[:2]])
    equation, operands = node.args[:2]
    if not all(isinstance(o, Ref) and o.name in maps for o in operands):
        return None
    left, right = equation.split("->")
    if any(len(set(term)) < len(term) for term in left.split(",")):  # a diagonal
        return None
    letters = {
        tuple(term[axis] for axis in maps.axes[operand.name])
        for term, operand in zip(left.split(","), operands, strict=True)
    }
    if len(letters) != 1 or set(*letters) & set(right):
        return None
    new = Rewriting(node)
    (total,) = new.reduce([operand.name for operand in operands], sum_of_product(equation), node.shape)
    return new.result(in_shape, total, node.shape, node.dtype)
