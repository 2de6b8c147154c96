"""Reductions, gathered over a whole image while its tiles pass: sums, moments, maxima.

A reduction is four functions. `gather` makes of one tile what is kept of it, `merge` makes one of what was kept of two sets of
tiles, and `finish` turns that into the result, a tuple of small tensors. `pull` is for the backward pass: given the result and its
gradients, where they enter one tile, as pairs of a tensor and its gradient. Most reductions say `local` instead: a differentiable
function of one tile whose gradient is the tile's share of the gradient of the result, with None for parts that have no gradient.

Of an image with a mask the foreground alone is reduced: `masks` of the context are those of the tiles.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from widefield.streaming.extents import Span, cell
from widefield.streaming.rules.base import Axes, TileContext

Parts = tuple[Tensor, ...]
Grads = Sequence[Tensor | None]
Pairs = list[tuple[Tensor, Tensor]]

_BLOCK = 1 << 17  # elements of a map that are looked at together, where that is done block by block


class Reduction(ABC):
    """See the module's docstring. `tiles` are windows of the maps that are reduced, all of the same positions."""

    @abstractmethod
    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> Any: ...
    @abstractmethod
    def merge(self, one: Any, other: Any) -> Any: ...
    @abstractmethod
    def finish(self, state: Any) -> Parts: ...
    @abstractmethod
    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs: ...


@dataclass(frozen=True)
class InParts(Reduction):
    """A reduction of maps that are rolled or flipped: `parts` gives tiles and context as the model sees them, part by part."""

    inner: Reduction
    parts: Callable[[Sequence[Tensor], TileContext], Sequence[tuple[Sequence[Tensor], TileContext]]]

    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> Any:
        states = [self.inner.gather(*part) for part in self.parts(tiles, context)]
        return list(accumulate(states, self.inner.merge))[-1]

    def merge(self, one: Any, other: Any) -> Any:
        return self.inner.merge(one, other)

    def finish(self, state: Any) -> Parts:
        return self.inner.finish(state)

    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs:
        with torch.enable_grad():
            parts = self.parts(tiles, context)
        return [pair for part in parts for pair in self.inner.pull(result, *part, grads)]


class _Local(Reduction):
    """`pull` by autograd through `local`."""

    @abstractmethod
    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        """See the module's docstring."""

    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs:
        with torch.enable_grad():
            local = self.local(result, tiles, context)
        return [(x, g.to(x.dtype)) for x, g in zip(local, grads, strict=True) if x is not None and g is not None]


def foreground(tiles: Sequence[Tensor], context: TileContext, background: float = 0.0) -> Sequence[Tensor]:
    """Return `tiles` with `background` in place of what the mask leaves out."""
    if context.masks is None:
        return tiles
    return [
        torch.where(mask, tile, torch.full((), background, dtype=tile.dtype, device=tile.device))
        for mask, tile in zip(context.masks, tiles, strict=True)
    ]


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tiles of `dtype` are gathered: float32 or better."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


