"""Reductions, gathered over a whole image while its tiles pass: sums, moments, maxima.

A reduction is three functions. `fold` takes one more tile into what has been gathered; `finish` turns that into the result, a
tuple of small tensors. `pull` is for the backward pass: given the result and its gradients, where they enter one tile, as pairs
of a tensor and its gradient. Most reductions say `local` instead: a differentiable function of one tile whose gradient is the
tile's share of the gradient of the result, with None for parts that have no gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from widefield.streaming.extents import Span
from widefield.streaming.rules.base import Axes, TileContext

Parts = tuple[Tensor, ...]
Grads = Sequence[Tensor | None]
Pairs = list[tuple[Tensor, Tensor]]


class Reduction(ABC):
    """See the module's docstring. `tiles` are windows of the maps that are reduced, all of the same positions."""

    @abstractmethod
    def fold(self, state: Any, tiles: Sequence[Tensor], context: TileContext) -> Any: ...
    @abstractmethod
    def finish(self, state: Any) -> Parts: ...
    @abstractmethod
    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs: ...


class _Local(Reduction):
    """`pull` by autograd through `local`."""

    @abstractmethod
    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        """See the module's docstring."""

    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs:
        with torch.enable_grad():
            local = self.local(result, tiles, context)
        return [(x, g.to(x.dtype)) for x, g in zip(local, grads, strict=True) if x is not None and g is not None]


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tiles of `dtype` are gathered: float32 or better."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


