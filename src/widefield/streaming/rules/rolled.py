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
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.extents import AxisMap, Behind, Rolled, Span, Window, identity
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
from widefield.streaming.rules.reductions import Grads, Pairs, Parts, Reduction
from widefield.streaming.rules.rewriting import Rewriting

aten = torch.ops.aten
_FARTHEST = 64  # positions that a roll may move a map by: each tile carries as many


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


@rule(turn, saves=(), cheap=True, keeps_batch=True)
def turned(node: Node, maps: Maps) -> Placed:
    """See `turn`."""
    name = only_map(node, maps)
    return Placed((maps.read(name),), maps.axes[name], lambda tiles, context: tiles[0])


def straight(x: Tensor) -> Tensor:
    """A rolled map that leaves the scan, and begins with its first row and column again (`Value.begin`)."""
    return x


@rule(straight, saves=(), cheap=True, keeps_batch=True)
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
            source = _rolled_weight(node, read.source, (-rows.begin_in, -cols.begin_in), maps, nodes)
            names[maps.broadcast[read.source]] = maps.broadcast[source]
        else:
            for dim, side in zip(maps.axes[source], (rows, cols), strict=True):
                if side.again:
                    source = _again(node, source, dim, side.again, maps, nodes)
            names[read.source] = source
        reads.append(Read(source, _simplest(rows), _simplest(cols)))
    axes_in = [maps.axes[read.source] for read in placed.reads]
    run = _in_parts(placed.run, tuple(sides[0]), tuple(sides[1]), axes_in, placed.axes)
    if isinstance(node.target, Reduction):
        target: Any = InParts(node.target, tuple(sides[0]), tuple(sides[1]), tuple(axes_in))
        node = replace(node, target=target)
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
            nodes.append(
                replace(node, name=made + suffix, target=target, args=args, kwargs={}, pick=None, shape=size_of)
            )
    return made


def _rolled_weight(node: Node, name: str, shifts: tuple[int, int], maps: Maps, nodes: list[Node]) -> str:
    """The name of the map that a weight as large as the image becomes when it is read from another row and column on."""
    if not any(shifts):
        return name
    weight, axes, shape = maps.broadcast[name], maps.axes[name], maps.shapes[name]
    added = len(shape) - len(maps.shapes[weight])
    over = [(shift, d - added) for shift, d in zip(shifts, axes, strict=True) if d >= added]
    made = f"{weight}@{','.join(map(str, shifts))}@{','.join(map(str, axes))}"
    if made not in maps.shapes:
        args = (Ref(weight), [shift for shift, _ in over], [d for _, d in over])
        shape_of = maps.shapes[weight]
        nodes.append(
            replace(node, name=made, target=aten.roll.default, args=args, kwargs={}, pick=None, shape=shape_of)
        )
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
    sides: tuple[Sequence[Rolled], Sequence[Rolled]],
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


def _in_parts(run: Run, rows: Sequence[Rolled], cols: Sequence[Rolled], axes_in: Sequence[Axes], axes: Axes) -> Run:
    """`run` on each part of a tile that goes over the border of a map."""

    def run_parts(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        parts = [[run(*part) for part in row] for row in _cut(tiles, context, (rows, cols), axes_in)]
        made = [row[0] if len(row) == 1 else torch.cat(row, axes.cols) for row in parts]
        return made[0] if len(made) == 1 else torch.cat(made, axes.rows)

    return run_parts


@dataclass(frozen=True)
class InParts(Reduction):
    """A reduction of rolled maps: each part of a tile that goes over the border of a map by itself."""

    inner: Reduction
    rows: tuple[Rolled, ...]
    cols: tuple[Rolled, ...]
    axes: tuple[Axes, ...]

    def gather(self, tiles: Sequence[Tensor], context: TileContext) -> Any:
        states = [self.inner.gather(*part) for part in self._cut(tiles, context)]
        return list(accumulate(states, self.inner.merge))[-1]

    def merge(self, one: Any, other: Any) -> Any:
        return self.inner.merge(one, other)

    def finish(self, state: Any) -> Parts:
        return self.inner.finish(state)

    def pull(self, result: Parts, tiles: Sequence[Tensor], context: TileContext, grads: Grads) -> Pairs:
        with torch.enable_grad():
            parts = self._cut(tiles, context)
        return [pair for part in parts for pair in self.inner.pull(result, *part, grads)]

    def _cut(self, tiles: Sequence[Tensor], context: TileContext) -> list[tuple[list[Tensor], TileContext]]:
        return [part for row in _cut(tiles, context, (self.rows, self.cols), self.axes) for part in row]