@dataclass(frozen=True)
class Sum(_Local):
    """The sum over all tiles of `part(tiles, context)`, a tensor of the same shape for every tile.

    With a `count`, which is that of the elements in each sum over the whole image, the result has a second part of the shape of
    the first: this count, or that of the foreground.
    """

    part: Callable[[Sequence[Tensor], TileContext], Tensor]
    count: float | Tensor | None = None

    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor, Tensor | None]:
        total = self._total(tiles, context)
        if self.count is None or context.masks is None:
            return total.to(precise(total.dtype)), None
        ones = context.masks[0].expand(tiles[0].shape).to(precise(torch.float64))
        return total.to(precise(total.dtype)), self.part([ones], context)

    def merge(self, one: Any, other: Any) -> Any:
        (total, count), (total2, count2) = one, other
        return total + total2, None if count is None else count + count2

    def finish(self, state: Any) -> Parts:
        total, count = state
        if self.count is None:
            return (total,)
        whole = self.count if isinstance(self.count, Tensor) else torch.tensor(self.count)
        return total, (whole.expand(total.shape) if count is None else count).to(total)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        return (self._total(tiles, context).to(result[0].dtype), None)[: len(result)]

    def _total(self, tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        return self.part(foreground(tiles, context), context)


def sum_over(dims: Sequence[int], axes: Axes, extent: tuple[int, int], count: int | None = None) -> Sum:
    """The sum over dimensions `dims`, which stay with size 1. They hold the height, the width or both. `count`: see `Sum`."""

    def part(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        tile = tiles[0]
        total = tile.sum(tuple(dims), keepdim=True, dtype=precise(tile.dtype) if tile.is_floating_point() else None)
        for axis, span, size in zip(axes, (context.rows[0], context.cols[0]), extent, strict=True):
            if axis not in dims:
                total = _embed(total, axis, span.start, size)
        return total

    return Sum(part, count)


def sum_of_product(equation: str) -> Sum:
    """The sum over height and width of a product of maps, as an einsum `equation` whose result has neither."""
    return Sum(lambda tiles, context: torch.einsum(equation, list(tiles)))


def sum_of_cells(axes: Axes, extent: tuple[int, int], cells: tuple[int, int]) -> Sum:
    """Sums over a grid of cells, in place of height and width, and the count of positions in each: the cells of PyTorch's adaptive
    pooling, which may overlap.
    """
    rows, cols = (
        [high - low for low, high in (cell(i, n, k) for i in range(k))] for n, k in zip(extent, cells, strict=True)
    )
    count = torch.tensor(rows, device="cpu")[:, None] * torch.tensor(cols, device="cpu")

    def part(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        total = tiles[0].to(precise(tiles[0].dtype))
        for axis, span, size, k in zip(axes, (context.rows[0], context.cols[0]), extent, cells, strict=True):
            if k == 1:
                total = total.sum(axis, keepdim=True)
                continue
            first, last = cells_of(span, size, k)
            if k != size:
                bounds = [cell(i, size, k) for i in range(first, last)]
                member = [[float(low <= y < high) for y in range(span.start, span.stop)] for low, high in bounds]
                matrix = torch.tensor(member, dtype=total.dtype, device=total.device)
                total = torch.tensordot(total, matrix, ([axis], [1])).movedim(-1, axis)
            total = _embed(total, axis, first, k)
        return total

    return Sum(part, count)


def cells_of(span: Span, size: int, count: int) -> tuple[int, int]:
    """The cells [first, last) that hold any of the positions [start, stop)."""
    return span.start * count // size, -(-span.stop * count // size)


def _embed(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    """`x` with zeros around it along `dim`, so that it starts at `start` of `size`."""
    pad = [0, 0] * (x.ndim - dim - 1) + [start, size - start - x.shape[dim]]
    return F.pad(x, pad)


@dataclass(frozen=True)
class Moments(Reduction):
    """Mean, sum of squared deviations from it, and count, over dimensions `dims` (kept with size 1).

    Tiles are merged by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample
    variances", 1979), in float64: no difference of large sums is ever taken.
    """

    dims: tuple[int, ...]

    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> Any:
        (tile,) = foreground(tiles, context)
        if context.masks is None:
            n = torch.full([1] * tile.ndim, prod(tile.shape[d] for d in self.dims), device=tile.device)
        else:
            n = context.masks[0].expand(tile.shape).sum(self.dims, keepdim=True)
        mean = tile.sum(self.dims, keepdim=True, dtype=precise(tile.dtype)) / n.clamp_min(1)
        wide = mean.dtype if mean.device.type == "mps" else torch.float64
        rest, squares = self._deviations(tile, mean, context, wide)  # what rounding the mean has left is in `rest`
        n, mean = n.to(wide), mean.to(wide)
        rest = rest / n.clamp_min(1)
        return n, mean + rest, squares - n * rest * rest, tile.dtype

    def _deviations(self, tile: Tensor, mean: Tensor, context: TileContext, wide: torch.dtype) -> Tensor:
        """Return the sums of deviations from the mean and of their squares, in `wide`, stacked.

        `torch.var_mean` takes longer on a CPU. There it goes block by block, each small enough to stay in the cache.
        """
        dim = max(self.dims, key=tile.shape.__getitem__)
        block_size = tile.shape[dim] * _BLOCK // max(1, tile.numel()) if tile.device.type == "cpu" else tile.shape[dim]
        masks = context.masks and context.masks[0].expand(tile.shape).split(max(1, block_size), dim)
        sums = []
        for k, block in enumerate(tile.split(max(1, block_size), dim)):
            deviation = block - mean if masks is None else torch.where(masks[k], block - mean, 0)
            rest = deviation.sum(self.dims, keepdim=True)
            sums.append(torch.stack([rest, deviation.square_().sum(self.dims, keepdim=True)]))
        return torch.stack(sums).sum(0, dtype=wide)

    def merge(self, one: Any, other: Any) -> Any:
        (n0, mean0, squares0, dtype), (n, mean, squares, _) = one, other
        delta, total = mean - mean0, n0 + n
        share = n / total.clamp_min(1)
        return total, mean0 + delta * share, squares0 + squares + delta * delta * (n0 * share), dtype

    def finish(self, state: Any) -> Parts:
        n, mean, squares, dtype = state
        return mean.to(precise(dtype)), squares.to(precise(dtype)), n.to(precise(dtype)).expand_as(mean)

    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs:
        """The mean has the gradient 1 / count at every position, the sum of squares 2 (x - mean)."""
        mean, _, count = result
        of_mean, of_squares = (torch.zeros_like(mean) if g is None else g for g in grads[:2])
        slope = 2 * of_squares
        tile = tiles[0].detach().to(slope.dtype)
        (grad,) = foreground([torch.addcmul(of_mean / count - mean * slope, tile, slope)], context)
        return [(tiles[0], grad.to(tiles[0].dtype))]


@dataclass(frozen=True)
class Maximum(_Local):
    """The maximum over dimensions `dims` (kept with size 1) and how often it occurs; the minimum with `sign` -1.

    Equal maxima share the gradient, as in `torch.amax`; where the maximum is NaN, all positions get NaN.
    """

    dims: tuple[int, ...]
    sign: int = 1

    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> Any:
        (tile,) = foreground(tiles, context, lowest(tiles[0].dtype, self.sign))
        best = (tile.amax if self.sign > 0 else tile.amin)(self.dims, keepdim=True)
        return best, self._equal(tiles, best, context).sum(self.dims, keepdim=True)

    def merge(self, one: Any, other: Any) -> Any:
        highest = (torch.maximum if self.sign > 0 else torch.minimum)(one[0], other[0])
        return highest, sum(torch.where(best == highest, count, 0) for best, count in (one, other))

    def finish(self, state: Any) -> Parts:
        return tuple(state)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        equal = self._equal(tiles, result[0], context)
        return (tiles[0] * equal).sum(self.dims, keepdim=True) / result[1].to(tiles[0].dtype), None

    def _equal(self, tiles: Sequence[Tensor], best: Tensor, context: TileContext) -> Tensor:
        equal = tiles[0] == best
        return equal if context.masks is None else equal & context.masks[0]


def lowest(dtype: torch.dtype, sign: int = 1) -> float:
    """Return the value of `dtype` that no maximum (`sign` 1) or minimum (-1) takes before another."""
    if dtype.is_floating_point:
        return -sign * torch.inf
    if dtype == torch.bool:
        return sign < 0
    info = torch.iinfo(dtype)
    return info.min if sign > 0 else info.max


@dataclass(frozen=True)
class FirstMaximum(_Local):
    """The maximum of each cell of a grid over height and width (see `sum_of_cells`) and its index in the flattened map.

    The first in raster order wins a tie, as in PyTorch's adaptive max pooling. Height and width of the result come last. The
    minimum with `sign` -1. Cells without foreground have the value 0 and the index -1.
    """

    axes: Axes
    extent: tuple[int, int]
    cells: tuple[int, int]
    sign: int = 1

    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> Any:
        tile, row, col = tiles[0].movedim(self.axes, (-2, -1)), context.rows[0], context.cols[0]
        shape = (*tile.shape[:-2], *self.cells)
        value, index = tile.new_zeros(shape), torch.full(shape, -1, dtype=torch.int64, device=tile.device)
        mask = None if context.masks is None else context.masks[0].movedim(self.axes, (-2, -1)).expand(tile.shape)
        for i in range(*cells_of(row, self.extent[0], self.cells[0])):
            for j in range(*cells_of(col, self.extent[1], self.cells[1])):
                low, high = cell(i, self.extent[0], self.cells[0])
                left, right = cell(j, self.extent[1], self.cells[1])
                top, start = max(low, row.start), max(left, col.start)
                at = (..., slice(top - row.start, high - row.start), slice(start - col.start, right - col.start))
                place, value[..., i, j] = self._best(tile[at], None if mask is None else mask[at])
                width = tile[at].shape[-1]
                place_in_map = (top + place // width) * self.extent[1] + start + place % width
                index[..., i, j] = torch.where(place < 0, -1, place_in_map)
        return value, index

    def _best(self, part: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the place of the extremum in the flattened `part` of a tile, and its value; -1 and 0 if all is background."""
        part = part.flatten(-2)
        pick = torch.max if self.sign > 0 else torch.min
        if mask is None:
            value, place = pick(part, -1)
            return place, value
        mask = mask.flatten(-2)
        _, place = pick(torch.where(mask, part, lowest(part.dtype, self.sign)), -1, keepdim=True)
        first = mask.to(torch.uint8).argmax(-1, keepdim=True)  # where all of the foreground is as low as can be
        place = torch.where(mask.gather(-1, place), place, first)
        some = mask.any(-1)
        return torch.where(some, place[..., 0], -1), torch.where(some, part.gather(-1, place)[..., 0], 0)

    def merge(self, one: Any, other: Any) -> Any:
        (old, old_place), (best, place) = one, other
        better = (best > old if self.sign > 0 else best < old) | (best.isnan() & ~old.isnan()) | (old_place < 0)
        better |= ((best == old) | (best.isnan() & old.isnan())) & (place < old_place)
        better &= place >= 0
        return torch.where(better, best, old), torch.where(better, place, old_place)

    def finish(self, state: Any) -> Parts:
        return tuple(state)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        tile, row, col = tiles[0].movedim(self.axes, (-2, -1)), context.rows[0], context.cols[0]
        y, x = result[1] // self.extent[1] - row.start, result[1] % self.extent[1] - col.start
        here = (y >= 0) & (y < row.size) & (x >= 0) & (x < col.size) & (result[1] >= 0)
        index = torch.where(here, y * col.size + x, 0)
        found = tile.flatten(-2).gather(-1, index.flatten(-2)).view(index.shape)
        return torch.where(here, found, 0), None


@dataclass(frozen=True)
class ExpSum(_Local):
    """max(x) and sum(exp(x - max(x))) over dimensions `dims` (kept with size 1), rescaled whenever the maximum grows.

    The gradient goes through the sum alone: that of log(sum) + max is the same for every shift.
    """

    dims: tuple[int, ...]

    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> Any:
        (tile,) = foreground([tiles[0].to(precise(tiles[0].dtype))], context, -torch.inf)
        top = _finite(tile.amax(self.dims, keepdim=True))
        return top, (tile - top).exp().sum(self.dims, keepdim=True)

    def merge(self, one: Any, other: Any) -> Any:
        (top, total), (top2, total2) = one, other
        highest = torch.maximum(top, top2)
        return highest, total * (top - highest).exp() + total2 * (top2 - highest).exp()

    def finish(self, state: Any) -> Parts:
        return tuple(state)

    def local(self, result: Parts, tiles: Sequence[Tensor], context: TileContext) -> tuple[Tensor | None, ...]:
        (tile,) = foreground([tiles[0].to(result[0].dtype)], context, -torch.inf)
        return None, (tile - result[0]).exp().sum(self.dims, keepdim=True)


def _finite(top: Tensor) -> Tensor:
    """A maximum of minus infinity (nothing but masked positions) would make exp(-inf + inf): the lowest number instead."""
    return top.clamp_min(torch.finfo(top.dtype).min)
