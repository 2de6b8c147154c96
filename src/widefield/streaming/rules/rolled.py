"""Rolled maps: height and width as circles, of which the first row and column are not those where the scan begins.

`torch.roll` moves nothing: the tiles stay in the order of the image, and `Maps.begin` says which row and column of the result come
first. What stands before them comes at the end. An operation on such maps is computed in two parts along each axis: first the
outputs that read nothing before `begin`, up to the border of the map, then those from the other border on, for which some of the
first rows that were scanned are read again. These are a map of their own (`first_positions`), which is carried through the scan
and joined to the map at its end (`joined`): as many rows as the map was rolled by, or fewer. Every operation runs as it would on
the map as the model sees it, with its own borders, so that no other rule has to know.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.extents import AllAtOnce, AxisMap, Positions, Span, Window, identity
from widefield.streaming.receptive_field import IDENTITY, ReceptiveField
from widefield.streaming.rules import ranges
from widefield.streaming.rules.base import (
    Axes,
    Maps,
    Placed,
    Read,
    Run,
    TileContext,
    argument,
    dims,
    only_map,
    refuse_whole,
    rewrite,
    rule,
    sources,
    swap_refs,
)
from widefield.streaming.rules.reductions import InParts, Reduction
from widefield.streaming.rules.rewriting import Rewriting

aten = torch.ops.aten
_FARTHEST = 64  # positions that a roll may move a map by: each tile carries as many


@dataclass(frozen=True)
class Rolled(AllAtOnce):
    """`inner` along an axis that is a circle: inputs come from `begin_in` on, outputs from `begin` on, and so round.

    Outputs before `begin` come last; for them some inputs are read a second time, as if they followed once more after all
    others (`n_in` counts them). A negative `begin_in` counts back from the end: what stands before input 0 comes first, and is
    not read until the end. It must be that `inner.first(begin) >= begin_in`.
    """

    inner: AxisMap
    begin_in: int
    begin: int

    @property
    def n_in(self) -> int:
        behind = self.inner.n_in + self.inner.stop(self.begin) if self.begin else self.inner.stop(self.n_out)
        return max(self.inner.n_in, behind - self.begin_in)

    @property
    def n_out(self) -> int:
        return self.inner.n_out

    @property
    def stride(self) -> int:
        return self.inner.stride

    @property
    def receptive_field(self) -> ReceptiveField | None:
        return self.inner.receptive_field

    @property
    def again(self) -> int:
        """Number of inputs that are read twice: so many of the first ones."""
        return self.n_in - self.inner.n_in

    @property
    def at_end(self) -> int:
        """Number of outputs that come before the first one that stands before `begin`."""
        return self.n_out - self.begin

    def parts(self, p0: int, p1: int) -> list[tuple[Span, int]]:
        """The computations of outputs `[p0, p1)`, in `inner`'s positions, each with what to add to them for those of this map."""
        parts = []
        if p0 < self.at_end:
            parts.append((self.inner.span(p0 + self.begin, min(p1, self.at_end) + self.begin), -self.begin_in))
        if p1 > self.at_end:
            low, high = max(p0, self.at_end) - self.at_end, p1 - self.at_end
            parts.append((self.inner.span(low, high), self.inner.n_in - self.begin_in))
        return parts

    def span(self, o0: int, o1: int) -> Span:
        parts = self.parts(o0, o1)
        return Span(o0, o1, min(part.first + add for part, add in parts), max(part.last + add for part, add in parts))

    def ready_all(self, r: Positions) -> Positions:
        n, there = self.inner.n_in, r + self.begin_in
        ready = np.maximum(self.inner.ready_all(np.clip(there, 0, n)) - self.begin, 0)
        behind = np.minimum(self.inner.ready_all(np.clip(there - n, 0, n)), self.begin)
        ready = ready + np.where(ready == self.at_end, behind, 0)
        ready[r >= self.n_in] = self.n_out
        if not self.inner.ready(0):
            ready[r <= 0] = 0
        return ready

    def first_all(self, o: Positions) -> Positions:
        before, behind = np.minimum(o + self.begin, self.n_out), np.maximum(o - self.at_end, 0)
        first = self.inner.first_all(before) - self.begin_in
        first = np.where(o < self.at_end, first, self.inner.first_all(behind) + self.inner.n_in - self.begin_in)
        return np.where(o < self.n_out, first, self.n_in)

    def stop_all(self, o: Positions) -> Positions:
        before, behind = np.minimum(o + self.begin, self.n_out), np.maximum(o - self.at_end, 0)
        stop = self.inner.stop_all(before) - self.begin_in
        stop = np.where(o <= self.at_end, stop, self.inner.stop_all(behind) + self.inner.n_in - self.begin_in)
        return np.where(o > 0, np.maximum(stop, 0), 0)


