"""Flipped maps: height and width in the other direction, while the tiles stay in the order of the image.

`torch.flip` moves nothing: a map stays as it was scanned, and `Maps.flipped` says along which axes the model sees it the other way
round. An operation on such maps runs on tiles that are turned round as the model sees them, with its own borders, and its result
is turned back. So a model that looks at flipped images too, and flips its results back, is one scan. What reads a map together
with one that is flipped would need the last rows with the first ones, and is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.extents import AllAtOnce, AxisMap, Positions, Span, identity
from widefield.streaming.receptive_field import ReceptiveField
from widefield.streaming.rules import ranges
from widefield.streaming.rules.base import (
    STREAM,
    Axes,
    Maps,
    Placed,
    Read,
    TileContext,
    argument,
    dims,
    only_map,
    rewrite,
    rule,
    swap_refs,
)
from widefield.streaming.rules.reductions import InParts, Reduction
from widefield.streaming.rules.rewriting import Rewriting
from widefield.streaming.rules.rolled import moved_weight, turn

aten = torch.ops.aten
Flips = tuple[bool, bool]


@dataclass(frozen=True)
class Mirrored(AllAtOnce):
    """`inner` along an axis of which both ends are exchanged: inputs and outputs are counted from the last one."""

    inner: AxisMap

    @property
    def n_in(self) -> int:
        return self.inner.n_in

    @property
    def n_out(self) -> int:
        return self.inner.n_out

    @property
    def stride(self) -> int:
        return self.inner.stride

    @property
    def receptive_field(self) -> ReceptiveField | None:
        if (inner := self.inner.receptive_field) is None:
            return None
        both = inner.den * (self.n_in - 1) - inner.num * (self.n_out - 1)
        return ReceptiveField(inner.num, inner.den, both - inner.high, both - inner.low)

    def seen(self, span: Span) -> Span:
        """Return a computation as `inner` counts, which counts as this does."""
        outputs, inputs = (
            (self.n_out - span.stop, self.n_out - span.start),
            (self.n_in - span.last, self.n_in - span.first),
        )
        return Span(*outputs, *inputs, span.high, span.low)

    def span(self, o0: int, o1: int) -> Span:
        found = self.inner.span(self.n_out - o1, self.n_out - o0)
        return Span(o0, o1, self.n_in - found.last, self.n_in - found.first, found.high, found.low)

    def first_all(self, o: Positions) -> Positions:
        return self.n_in - self.inner.stop_all(self.n_out - o)

    def stop_all(self, o: Positions) -> Positions:
        return self.n_in - self.inner.first_all(self.n_out - o)

    def ready_all(self, r: Positions) -> Positions:
        ready = np.searchsorted(self.stop_all(np.arange(1, self.n_out + 1)), r, side="right")
        ready[r <= 0] = 0
        ready[r >= self.n_in] = self.n_out
        return ready


@rewrite(aten.flip)
def flip(node: Node, maps: Maps) -> list[Node] | None:
    """A flip of height or width as `mirror`; one of other dimensions stays."""
    name = only_map(node, maps)
    axes, shape = maps.axes[name], maps.shapes[name]
    over = dims(node, argument(node, 1, "dims"), len(shape)) if argument(node, 1, "dims") else ()
    if not set(over) & set(axes):
        return None
    new, source = Rewriting(node), Ref(name)
    if others := [d for d in over if d not in axes]:
        source = new.add("others", aten.flip.default, (source, others), shape)
    return new.result(mirror, source, axes.rows in over, axes.cols in over)


def mirror(x: Tensor, rows: bool, cols: bool) -> Tensor:
    """A map of which the model sees the rows, the columns or both the other way round: the same tiles."""
    raise AssertionError("maps are turned round in a scan only")


@rule(mirror, saves=(), cheap=True, keeps_batch=True, is_view=True, range_of=ranges.anywhere)
def mirrored(node: Node, maps: Maps) -> Placed:
    """See `mirror`."""
    name = only_map(node, maps)
    return Placed((maps.read(name),), maps.axes[name], lambda tiles, context: tiles[0])


def turned_round(node: Node, placed: Placed, maps: Maps) -> tuple[list[Node], Node, Placed, Flips]:
    """An operation as it runs on maps of which some are flipped.

    Args:
        node: the operation.
        placed: how it would be placed if none of its maps were flipped.

    Returns:
        Plain nodes to be placed before it; the operation, which reads these; how it is placed; and along which axes its result is
        flipped.
    """
    found = {_flips(read.source, maps) for read in placed.reads if read.source not in maps.broadcast}
    sides = [{flips[axis] for flips in found if flips[axis] is not None} for axis in (0, 1)]
    if any(len(side) > 1 for side in sides):
        raise node.refuse(
            "reads a map together with one that is flipped, so that each tile would need the last rows or columns with the first",
            f"flip results back before they meet others; or {STREAM}",
        )
    rows, cols = (side == {True} for side in sides)
    rolled = any(read.source in maps.begin for read in placed.reads)
    if (rolled and (node.target is mirror or rows or cols)) or (node.target is turn and (rows or cols)):
        raise node.refuse(
            "rolls a map that is flipped, or flips one that is rolled", "do one of them outside of the model"
        )
    nodes: list[Node] = []
    if not (rows or cols):
        return nodes, node, placed, (False, False)
    reads, names = [], {}
    for read in placed.reads:
        source = read.source
        if source in maps.broadcast:
            source = moved_weight(node, source, aten.flip.default, (rows, cols), maps, nodes)
            names[maps.broadcast[read.source]] = maps.broadcast[source]
        reads.append(Read(source, _mirrored(read.rows, rows), _mirrored(read.cols, cols)))
    if node.target is not mirror and not _is_alike(placed):
        back = _Back(placed, (rows, cols), tuple(maps.axes[read.source] for read in placed.reads))
        shapes = [maps.shapes[read.source] for read in placed.reads]
        copies = sum(map(math.prod, [*shapes, node.shape])) // (placed.reads[0].rows.n_out * placed.reads[0].cols.n_out)
        placed = replace(
            placed,
            run=back.run,
            exclusive=False,
            forward_bytes=placed.forward_bytes + copies * node.dtype.itemsize,
            backward_bytes=placed.backward_bytes + copies * node.dtype.itemsize,
        )
        if isinstance(node.target, Reduction):
            reduction: Any = InParts(node.target, lambda tiles, context: [back.seen(tiles, context)])
            node = replace(node, target=reduction)
    return nodes, swap_refs(node, names), replace(placed, reads=tuple(reads)), (rows, cols)


def _flips(name: str, maps: Maps) -> tuple[bool | None, bool | None]:
    """For rows and columns, True if the model sees them the other way round; None where there is but one."""
    flips = maps.flipped.get(name, (False, False))
    rows, cols = (flip if n > 1 else None for flip, n in zip(flips, maps.extent(name), strict=True))
    return rows, cols


def _mirrored(axis_map: AxisMap, flipped: bool) -> AxisMap:
    return Mirrored(axis_map) if flipped and axis_map != identity(axis_map.n_in) else axis_map


def _is_alike(placed: Placed) -> bool:
    """True if an operation gives the same whichever way round its maps are."""
    pointwise = all(
        (read.rows, read.cols) == (identity(read.rows.n_in), identity(read.cols.n_in)) for read in placed.reads
    )
    return pointwise and placed.op.cheap and not placed.op.draws and not placed.op.masked


@dataclass(frozen=True)
class _Back:
    """An operation on tiles of flipped maps, whose height and width stand in `axes`."""

    placed: Placed
    flips: Flips
    axes: tuple[Axes, ...]

    def run(self, tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        return self._flip(self.placed.run(*self.seen(tiles, context)), self.placed.axes)

    def seen(self, tiles: Sequence[Tensor], context: TileContext) -> tuple[list[Tensor], TileContext]:
        """Tiles and context as the model sees the maps."""
        reads, spans = self.placed.reads, []
        for axis, given in enumerate((context.rows, context.cols)):
            maps = [read.cols if axis else read.rows for read in reads]
            spans.append(
                tuple(Mirrored(m).seen(s) if self.flips[axis] else s for m, s in zip(maps, given, strict=True))
            )
        turned = [self._flip(tile, axes) for tile, axes in zip(tiles, self.axes, strict=True)]
        return turned, context._replace(rows=spans[0], cols=spans[1])

    def _flip(self, x: Tensor, axes: Axes) -> Tensor:
        return x.flip([d for d, flip in zip(axes, self.flips, strict=True) if flip])