@dataclass(frozen=True)
class Sum(_Local):
    """The sum over all tiles of `part(tiles, context)`, a tensor of the same shape for every tile."""

    part: Callable[[Sequence[Tensor], TileContext], Tensor]

    def fold(self, state: Tensor | None, tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        part = self.part(tiles, context)
        part = part.to(precise(part.dtype))
        return part if state is None else state + part

    def finish(self, state: Tensor) -> Parts:
        return (state,)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        return (self.part(tiles, context).to(result[0].dtype),)


def sum_over(dims: Sequence[int], axes: Axes, extent: tuple[int, int]) -> Sum:
    """The sum over dimensions `dims`, which stay with size 1. They hold the height, the width or both."""

    def part(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        tile = tiles[0]
        total = tile.sum(tuple(dims), keepdim=True, dtype=precise(tile.dtype) if tile.is_floating_point() else None)
        for axis, span, size in zip(axes, (context.rows[0], context.cols[0]), extent, strict=True):
            if axis not in dims:
                total = _embed(total, axis, span.start, size)
        return total

    return Sum(part)


def sum_of_product(equation: str) -> Sum:
    """The sum over height and width of a product of maps, as an einsum `equation` whose result has neither."""
    return Sum(lambda tiles, context: torch.einsum(equation, list(tiles)))


def sum_of_cells(axes: Axes, extent: tuple[int, int], cells: tuple[int, int]) -> Sum:
    """Sums over a grid of cells, in place of height and width: the cells of PyTorch's adaptive pooling, which may overlap."""

    def part(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        total = tiles[0].to(precise(tiles[0].dtype))
        for axis, span, size, count in zip(axes, (context.rows[0], context.cols[0]), extent, cells, strict=True):
            if count == 1:
                total = total.sum(axis, keepdim=True)
                continue
            first, last = cells_of(span, size, count)
            if count != size:
                bounds = [cell(i, size, count) for i in range(first, last)]
                member = [[float(low <= y < high) for y in range(span.start, span.stop)] for low, high in bounds]
                matrix = torch.tensor(member, dtype=total.dtype, device=total.device)
                total = torch.tensordot(total, matrix, ([axis], [1])).movedim(-1, axis)
            total = _embed(total, axis, first, count)
        return total

    return Sum(part)


def cell(i: int, size: int, count: int) -> tuple[int, int]:
    """The positions [low, high) of cell i, where `size` positions are pooled to `count` cells."""
    return i * size // count, -(-(i + 1) * size // count)


def cells_of(span: Span, size: int, count: int) -> tuple[int, int]:
    """The cells [first, last) that hold any of the positions [start, stop)."""
    return span.start * count // size, -(-span.stop * count // size)


def _embed(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    """`x` with zeros around it along `dim`, so that it starts at `start` of `size`."""
    pad = [0, 0] * (x.ndim - dim - 1) + [start, size - start - x.shape[dim]]
    return F.pad(x, pad)


@dataclass(frozen=True)
class Moments(Reduction):
    """Mean and sum of squared deviations from it, over dimensions `dims` (kept with size 1); `count` elements in all.

    Tiles are merged by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample
    variances", 1979), in float64: no difference of large sums is ever taken.
    """

    dims: tuple[int, ...]
    count: int

    def fold(self, state: Any, tiles: Sequence[Tensor], context: TileContext) -> Any:
        tile = tiles[0]
        n = prod(tile.shape[d] for d in self.dims)
        mean = tile.mean(self.dims, keepdim=True, dtype=precise(tile.dtype))
        deviation = tile - mean
        rest = deviation.sum(self.dims, keepdim=True)  # what rounding the mean has left
        squares = deviation.square_().sum(self.dims, keepdim=True)  # torch.var_mean is four times slower on the CPU
        wide = mean.dtype if mean.device.type == "mps" else torch.float64
        mean, rest, squares = mean.to(wide), rest.to(wide), squares.to(wide)
        mean, squares = mean + rest / n, squares - rest * rest / n
        if state is None:
            return n, mean, squares, tile.dtype
        n0, mean0, squares0, dtype = state
        delta = mean - mean0
        total = n0 + n
        return total, mean0 + delta * (n / total), squares0 + squares + delta * delta * (n0 * n / total), dtype

    def finish(self, state: Any) -> Parts:
        _, mean, squares, dtype = state
        return mean.to(precise(dtype)), squares.to(precise(dtype))

    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs:
        """The mean has the gradient 1 / count at every position, the sum of squares 2 (x - mean)."""
        of_mean, of_squares = (torch.zeros_like(result[0]) if g is None else g for g in grads)
        slope = 2 * of_squares
        tile = tiles[0].to(slope.dtype)
        grad = torch.addcmul(of_mean / self.count, tile.detach() - result[0], slope)
        return [(tiles[0], grad.to(tiles[0].dtype))]


@dataclass(frozen=True)
class Maximum(_Local):
    """The maximum over dimensions `dims` (kept with size 1) and how often it occurs; the minimum with `sign` -1.

    Equal maxima share the gradient, as in `torch.amax`; where the maximum is NaN, all positions get NaN.
    """

    dims: tuple[int, ...]
    sign: int = 1

    def fold(self, state: Any, tiles: Sequence[Tensor], context: TileContext) -> Any:
        tile = tiles[0]
        best = (tile.amax if self.sign > 0 else tile.amin)(self.dims, keepdim=True)
        count = (tile == best).sum(self.dims, keepdim=True)
        if state is None:
            return best, count
        highest = (torch.maximum if self.sign > 0 else torch.minimum)(state[0], best)
        return highest, torch.where(state[0] == highest, state[1], 0) + torch.where(best == highest, count, 0)

    def finish(self, state: Any) -> Parts:
        return tuple(state)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        equal = tiles[0] == result[0]
        return (tiles[0] * equal).sum(self.dims, keepdim=True) / result[1].to(tiles[0].dtype), None


@dataclass(frozen=True)
class FirstMaximum(_Local):
    """The maximum of each cell of a grid over height and width (see `sum_of_cells`) and its index in the flattened map.

    The first in raster order wins a tie, as in PyTorch's adaptive max pooling. Height and width of the result come last. The
    minimum with `sign` -1.
    """

    axes: Axes
    extent: tuple[int, int]
    cells: tuple[int, int]
    sign: int = 1

    def fold(self, state: Any, tiles: Sequence[Tensor], context: TileContext) -> Any:
        tile, row, col = tiles[0].movedim(self.axes, (-2, -1)), context.rows[0], context.cols[0]
        if state is None:
            shape = (*tile.shape[:-2], *self.cells)
            state = (tile.new_zeros(shape), torch.full(shape, -1, dtype=torch.int64, device=tile.device))
        value, index = state
        for i in range(*cells_of(row, self.extent[0], self.cells[0])):
            for j in range(*cells_of(col, self.extent[1], self.cells[1])):
                low, high = cell(i, self.extent[0], self.cells[0])
                left, right = cell(j, self.extent[1], self.cells[1])
                top, start = max(low, row.start), max(left, col.start)
                part = tile[..., top - row.start : high - row.start, start - col.start : right - col.start]
                best, at = (torch.max if self.sign > 0 else torch.min)(part.flatten(-2), -1)
                place = (top + at // part.shape[-1]) * self.extent[1] + start + at % part.shape[-1]
                old, old_place = value[..., i, j], index[..., i, j]
                better = (best > old if self.sign > 0 else best < old) | (best.isnan() & ~old.isnan()) | (old_place < 0)
                better |= (best == old) & (place < old_place)
                value[..., i, j] = torch.where(better, best, old)
                index[..., i, j] = torch.where(better, place, old_place)
        return value, index

    def finish(self, state: Any) -> Parts:
        return tuple(state)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        tile, row, col = tiles[0].movedim(self.axes, (-2, -1)), context.rows[0], context.cols[0]
        y, x = result[1] // self.extent[1] - row.start, result[1] % self.extent[1] - col.start
        here = (y >= 0) & (y < row.size) & (x >= 0) & (x < col.size)
        index = torch.where(here, y * col.size + x, 0)
        found = tile.flatten(-2).gather(-1, index.flatten(-2)).view(index.shape)
        return torch.where(here, found, 0), None


@dataclass(frozen=True)
class ExpSum(_Local):
    """max(x) and sum(exp(x - max(x))) over dimensions `dims` (kept with size 1), rescaled whenever the maximum grows.

    The gradient goes through the sum alone: that of log(sum) + max is the same for every shift.
    """

    dims: tuple[int, ...]

    def fold(self, state: Any, tiles: Sequence[Tensor], context: TileContext) -> Any:
        tile = tiles[0].to(precise(tiles[0].dtype))
        top = _finite(tile.amax(self.dims, keepdim=True))
        total = (tile - top).exp().sum(self.dims, keepdim=True)
        if state is None:
            return top, total
        highest = torch.maximum(state[0], top)
        return highest, state[1] * (state[0] - highest).exp() + total * (top - highest).exp()

    def finish(self, state: Any) -> Parts:
        return tuple(state)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        return None, (tiles[0].to(result[0].dtype) - result[0]).exp().sum(self.dims, keepdim=True)


def _finite(top: Tensor) -> Tensor:
    """A maximum of minus infinity (nothing but masked positions) would make exp(-inf + inf): the lowest number instead."""
    return top.clamp_min(torch.finfo(top.dtype).min)