@dataclass(frozen=True, slots=True)
class Behind(Window):
    """Output `o` is input `o - padding`: of the positions that are joined to a rolled map at its end (see `Rolled`)."""

    @property
    def receptive_field(self) -> ReceptiveField:
        """The same rows again, one turn later."""
        return IDENTITY


@rewrite(aten.roll)
def roll(node: Node, maps: Maps) -> list[Node] | None:
    """A roll along height or width, in either direction, as `turn`; one along other dimensions stays."""
    name = only_map(node, maps)
    axes, shape = maps.axes[name], maps.shapes[name]
    shifts, over = argument(node, 1, "shifts"), argument(node, 2, "dims")
    if not over and over != 0:
        raise refuse_whole(node, "rolls all positions of")
    by = dict.fromkeys(range(len(shape)), 0)
    for shift, d in zip([shifts] if isinstance(shifts, int) else shifts, dims(node, over, len(shape)), strict=True):
        by[d] += shift
    turns = [_shortest(by[d], shape[d]) for d in axes]
    if not any(turns):
        return None
    if max(map(abs, turns)) > _FARTHEST:
        raise node.refuse(
            f"rolls a map by {turns[0]} rows and {turns[1]} columns, and every tile would carry as many",
            f"roll by at most {_FARTHEST} positions, as windows need it; or roll the results outside of the streamed module",
        )
    new, source = Rewriting(node), Ref(name)
    if others := {d: shift for d, shift in by.items() if shift and d not in axes}:
        source = new.add("others", aten.roll.default, (source, list(others.values()), list(others)), shape)
    return new.result(turn, source, *turns)


@rewrite(aten.cat)
def joined_along(node: Node, maps: Maps) -> list[Node] | None:
    """Maps joined along height or width, of which all but one are narrow: these come last in the scan, wherever they stand."""
    names = sources(node, maps)
    dim = dims(node, argument(node, 1, "dim", 0), len(node.shape))[0]
    if len(names) < len(node.args[0]) or any(dim not in maps.axes[name] for name in names):
        return None
    sizes = [maps.shapes[name][dim] for name in names]
    widest = sizes.index(max(sizes))
    if sum(sizes) - sizes[widest] > _FARTHEST:
        raise node.refuse(
            f"joins maps of {', '.join(map(str, sizes))} {('rows', 'columns')[dim == maps.axes[names[0]].cols]}, of which every "
            "tile would carry all but one",
            f"join at most {_FARTHEST} positions to a map, as padding needs it; or join the results outside of the streamed module",
        )
    if not widest:
        return None
    new = Rewriting(node)
    ordered = new.add(
        "in the order of the scan", node.target, ([*node.args[0][widest:], *node.args[0][:widest]], dim), node.shape
    )
    by = sum(sizes[:widest])
    return new.result(turn, ordered, *((by, 0) if dim == maps.axes[names[0]].rows else (0, by)))


