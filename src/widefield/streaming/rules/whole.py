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
from widefield.streaming.rules import flat
from widefield.streaming.rules.base import Maps, argument, declare, dims, only_map, rewrite, rule, sources
from widefield.streaming.rules.channels import WITHOUT_DIM, as_einsum
from widefield.streaming.rules.pointwise import pointwise
from widefield.streaming.rules.reductions import (
    ExpSum,
    FirstMaximum,
    Maximum,
    cell,
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


def divide(total: Tensor, count: float | Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`total / count` in another shape of as many elements."""
    if isinstance(count, Tensor):
        count = count.to(total.device, total.dtype)
    return (total if not isinstance(count, Tensor) and count == 1 else total / count).reshape(tuple(shape)).to(dtype)


@rewrite(aten.mean, aten.sum)
def average(node: Node, maps: Maps) -> list[Node] | None:
    """Sum or mean."""
    if (found := reduced(node, maps)) is None:
        return None
    name, over = found
    new, shape, axes, extent = Rewriting(node), maps.shapes[name], maps.axes[name], maps.extent(name)
    if node.kwargs.get("dtype") is not None:
        name = new.add("cast", aten.to.dtype, (Ref(name), node.dtype), shape).name
    (total,) = new.reduce([name], sum_over(over, axes, extent), kept(shape, over))
    count = prod(shape[d] for d in over) if node.op == "aten.mean" else 1
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
        return new.result(divide, value, 1, node.shape, node.dtype)
    if set(over) != set(maps.axes[name]):
        return None
    return _first_maximum(node, maps, name, 1 if index else node.pick, (1, 1), sign)


def _first_maximum(
    node: Node, maps: Maps, name: str, pick: int | None, cells: tuple[int, int], sign: int = 1
) -> list[Node]:
    new = Rewriting(node)
    shape = (*(size for d, size in enumerate(maps.shapes[name]) if d not in maps.axes[name]), *cells)
    parts = new.reduce([name], FirstMaximum(maps.axes[name], maps.extent(name), cells, sign), shape, shape)
    return new.result(divide, parts[pick or 0], 1, node.shape, node.dtype)


_SMALL = 16  # cells of so many rows and columns are pooled as windows: the result is a map


declare(aten.adaptive_avg_pool1d, flat=flat.pooled)


@rewrite(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d)
def adaptive_pool(node: Node, maps: Maps) -> list[Node] | None:
    """Pooling to a grid of cells, which may overlap."""
    name = only_map(node, maps)
    shape, axes, extent = maps.shapes[name], maps.axes[name], maps.extent(name)
    if axes != (len(shape) - 2, len(shape) - 1):
        return None
    cells = (node.shape[-2], node.shape[-1])
    kernel = [n // k for n, k in zip(extent, cells, strict=True)]
    if (
        min(cells) > 1
        and max(kernel) <= _SMALL
        and all(k * c == n for k, c, n in zip(kernel, cells, extent, strict=True))
    ):
        if "avg" in node.op:
            return [replace(node, target=aten.avg_pool2d.default, args=(Ref(name), kernel), kwargs={})]
        if node.pick in (None, 0):
            pooled = replace(
                node, target=aten.max_pool2d_with_indices.default, args=(Ref(name), kernel, kernel), pick=0
            )
            return [replace(pooled, kwargs={})]
    if "max" in node.op:
        return _first_maximum(node, maps, name, node.pick, cells)
    new = Rewriting(node)
    (total,) = new.reduce([name], sum_of_cells(axes, extent, cells), (*shape[:-2], *cells))
    rows, cols = ([cell(i, n, k)[1] - cell(i, n, k)[0] for i in range(k)] for n, k in zip(extent, cells, strict=True))
    count = torch.tensor(rows, device="cpu")[:, None] * torch.tensor(cols, device="cpu")
    return new.result(divide, total, count if count.numel() > 1 else int(count), node.shape, node.dtype)


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
    new, shape, axes = Rewriting(node), maps.shapes[name], maps.axes[name]
    p = 2.0 if p is None else float(p)
    if abs(p) == torch.inf and not set(axes) <= set(over):
        return None
    powers = new.add("power", power_of_norm, (Ref(name), p), shape).name
    if abs(p) == torch.inf:
        total = new.reduce([powers], Maximum(over, 1 if p > 0 else -1), *[kept(shape, over)] * 2)[0]
    else:
        (total,) = new.reduce([powers], sum_over(over, axes, maps.extent(name)), kept(shape, over))
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
        return new.result(divide, mean, 1, node.shape, node.dtype)
    return new.result(from_squared_deviations, squares, count - correction, "std" in node.op, node.shape, node.dtype)


def from_squared_deviations(
    squares: Tensor, count: float, root: bool, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Variance or standard deviation from a sum of squared deviations."""
    value = squares / max(count, 0.0)
    return root_of_norm(value, 2.0, shape, dtype) if root else value.reshape(tuple(shape)).to(dtype)


@rewrite(aten.logsumexp, aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax)
def softmax(node: Node, maps: Maps) -> list[Node] | None:
    """exp(x - L), x - L or L itself, where L = log(sum(exp(x)))."""
    if (found := reduced(node, maps)) is None or not set(maps.axes[found[0]]) <= set(found[1]):
        return None
    name, over = found
    new, small = Rewriting(node), kept(maps.shapes[name], over)
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


rule(power_of_norm, softmax_of, log_softmax_of)(pointwise)


@rewrite(aten.einsum, aten.matmul, aten.bmm)
def contraction(node: Node, maps: Maps) -> list[Node] | None:
    """A product of maps, summed over height and width."""
    if node.op != "aten.einsum":
        node = as_einsum(node, [maps.shapes[ref.name] for ref in node.args[:2]])
    equation, operands = node.args[:2]
    if not all(isinstance(o, Ref) and o.name in maps for o in operands):
        return None
    left, right = equation.split("->")
    letters = {
        tuple(term[axis] for axis in maps.axes[operand.name])
        for term, operand in zip(left.split(","), operands, strict=True)
    }
    if len(letters) != 1 or set(*letters) & set(right):
        return None
    new = Rewriting(node)
    (total,) = new.reduce([operand.name for operand in operands], sum_of_product(equation), node.shape)
    return new.result(divide, total, 1, node.shape, node.dtype)