@rewrite(aten.pad)
def pad_around(node: Node, maps: Maps) -> list[Node] | None:
    """Circular padding: the first positions once more behind the last ones, and the last ones before the first."""
    if argument(node, 2, "mode", "constant") != "circular":
        return None
    name = only_map(node, maps)
    axes, shape, amounts = maps.axes[name], list(maps.shapes[name]), list(node.args[1])
    sides = {len(shape) - 1 - k: amounts[2 * k : 2 * k + 2] for k in range(len(amounts) // 2)}
    sides = {d: side for d, side in sides.items() if any(side)}
    if sides.keys() - set(axes) or min(amounts) < 0 or any(sum(side) > _FARTHEST for side in sides.values()):
        raise node.refuse(
            f"wraps around by {amounts} positions, and every tile would carry as many",
            f"pad height and width by at most {_FARTHEST} positions in sum, and crop by slices",
        )
    new, source = Rewriting(node), Ref(name)
    for d, (before, after) in sides.items():
        size, pieces = shape[d], [source]
        for suffix, start, stop in (("first", 0, after), ("last", size - before, size)):
            if stop > start:
                of_piece = (*shape[:d], stop - start, *shape[d + 1 :])
                pieces.append(new.add(f"{suffix} of {d}", aten.slice.Tensor, (source, d, start, stop), of_piece))
        shape[d] = size + before + after
        source = new.add(f"joined along {d}", aten.cat.default, (pieces, d), shape)
        if before:
            source = new.add(f"around {d}", turn, (source, *((before, 0) if d == axes.rows else (0, before))), shape)
    return new.result(aten.alias.default, source)


def _shortest(shift: int, size: int) -> int:
    """The smallest roll that does the same as one by `shift`."""
    forward = shift % size
    return forward if 2 * forward <= size else forward - size


def turn(x: Tensor, rows: int, cols: int) -> Tensor:
    """A map rolled by so many rows and columns: the same tiles, of which others come first."""
    raise AssertionError("maps are turned in a scan only")


@rule(turn, saves=(), cheap=True, keeps_batch=True, is_view=True, range_of=ranges.anywhere, exact=True)
def turned(node: Node, maps: Maps) -> Placed:
    """See `turn`."""
    name = only_map(node, maps)
    return Placed((maps.read(name),), maps.axes[name], lambda tiles, context: tiles[0])


def straight(x: Tensor) -> Tensor:
    """A rolled map that leaves the scan, and begins with its first row and column again (`Value.begin`)."""
    return x


@rule(straight, saves=(), cheap=True, keeps_batch=True, is_view=True, range_of=ranges.same, exact=True)
def straightened(node: Node, maps: Maps) -> Placed:
    """See `straight`."""
    return turned(node, maps)


def first_positions(x: Tensor, dim: int, count: int) -> Tensor:
    """The positions of a map along `dim` that are scanned first."""
    return x.narrow(dim, 0, count)


@rule(first_positions, saves=(), repeats=True, keeps_batch=True)
def _first_positions(node: Node, maps: Maps) -> Placed:
    """See `first_positions`."""
    name, dim = node.args[0].name, node.args[1]
    read, axes = maps.read(name), maps.axes[name]
    window = Window(maps.shapes[name][dim], node.shape[dim])
    read = replace(read, rows=window) if dim == axes.rows else replace(read, cols=window)
    return Placed((read,), axes, lambda tiles, context: tiles[0])


def joined(x: Tensor, again: Tensor, dim: int) -> Tensor:
    """A map followed by positions that are read a second time."""
    return torch.cat([x, again], dim)


@rule(joined, saves=(), repeats=True, keeps_batch=True)
def _joined(node: Node, maps: Maps) -> Placed:
    """See `joined`."""
    (name, again), dim = (arg.name for arg in node.args[:2]), node.args[2]
    axes, size, total = maps.axes[name], maps.shapes[name][dim], node.shape[dim]
    own, behind = Window(size, total), Behind(total - size, total, padding=size)
    reads = [maps.read(name), maps.read(again)]
    for k, window in enumerate((own, behind)):
        reads[k] = replace(reads[k], rows=window) if dim == axes.rows else replace(reads[k], cols=window)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        some = [tile for tile in tiles if tile.shape[dim]]
        return some[0] if len(some) == 1 else torch.cat(some, dim)

    return Placed(tuple(reads), axes, run)


def around(node: Node, placed: Placed, maps: Maps) -> tuple[list[Node], Node, Placed, tuple[int, int]]:
    """An operation as it runs on maps of which some are rolled.

    Args:
        node: the operation.
        placed: how it would be placed if none of its maps were rolled.

    Returns:
        Nodes to be placed before it as they stand, each of the dtype of what it reads first; the operation, which reads these;
        how it is placed; and where its result begins.
    """
    begins = [maps.begin.get(read.source, (0, 0)) for read in placed.reads]
    weights = [read.source in maps.broadcast for read in placed.reads]
    sides = [
        _around([read.rows for read in placed.reads], [begin[0] for begin in begins], weights),
        _around([read.cols for read in placed.reads], [begin[1] for begin in begins], weights),
    ]
    begin = sides[0][0].begin, sides[1][0].begin
    nodes: list[Node] = []
    reads, names = [], {}
    for k, read in enumerate(placed.reads):
        rows, cols = sides[0][k], sides[1][k]
        if max(rows.again - rows.inner.n_in, cols.again - cols.inner.n_in) > 0:
            raise node.refuse("reads a rolled map more than twice", "do not roll maps that are smaller than a window")
        source = read.source
        if source in maps.broadcast:
            shifts = -rows.begin_in, -cols.begin_in
            source = moved_weight(node, source, aten.roll.default, shifts, maps, nodes)
            names[maps.broadcast[read.source]] = maps.broadcast[source]
        else:
            for dim, side in zip(maps.axes[source], (rows, cols), strict=True):
                if side.again:
                    source = _again(node, source, dim, side.again, maps, nodes)
            names[read.source] = source
        reads.append(Read(source, _simplest(rows), _simplest(cols)))
    axes_in = [maps.axes[read.source] for read in placed.reads]
    run = _in_parts(placed.run, sides, axes_in, placed.axes)
    if isinstance(node.target, Reduction):
        reduction: Any = InParts(node.target, lambda *given: [x for row in _cut(*given, sides, axes_in) for x in row])
        node = replace(node, target=reduction)
    return nodes, swap_refs(node, names), replace(placed, reads=tuple(reads), run=run, exclusive=False), begin


def _around(inner: Sequence[AxisMap], begins: Sequence[int], weights: Sequence[bool]) -> list[Rolled]:
    """Return how an operation reads maps that begin at `begins` along one axis, with as little as possible read twice."""
    candidates = set()
    for m, begin, weight in zip(inner, begins, weights, strict=True):
        if not weight:
            candidates.add(bisect_left(range(m.n_out + 1), begin, key=m.first) % m.n_out)
    choices = []
    for at in sorted(candidates):
        maps = []
        for m, begin, weight in zip(inner, begins, weights, strict=True):
            begin_in = at if weight else begin  # a weight is read from wherever it has to be
            late = begin_in > 0 and m.first(at) < begin_in
            maps.append(Rolled(m, begin_in - m.n_in if late else begin_in, at))
        choices.append((sum(m.again for m in maps), at, maps))
    return min(choices, key=lambda choice: choice[:2])[2]


def _simplest(axis_map: Rolled) -> AxisMap:
    """The same reads, as others know them."""
    if axis_map.begin_in == axis_map.begin == 0:
        return axis_map.inner
    same = axis_map.begin_in == axis_map.begin and axis_map.inner == identity(axis_map.n_in)
    return axis_map.inner if same else axis_map


def _again(node: Node, source: str, dim: int, count: int, maps: Maps, nodes: list[Node]) -> str:
    """The name of map `source` with its first `count` positions along `dim` once more behind it; its nodes go to `nodes`."""
    shapes = {**maps.shapes, **{other.name: other.shape for other in nodes}}
    made = f"{source}@{dim}+{count}"
    if made not in shapes:
        shape = list(shapes[source])
        for suffix, target, args, size in (
            ("first", first_positions, (Ref(source), dim, count), count),
            ("", joined, (Ref(source), Ref(f"{made}first"), dim), shape[dim] + count),
        ):
            size_of = (*shape[:dim], size, *shape[dim + 1 :])
            nodes.append(node.derived(target, *args, name=made + suffix, shape=size_of))
    return made


def moved_weight(node: Node, name: str, target: Any, by: Sequence[int], maps: Maps, nodes: list[Node]) -> str:
    """The name of the map that a weight as large as the image becomes by a roll `by` so many rows and columns, or by a flip.

    The node that moves the weight goes to `nodes`.
    """
    weight, axes, shape = maps.broadcast[name], maps.axes[name], maps.shapes[name]
    added, shape_of = len(shape) - len(maps.shapes[weight]), maps.shapes[weight]
    over = {d - added: shift for shift, d in zip(by, axes, strict=True) if shift and d >= added}
    if not over:
        return name
    amounts = [list(over.values())] if target is aten.roll.default else []
    made = f"{weight}@{target._opname} {over}"
    if made not in maps.shapes:
        nodes.append(node.derived(target, Ref(weight), *amounts, list(over), name=made, shape=shape_of))
        maps.shapes[made] = shape_of
    return maps.broadcast_weight(made, axes, shape)


def _parts(spans: Sequence[Span], sides: Sequence[Rolled]) -> list[list[tuple[Span, int]]]:
    """For each part of a computation, each map's span in it, and where that begins in what is read for all parts together."""
    found = [side.parts(span.start, span.stop) for span, side in zip(spans, sides, strict=True)]
    return [
        [(part, part.first + add - span.first) for (part, add), span in zip(parts, spans, strict=True)]
        for parts in zip(*found, strict=True)
    ]


def _cut(
    tiles: Sequence[Tensor],
    context: TileContext,
    sides: Sequence[Sequence[Rolled]],
    axes: Sequence[Axes],
) -> list[list[tuple[list[Tensor], TileContext]]]:
    """The parts of one computation, in rows and columns: the tiles and the context of each, as the model sees the maps."""
    found: list[list[tuple[list[Tensor], TileContext]]] = []
    for down in _parts(context.rows, sides[0]):
        found.append([])
        for across in _parts(context.cols, sides[1]):
            parts = [
                tile.narrow(at.rows, y, row.last - row.first).narrow(at.cols, x, col.last - col.first)
                for tile, at, (row, y), (col, x) in zip(tiles, axes, down, across, strict=True)
            ]
            spans = tuple(span for span, _ in down), tuple(span for span, _ in across)
            masks = context.masks and tuple(
                mask.narrow(at.rows, y, row.last - row.first).narrow(at.cols, x, col.last - col.first)
                for mask, at, (row, y), (col, x) in zip(context.masks, axes, down, across, strict=True)
            )
            found[-1].append((parts, context._replace(rows=spans[0], cols=spans[1], masks=masks)))
    return found


def _in_parts(run: Run, sides: Sequence[Sequence[Rolled]], axes_in: Sequence[Axes], axes: Axes) -> Run:
    """`run` on each part of a tile that goes over the border of a map."""

    def run_parts(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        parts = [[run(*part) for part in row] for row in _cut(tiles, context, sides, axes_in)]
        made = [row[0] if len(row) == 1 else torch.cat(row, axes.cols) for row in parts]
        return made[0] if len(made) == 1 else torch.cat(made, axes.rows)

    return run_parts
